// dense_concat's one call and where its elements are; one definition for CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/affine.h"
#include "common/portable.h"

namespace cvkernels::dense_concat {

struct Strides {
  int64_t n, c, h, w;
};

// out[N, C, H, W] is the slice of the buffer. Strides are in elements; H and W are merged, and N
// with them, where both tensors step through them evenly.
struct Problem {
  int64_t N, C, H, W;
  Strides src, out;
  BatchNorm bn;
  bool copies;  // no norm and no ReLU: bits are moved
  bool relu;

  CVK_HOST_DEVICE int64_t pixels() const { return N * H * W; }

  // The offset of the pixel's first channel.
  CVK_HOST_DEVICE int64_t offset(const Strides& strides, int64_t pixel) const {
    if (N * H == 1) return pixel * strides.w;
    const int64_t row = pixel / W;
    const int64_t n = row / H;
    return n * strides.n + (row - n * H) * strides.h + (pixel - row * W) * strides.w;
  }
};

}  // namespace cvkernels::dense_concat
