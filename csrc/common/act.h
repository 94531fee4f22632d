// The activations by the number that Python gives them, and their arithmetic. No torch header.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

namespace cvkernels {

enum class Act : int64_t { NONE = 0, RELU = 1, RELU6 = 2, SILU = 3 };

// e^x to 2 roundings, for a sum with 1: below -86 it stays at 4e-38. Any x but NaN. On the host
// without branches, so that a loop over elements is vectorised.
CVK_HOST_DEVICE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  constexpr float ROUND = 0x1.8p23f;
  const float clamped = x < -86.0f ? -86.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = clamped * 0x1.715476p0f + ROUND;  // log2(e)
  const float n = shifted - ROUND;
  float r = clamped - n * 0x1.62e400p-1f;  // ln(2) in two parts
  r = r - n * 0x1.7f7d1cp-20f;
  float y = 1.0f / 5040.0f;
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const uint32_t exponent = __builtin_bit_cast(uint32_t, shifted) << 23;
  y = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, y) + exponent);
  return x > 88.0f ? __builtin_huge_valf() : y;
#endif
}

CVK_HOST_DEVICE double exponential(double x) { return exp(x); }

CVK_HOST_DEVICE float sigmoid(float x) {
  const float y = 1.0f / (1.0f + exponential(-x));
  return x != x ? x : y;
}

}  // namespace cvkernels
