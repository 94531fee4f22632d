// Copies from global to shared memory that need no registers while they are on their way; CUDA's
// own __pipeline_commit and __pipeline_wait_prior wait for them. No torch header.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstdint>

#include "cuda_launch.cuh"

namespace cvkernels {

// Where mask has the bit: copies a Pack, or writes zeros and reads nothing where not `reads`. It is
// predicated, where __pipeline_memcpy_async behind a condition would be a branch.
__device__ __forceinline__ void copy_pack_async(void* to, const void* from, uint32_t mask,
                                                uint32_t bit, bool reads) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{\n\t"
      ".reg .pred copies;\n\t"
      ".reg .b32 masked;\n\t"
      "and.b32 masked, %2, %3;\n\t"
      "setp.ne.b32 copies, masked, 0;\n\t"
      "@copies cp.async.cg.shared.global [%0], [%1], 16, %4;\n\t"
      "}"
      :
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(mask), "r"(bit),
        "r"(reads ? 16 : 0)
      : "memory");
#else
  if (mask & bit) __pipeline_memcpy_async(to, from, sizeof(Pack), reads ? 0 : sizeof(Pack));
#endif
}

}  // namespace cvkernels
