// What the CPU and the CUDA launcher of avg_pool share: from a call's tensors to an Average.
#pragma once

#include <optional>

#include "affine_call.h"
#include "avg_pool.h"
#include "pool_call.h"

namespace cvkernels::avg_pool {

inline Average average_of(const Tensor& x, const BatchNormTensors& bn, bool count_include_pad,
                          std::optional<int64_t> divisor) {
  CVK_CHECK("avg_pool", divisor != 0, "divisor_override must not be 0");
  return {batch_norm_of("avg_pool", bn, x, x.size(1)), !bn.empty(), count_include_pad,
          divisor.value_or(0)};
}

// avg_pool's windows have no dilation.
inline const Ints UNDILATED = {1, 1};

}  // namespace cvkernels::avg_pool
