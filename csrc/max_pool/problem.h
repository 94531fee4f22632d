// Arithmetic of max_pool, one definition for CPU and CUDA: how the largest tap of a window is kept.
#pragma once

#include <cstdint>
#include <limits>

#include "common/pool.h"
#include "common/portable.h"

namespace cvkernels::max_pool {

using namespace pool;

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

// Of a quantised tensor.
template <>
struct Maximum<uint8_t> {
  using Bits = uint8_t;
  using Key = uint8_t;

  static constexpr Key lowest = 0;

  static CVK_HOST_DEVICE Key key(Bits value) { return value; }
  static CVK_HOST_DEVICE Bits value(Key key) { return key; }
  static CVK_HOST_DEVICE Key max(Key best, Key next) { return next > best ? next : best; }
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

}  // namespace cvkernels::max_pool
