// The element types as numbers: what they are computed in, and the conversions there and back, one
// definition for CPU and CUDA. No torch header.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

#if defined(__x86_64__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace cvkernels {

template <typename To, typename From>
CVK_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Wide is what T is computed in; narrow rounds to nearest, ties to even. The conversions on the
// host have selects for branches, so that a loop over elements is vectorised.
template <typename T>
struct Number {
  using Wide = T;
  static CVK_HOST_DEVICE Wide widen(T x) { return x; }
  static CVK_HOST_DEVICE T narrow(Wide x) { return x; }
};

// The nearest whole number between 0 and 255.
CVK_HOST_DEVICE uint32_t rounded_byte(float x) {
  const float least = x > 0.0f ? x : 0.0f;
  const float kept = least < 255.0f ? least : 255.0f;
  return bits_as<uint32_t>(kept + 0x1.8p23f) & 0xff;
}

// Bytes of a quantised tensor.
template <>
struct Number<uint8_t> {
  using Wide = float;
  static CVK_HOST_DEVICE float widen(uint8_t x) { return static_cast<float>(x); }
  static CVK_HOST_DEVICE uint8_t narrow(float x) { return static_cast<uint8_t>(rounded_byte(x)); }
};

template <>
struct Number<float16> {
  using Wide = float;

  static CVK_HOST_DEVICE float widen(float16 x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x.bits));
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = x.bits & 0x7fff;
    // Their exponents differ by 112; an exponent of ones stays one of ones.
    const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00 ? 112u << 23 : 224u << 23);
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    return bits_as<float>(sign | (magnitude < 0x0400 ? bits_as<uint32_t>(subnormal) : normal));
#endif
  }

  static CVK_HOST_DEVICE float16 narrow(float x) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t rounded = magnitude + 0x0fff + ((magnitude >> 13) & 1);
    const uint32_t normal = rounded < 0x47800000 ? (rounded - (112u << 23)) >> 13 : 0x7c00;
    // The unit in the last place of 0.5 is the smallest float16: the addition rounds to it.
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t result = magnitude > 0x7f800000 ? 0x7e00 : finite;
    return {static_cast<uint16_t>((bits >> 16 & 0x8000) | result)};
#endif
  }
};

template <>
struct Number<bfloat16> {
  using Wide = float;

  static CVK_HOST_DEVICE float widen(bfloat16 x) {
    return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
  }

  static CVK_HOST_DEVICE bfloat16 narrow(float x) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return {static_cast<uint16_t>(nan ? 0x7fc0 : rounded)};
#endif
  }
};

}  // namespace cvkernels
