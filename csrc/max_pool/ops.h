// The ops of max_pool, one definition for CPU and CUDA. Schemas: cvkernels/ops/max_pool/op.py.
// A device has launch(device, Type<T>{}, problem, x, out).
#pragma once

#include "common/pool_ops.h"
#include "max_pool/problem.h"

namespace cvkernels::max_pool {

template <typename Device>
struct Ops {
  static constexpr const char* OP = "max_pool";

  static void run(Problem problem, const Tensor& x, const Tensor& out) {
    set_out(problem, out);
    if (problem.N == 0) return;
    pool::dispatch<Device>(OP, x.scalar_type(), [&](auto type) {
      Device::perform(OP, x, {x.const_data_ptr(), out.mutable_data_ptr()},
                      [=](void* const* at, const auto& device) {
                        Device::launch(device, type, problem, at[0], at[1]);
                      });
    });
  }

  static void max_pool_out(const Tensor& x, const Ints& kernel_size, const Ints& stride,
                           const Ints& padding, const Ints& dilation, bool ceil_mode,
                           const Tensor& out) {
    Device::check(OP, x);
    const Problem problem = problem_of(x, {OP, kernel_size, stride, padding, dilation, ceil_mode});
    check_out(OP, problem, x, out);
    run(problem, x, out);
  }

  static Tensor max_pool(const Tensor& x, const Ints& kernel_size, const Ints& stride,
                         const Ints& padding, const Ints& dilation, bool ceil_mode) {
    Device::check(OP, x);
    const Problem problem = problem_of(x, {OP, kernel_size, stride, padding, dilation, ceil_mode});
    const Tensor out = new_out(problem, x);
    run(problem, x, out);
    return out;
  }

  static void add_to(auto& library) {
    library.impl("max_pool", TORCH_BOX(&Ops::max_pool));
    library.impl("max_pool_out", TORCH_BOX(&Ops::max_pool_out));
  }
};

}  // namespace cvkernels::max_pool
