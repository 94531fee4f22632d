// Where the elements of a map lie whose channels are neighbours.
#pragma once

#include "check.h"

namespace cvkernels {

// A map [N, C, H, W], channels_last or a slice of the channels of such a tensor, if it `fits`: from
// pixel to pixel of an image it is one stride. In elements.
struct PixelMap {
  int64_t N, C, HW;
  int64_t stride_n, stride;
  bool fits;

  // Whether the stride leads from image to image too.
  bool even() const { return fits && (N <= 1 || HW == 0 || stride_n == HW * stride); }
};

inline PixelMap pixel_map(const Tensor& map) {
  const int64_t N = map.size(0), C = map.size(1), H = map.size(2), W = map.size(3);
  const int64_t stride = W > 1 ? map.stride(3) : H > 1 ? map.stride(2) : N > 1 ? map.stride(0) : C;
  const bool fits =
      (C <= 1 || map.stride(1) == 1) && (W <= 1 || H <= 1 || map.stride(2) == W * stride);
  return {N, C, H * W, map.stride(0), stride, fits};
}

// The distance of neighbouring pixels of a map whose pixels are one after another, all apart.
inline int64_t pixel_stride(const char* op, const char* name, const Tensor& tensor) {
  CVK_CHECK(op, tensor.dim() == 4, name, " must have shape [N, C, H, W], got ", shape_of(tensor));
  const PixelMap map = pixel_map(tensor);
  CVK_CHECK(op, map.even() && map.stride >= map.C, name,
            " must be channels_last or a channel slice of a channels_last tensor, got shape ",
            shape_of(tensor), " with a stride of ", tensor.stride(1), " between channels");
  return map.stride;
}

}  // namespace cvkernels
