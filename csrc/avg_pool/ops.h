// The ops of avg_pool, one definition for CPU and CUDA. Schemas: cvkernels/ops/avg_pool/op.py.
// A device has launch(device, Type<T>{}, problem, average, x, out).
#pragma once

#include "avg_pool/problem.h"
#include "common/arguments.h"
#include "common/pool_ops.h"

namespace cvkernels::avg_pool {

// avg_pool's windows have no dilation.
inline const Ints UNDILATED = {1, 1};

inline Average average_of(const Tensor& x, const BatchNormTensors& bn, bool count_include_pad,
                          std::optional<int64_t> divisor) {
  CVK_CHECK("avg_pool", divisor != 0, "divisor_override must not be 0");
  return {batch_norm_of("avg_pool", bn, x, x.size(1)), !bn.empty(), count_include_pad,
          divisor.value_or(0)};
}

template <typename Device>
struct Ops {
  static constexpr const char* OP = "avg_pool";

  static void run(Problem problem, const Average& average, const Tensor& x, const Tensor& out) {
    set_out(problem, out);
    if (problem.N == 0) return;
    const BatchNorm& bn = average.bn;
    pool::dispatch<Device>(OP, x.scalar_type(), [&](auto type) {
      Device::perform(OP, x,
                      {x.const_data_ptr(), bn.weight.data, bn.bias.data, bn.mean.data, bn.var.data,
                       out.mutable_data_ptr()},
                      [=](void* const* at, const auto& device) {
                        Average moved = average;
                        moved.bn = average.bn.at(at + 1);
                        Device::launch(device, type, problem, moved, at[0], at[5]);
                      });
    });
  }

  static void avg_pool_out(const Tensor& x, const Ints& kernel_size, const Ints& stride,
                           const Ints& padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor, const Maybe& weight, const Maybe& bias,
                           const Maybe& mean, const Maybe& var, double eps, const Tensor& out) {
    Device::check(OP, x);
    const Problem problem = problem_of(x, {OP, kernel_size, stride, padding, UNDILATED, ceil_mode});
    check_out(OP, problem, x, out);
    run(problem, average_of(x, {weight, bias, mean, var, eps}, count_include_pad, divisor), x, out);
  }

  static Tensor avg_pool(const Tensor& x, const Ints& kernel_size, const Ints& stride,
                         const Ints& padding, bool ceil_mode, bool count_include_pad,
                         std::optional<int64_t> divisor, const Maybe& weight, const Maybe& bias,
                         const Maybe& mean, const Maybe& var, double eps) {
    Device::check(OP, x);
    const Problem problem = problem_of(x, {OP, kernel_size, stride, padding, UNDILATED, ceil_mode});
    const Tensor out = new_out(problem, x);
    run(problem, average_of(x, {weight, bias, mean, var, eps}, count_include_pad, divisor), x, out);
    return out;
  }

  static void add_to(auto& library) {
    library.impl("avg_pool", TORCH_BOX(&Ops::avg_pool));
    library.impl("avg_pool_out", TORCH_BOX(&Ops::avg_pool_out));
  }
};

}  // namespace cvkernels::avg_pool
