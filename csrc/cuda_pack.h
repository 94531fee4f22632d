// What the CUDA kernels share: 16-byte accesses, where a tensor allows them, and grid sizes.
#pragma once

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

}  // namespace cvkernels
