// Arithmetic of max_pool, one definition for CPU and CUDA: which taps a window has, and how the
// largest of them is kept.
#pragma once

#include <cstdint>
#include <limits>

#include "portable.h"

namespace cvkernels::max_pool {

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
  if (begin < 0) begin += (-begin + axis.dilation - 1) / axis.dilation * axis.dilation;
  if (end > axis.size) end = axis.size;
  return {begin, end};
}

// Maximum<T> orders elements by keys; NaN is above everything.
template <typename T>
struct Maximum {
  using Bits = T;
  using Key = T;

  static constexpr Key lowest = -std::numeric_limits<T>::infinity();

  static CVK_HOST_DEVICE Key key(Bits value) { return value; }
  static CVK_HOST_DEVICE Bits value(Key key) { return key; }
  // "|" and not "||": without a branch it is vectorised.
  static CVK_HOST_DEVICE Key max(Key best, Key next) {
    return ((next > best) | (next != next)) ? next : best;
  }
};

// A 16-bit float's key is its bits as a signed integer, with the magnitude inverted below zero and
// every NaN at the top: no conversion to float, and twice the lanes of one.
template <int16_t INFINITY_BITS>
struct Maximum16 {
  using Bits = int16_t;
  using Key = int16_t;

  static constexpr Bits MAGNITUDE = 0x7fff;
  static constexpr Key lowest = ~INFINITY_BITS;

  static CVK_HOST_DEVICE Key key(Bits bits) {
    return static_cast<Bits>(bits & MAGNITUDE) > INFINITY_BITS ? MAGNITUDE : value(bits);
  }
  static CVK_HOST_DEVICE Bits value(Key key) {
    return static_cast<Bits>(key ^ ((key >> 15) & MAGNITUDE));
  }
  static CVK_HOST_DEVICE Key max(Key best, Key next) { return next > best ? next : best; }
};

template <>
struct Maximum<float16> : Maximum16<0x7c00> {};

template <>
struct Maximum<bfloat16> : Maximum16<0x7f80> {};

// One call. x[N, C, H, W], out[N, C, P, Q], any strides, in elements.
struct Problem {
  int64_t N, C, P, Q;
  Axis h, w;
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w;
  int64_t out_stride_n, out_stride_c, out_stride_h, out_stride_w;
};

}  // namespace cvkernels::max_pool
