// The op dense_concat, one definition for CPU and CUDA. Schema: cvkernels/ops/dense_concat/op.py.
// A device has launch(device, Type<T>{}, problem, src, out).
#pragma once

#include "common/arguments.h"
#include "dense_concat/problem.h"

namespace cvkernels::dense_concat {

// Makes one axis of W and one outside of it, where both tensors step through the two evenly.
inline void merge_into_w(Problem& problem, int64_t Problem::* axis, int64_t Strides::* stride) {
  int64_t& outer = problem.*axis;
  if (outer == 1) return;
  if (problem.W == 1) {
    problem.src.w = problem.src.*stride;
    problem.out.w = problem.out.*stride;
  } else if (problem.src.*stride != problem.W * problem.src.w ||
             problem.out.*stride != problem.W * problem.out.w) {
    return;
  }
  problem.W *= outer;
  outer = 1;
}

inline Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

inline Problem problem_of(const Tensor& buffer, const Tensor& src, int64_t start,
                          const BatchNormTensors& bn, bool relu) {
  const char* op = "dense_concat";
  CVK_CHECK_DIM(op, buffer, 4);
  CVK_CHECK_DIM(op, src, 4);
  CVK_CHECK_SAME(op, src, buffer);
  CVK_CHECK(op,
            src.size(0) == buffer.size(0) && src.size(2) == buffer.size(2) &&
                src.size(3) == buffer.size(3),
            "src must have the buffer's N, H and W, got shapes ", shape_of(src), " and ",
            shape_of(buffer));
  CVK_CHECK(op, start >= 0 && start <= buffer.size(1) - src.size(1), "channels [", start, ", ",
            start + src.size(1), ") are not within the buffer's ", buffer.size(1));
  for (int64_t d = 0; d < 4; ++d)
    CVK_CHECK(op, buffer.stride(d) != 0 || buffer.size(d) <= 1,
              "buffer must not overlap itself along dimension ", d);
  Problem problem{src.size(0),
                  src.size(1),
                  src.size(2),
                  src.size(3),
                  strides_of(src),
                  strides_of(buffer),
                  batch_norm_of(op, bn, src, src.size(1)),
                  bn.empty() && !relu,
                  relu};
  merge_into_w(problem, &Problem::H, &Strides::h);
  if (problem.H == 1) merge_into_w(problem, &Problem::N, &Strides::n);
  return problem;
}

template <typename Device>
struct Ops {
  static void dense_concat(const Tensor& buffer, const Tensor& src, int64_t start,
                           const Maybe& weight, const Maybe& bias, const Maybe& mean,
                           const Maybe& var, double eps, bool relu) {
    const char* op = "dense_concat";
    Device::check(op, buffer);
    const Problem problem = problem_of(buffer, src, start, {weight, bias, mean, var, eps}, relu);
    if (src.numel() == 0) return;
    const BatchNorm& bn = problem.bn;
    const int64_t offset = start * buffer.stride(1);
    dispatch_floating(op, src.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      Device::perform(op, buffer,
                      {buffer.mutable_data_ptr(), src.const_data_ptr(), bn.weight.data,
                       bn.bias.data, bn.mean.data, bn.var.data},
                      [=](void* const* at, const auto& device) {
                        Problem moved = problem;
                        moved.bn = problem.bn.at(at + 2);
                        Device::launch(device, type, moved, at[1], static_cast<T*>(at[0]) + offset);
                      });
    });
  }

  static void add_to(auto& library) { library.impl("dense_concat", TORCH_BOX(&Ops::dense_concat)); }
};

}  // namespace cvkernels::dense_concat
