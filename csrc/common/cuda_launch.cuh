// What the CUDA kernels share: 16-byte accesses, where a tensor allows them, grid sizes, and for
// tensors with any strides, one thread for each element. No torch header.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace cvkernels {

// 16 bytes of neighbouring channels, the largest access of one thread.
using Pack = uint4;

// True if every pixel of a tensor with these strides starts on a Pack and holds whole packs.
inline bool packable(const void* data, int64_t C, int64_t size, int64_t stride_n, int64_t stride_c,
                     int64_t stride_h, int64_t stride_w) {
  const auto whole = [&](int64_t elements) { return elements * size % sizeof(Pack) == 0; };
  return stride_c == 1 && whole(C) && whole(stride_n) && whole(stride_h) && whole(stride_w) &&
         reinterpret_cast<uintptr_t>(data) % sizeof(Pack) == 0;
}

inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
}

constexpr int64_t GRID_Y_MAX = 65535;

// Calls body(n, c, h, w) for this thread's elements of [N, C, H, W]. CHANNELS_INNER says which axis
// neighbouring threads walk along; Index counts all elements.
template <int THREADS, typename Index, bool CHANNELS_INNER, typename Body>
__device__ void over_elements(int64_t N, Index C, Index H, Index W, Body&& body) {
  const int64_t total = N * C * H * W;
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; item < total;
       item += step) {
    Index rest = item;
    Index c, w;
    if constexpr (CHANNELS_INNER) {
      c = rest % C, rest /= C;
      w = rest % W, rest /= W;
    } else {
      w = rest % W, rest /= W;
    }
    const Index h = rest % H;
    rest /= H;
    if constexpr (!CHANNELS_INNER) c = rest % C, rest /= C;
    body(int64_t(rest), int64_t(c), int64_t(h), int64_t(w));
  }
}

// Calls launch.operator()<Index, CHANNELS_INNER>(grid) for a kernel of over_elements.
template <int THREADS, typename Launch>
void launch_over_elements(int64_t total, bool channels_inner, Launch&& launch) {
  const unsigned grid = grid_of((total + THREADS - 1) / THREADS);
  const bool small = total <= std::numeric_limits<int32_t>::max() - THREADS;
  if (small && channels_inner)
    launch.template operator()<uint32_t, true>(grid);
  else if (small)
    launch.template operator()<uint32_t, false>(grid);
  else if (channels_inner)
    launch.template operator()<int64_t, true>(grid);
  else
    launch.template operator()<int64_t, false>(grid);
}

}  // namespace cvkernels
