// What a tensor of T holds, and how it becomes a float and back: the CPU ops compute in float.
#pragma once

#include <cstdint>

#include "portable.h"

namespace cvkernels {

template <typename T>
struct Element;

template <>
struct Element<float> {
  using Bits = float;
  static CVK_HOST_DEVICE float load(float value) { return value; }
  static CVK_HOST_DEVICE float store(float value) { return value; }
};

template <>
struct Element<bfloat16> {
  using Bits = uint16_t;
  static CVK_HOST_DEVICE float load(uint16_t bits) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  // To the nearest, ties to even; a NaN stays one.
  static CVK_HOST_DEVICE uint16_t store(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }
};

template <>
struct Element<float16> {
  using Bits = uint16_t;
  static CVK_HOST_DEVICE float load(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7fffu;
    // Exponent and mantissa in place, then the bias corrected: right for subnormal numbers too.
    const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | special | sign);
  }
  static CVK_HOST_DEVICE uint16_t store(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
    // Below the smallest normal number the addition rounds: 0.5's last place is the format's.
    const uint32_t small =
        __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? small : rounded;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return static_cast<uint16_t>(half | sign);
  }
};

}  // namespace cvkernels
