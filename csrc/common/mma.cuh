// Warp-wide matrix products and asynchronous copies into shared memory, as PTX of sm_80 and later.
// No torch header.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "portable.h"

namespace cvkernels {

// A place in shared memory, counted in bytes.
using Shared = uint32_t;

// The memory that a launch asks for, aligned to 16 bytes.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

__device__ __forceinline__ Shared shared_place(const void* at) {
  return static_cast<Shared>(__cvta_generic_to_shared(at));
}

// Copies 16 bytes past the first cache, or writes zeros and does not read `from`.
__device__ __forceinline__ void copy_async(Shared to, const void* from, bool reads) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(reads ? 16 : 0)
               : "memory");
}

// This thread's copies since its last commit are one group.
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}

// Waits for this thread's groups but the latest PENDING; others see them behind a barrier.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l has the place of row l % 8 of matrix l / 8, and gets
// of each matrix the elements 2 * (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row));
}

// sums[16, 8] += a[16, 16] * b[16, 8]. a is four matrices: rows 0-7 and 8-15 of columns 0-7, then
// of columns 8-15; b is two transposed ones, of rows 0-7 and 8-15. Lane l has of sums the columns
// 2 * (l % 4) and the next, in row l / 4 and in row l / 4 + 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

#define CVK_MULTIPLY_ADD(T, NAME)                                                           \
  template <>                                                                               \
  __device__ __forceinline__ void multiply_add<T>(float (&sums)[4], const uint32_t (&a)[4], \
                                                  uint32_t b0, uint32_t b1) {               \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                              \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                    \
  }
CVK_MULTIPLY_ADD(float16, "f16")
CVK_MULTIPLY_ADD(bfloat16, "bf16")
#undef CVK_MULTIPLY_ADD

// What the lane whose number differs in the lowest bit gives.
__device__ __forceinline__ uint32_t from_neighbour(uint32_t given) {
  return __shfl_xor_sync(0xffffffff, given, 1);
}

}  // namespace cvkernels
