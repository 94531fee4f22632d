// What the ops' arithmetic needs from the compiler, on the host and on the device. No torch header.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CVK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CVK_HOST_DEVICE inline __attribute__((always_inline))
#endif

// On a CPU function: compiled for each instruction set, the best one chosen when the library loads.
// What it calls must be CVK_HOST_DEVICE, or it is compiled for the baseline alone; its loops must
// be plain, since vector types are lowered to the baseline before the function is cloned.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__CUDACC__)
#define CVK_SIMD __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
// For a type that few use on a CPU and that takes long to compile.
#define CVK_SIMD_FEW __attribute__((target_clones("avx2", "default")))
#else
#define CVK_SIMD
#define CVK_SIMD_FEW
#endif

// Above a loop none of whose iterations reads what another writes.
#if defined(__clang__)
#define CVK_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define CVK_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace cvkernels {

// Bit patterns of the 16-bit formats; arithmetic on them is each op's own.
struct float16 {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

// A type as an argument.
template <typename T>
struct Type {
  using type = T;
};

}  // namespace cvkernels
