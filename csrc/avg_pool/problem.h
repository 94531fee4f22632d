// Arithmetic of avg_pool, one definition for CPU and CUDA: what the sum of a window is divided by.
#pragma once

#include <cstdint>

#include "common/affine.h"
#include "common/pool.h"
#include "common/portable.h"

namespace cvkernels::avg_pool {

using namespace pool;

// Every element is bn's multiply-add and a ReLU first, where normalises is set.
struct Average {
  BatchNorm bn;
  bool normalises;
  bool count_include_pad;
  int64_t divisor;  // 0: the number of taps

  // How many taps of a window along one axis count: those inside the input, or inside its padding.
  CVK_HOST_DEVICE int64_t counted(const Axis& axis, int64_t window, const Taps& taps) const {
    if (!count_include_pad) return taps.end - taps.begin;
    const int64_t begin = window * axis.stride - axis.padding;
    const int64_t end = begin + axis.kernel, last = axis.size + axis.padding;
    return (end < last ? end : last) - begin;
  }

  template <typename Wide>
  CVK_HOST_DEVICE Wide of(Wide sum, int64_t taps) const {
    return sum / static_cast<Wide>(divisor != 0 ? divisor : taps);
  }
};

}  // namespace cvkernels::avg_pool
