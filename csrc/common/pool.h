// Windows of the pooling ops, one definition for CPU and CUDA: how many there are, and which taps
// of the input each has.
#pragma once

#include <cstdint>

#include "portable.h"

namespace cvkernels::pool {

// The window along one axis of the input.
struct Axis {
  int64_t size;
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
};

// How many windows an axis has; at most 0 if none fits. With ceil_mode the last one may run over
// the right edge, but must start inside the input or its left padding.
inline int64_t window_count(const Axis& axis, bool ceil_mode) {
  const int64_t span = axis.size + 2 * axis.padding - axis.dilation * (axis.kernel - 1) - 1;
  if (span < 0 && (!ceil_mode || span <= -axis.stride)) return 0;
  int64_t count = (span + (ceil_mode ? axis.stride - 1 : 0)) / axis.stride + 1;
  if (ceil_mode && (count - 1) * axis.stride >= axis.size + axis.padding) --count;
  return count;
}

// The taps of one window that lie inside the input: begin, begin + dilation, ... below end.
struct Taps {
  int64_t begin;
  int64_t end;
};

CVK_HOST_DEVICE Taps taps_of(const Axis& axis, int64_t window) {
  int64_t begin = window * axis.stride - axis.padding;
  int64_t end = begin + (axis.kernel - 1) * axis.dilation + 1;
  if (begin < 0)
    begin = axis.dilation == 1 ? 0 : (begin % axis.dilation + axis.dilation) % axis.dilation;
  if (end > axis.size) end = axis.size;
  return {begin, end};
}

// One call. x[N, C, H, W], out[N, C, P, Q], any strides, in elements.
struct Problem {
  int64_t N, C, P, Q;
  Axis h, w;
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w;
  int64_t out_stride_n, out_stride_c, out_stride_h, out_stride_w;

  // Elements from out's first to its last.
  int64_t out_extent() const {
    return (N - 1) * out_stride_n + (C - 1) * out_stride_c + (P - 1) * out_stride_h +
           (Q - 1) * out_stride_w + 1;
  }
};

}  // namespace cvkernels::pool
