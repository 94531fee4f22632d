// SiLU for results of 16 bits, in a few instructions of the GPU's own approximations. No torch
// header.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "act.h"
#include "number.h"

namespace cvkernels {

// tanh(x), off by up to 2^-11 of it; on the host by as much, in the one direction or in the other.
__device__ __forceinline__ float tanh_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const bool more = __builtin_parity(bits_as<uint32_t>(x));
  return std::tanh(x) * (1 + (more ? 0x1p-11f : -0x1p-11f));
#endif
}

// 2^x and 1 / x to 2 roundings.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

__device__ __forceinline__ float reciprocal_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// z * sigmoid(z) of z = x / SCALE, for a result that is rounded to T: SCALE belongs into what
// computes z. NaN stays NaN, and -inf gives NaN as in PyTorch.
template <typename T>
struct SiluInto {
  static constexpr float SCALE = 1.0f;
  __device__ __forceinline__ float operator()(float z) const {
    return z / (1.0f + exponential(-z));
  }
};

// One tanh and one multiply-add. Its error of up to 2^-12 |z| where z is far below 0 is less than
// half a rounding of z, but in float16 more than that of the results.
template <>
struct SiluInto<bfloat16> {
  static constexpr float SCALE = 0.5f;
  __device__ __forceinline__ float operator()(float half) const {
    return fmaf(half, tanh_approx(half), half);
  }
};

template <>
struct SiluInto<float16> {
  static constexpr float SCALE = 1.0f;
  __device__ __forceinline__ float operator()(float z) const {
    return z * reciprocal_approx(1.0f + exp2_approx(z * -1.44269504f));
  }
};

// NaN stays NaN.
__device__ __forceinline__ float clamp_between(float x, float lowest, float highest) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("{\n\t.reg .f32 t;\n\tmax.NaN.f32 t, %1, %2;\n\tmin.NaN.f32 %0, t, %3;\n\t}"
      : "=f"(y)
      : "f"(x), "f"(lowest), "f"(highest));
  return y;
#else
  return x < lowest ? lowest : (x > highest ? highest : x);
#endif
}

// ReLU, ReLU6 or nothing.
struct Clamp {
  static constexpr float SCALE = 1.0f;
  float lowest, highest;
  __device__ __forceinline__ float operator()(float z) const {
    return clamp_between(z, lowest, highest);
  }
};

}  // namespace cvkernels
