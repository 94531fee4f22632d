// What the launchers of the pooling ops share: from a call's tensors to a checked Problem.
#pragma once

#include <vector>

#include "check.h"
#include "pool.h"

namespace cvkernels::pool {

using Ints = std::vector<int64_t>;

// Calls launch(Type<T>{}) with the element type: of a quantised tensor, too, where the device has
// HAS_BYTES.
template <typename Device, typename Launch>
void dispatch(const char* op, ScalarType dtype, Launch&& launch) {
  if constexpr (requires { Device::HAS_BYTES; })
    if (dtype == ScalarType::Byte) return launch(Type<uint8_t>{});
  dispatch_floating(op, dtype, launch);
}

struct Window {
  const char* op;
  const Ints& kernel_size;
  const Ints& stride;
  const Ints& padding;
  const Ints& dilation;
  bool ceil_mode;

  Axis axis(int64_t size, int d) const {
    for (const Ints* pair : {&kernel_size, &stride, &padding, &dilation})
      CVK_CHECK(op, pair->size() == 2, "options must be pairs, got ", pair->size(), " numbers");
    const Axis axis{size, kernel_size.at(d), stride.at(d), padding.at(d), dilation.at(d)};
    CVK_CHECK(op, axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0,
              "kernel_size, stride and dilation must be positive, got ", axis.kernel, ", ",
              axis.stride, ", ", axis.dilation);
    CVK_CHECK(op, axis.padding >= 0 && 2 * axis.padding <= axis.kernel,
              "padding must be between 0 and half of kernel_size, got padding ", axis.padding,
              ", kernel_size ", axis.kernel);
    return axis;
  }
};

// The problem without out's strides.
inline Problem problem_of(const Tensor& x, const Window& window) {
  const char* op = window.op;
  CVK_CHECK_DIM(op, x, 4);
  Problem problem{};
  problem.N = x.size(0);
  problem.C = x.size(1);
  problem.h = window.axis(x.size(2), 0);
  problem.w = window.axis(x.size(3), 1);
  problem.P = window_count(problem.h, window.ceil_mode);
  problem.Q = window_count(problem.w, window.ceil_mode);
  const bool fits = x.size(2) > 0 && x.size(3) > 0 && problem.P > 0 && problem.Q > 0;
  CVK_CHECK(op, problem.C > 0 && fits, "no window fits x of shape ", shape_of(x));
  problem.x_stride_n = x.stride(0);
  problem.x_stride_c = x.stride(1);
  problem.x_stride_h = x.stride(2);
  problem.x_stride_w = x.stride(3);
  return problem;
}

inline void set_out(Problem& problem, const Tensor& out) {
  problem.out_stride_n = out.stride(0);
  problem.out_stride_c = out.stride(1);
  problem.out_stride_h = out.stride(2);
  problem.out_stride_w = out.stride(3);
}

inline void check_out(const char* op, const Problem& problem, const Tensor& x, const Tensor& out) {
  CVK_CHECK_SAME(op, out, x);
  CVK_CHECK_DIM(op, out, 4);
  CVK_CHECK(op,
            out.size(0) == problem.N && out.size(1) == problem.C && out.size(2) == problem.P &&
                out.size(3) == problem.Q,
            "out must have shape [", problem.N, ", ", problem.C, ", ", problem.P, ", ", problem.Q,
            "], got ", shape_of(out));
}

// A dense tensor in x's memory format; channels_last if x's channels are innermost.
inline Tensor new_out(const Problem& problem, const Tensor& x) {
  using torch::headeronly::MemoryFormat;
  const bool channels_last = problem.x_stride_c == 1 && problem.C > 1;
  return torch::stable::empty(
      {problem.N, problem.C, problem.P, problem.Q}, x.scalar_type(), std::nullopt, x.device(),
      std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace cvkernels::pool
