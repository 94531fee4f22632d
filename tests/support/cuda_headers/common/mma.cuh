// csrc/common/mma.cuh on the host, see cuda_runtime.h: a warp's work is done when its 32 threads
// are there, and a copy when it is waited for, so that what is read too early is not there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/number.h"

namespace cvkernels {

using Shared = char*;

namespace on_host {

using cuda_on_host::block;

struct Copy {
  char* to;
  const void* from;
  bool reads;
};

// What one thread gives for its warp's work, one after another by turns: none is two ahead.
struct Given {
  uint32_t words[8];
};

// This thread's copies by groups, the last one open; those of an earlier block are forgotten.
inline std::vector<std::vector<Copy>>& groups() {
  struct Own {
    uint64_t block = 0;
    std::vector<std::vector<Copy>> groups;
  };
  static std::vector<Own> all(1024);
  Own& own = all[block.number()];
  if (own.block != block.count) own = {block.count, std::vector<std::vector<Copy>>(1)};
  return own.groups;
}

inline void expect(bool condition, const char* what) {
  if (!condition) std::fprintf(stderr, "runtime error: %s\n", what);
}

inline void expect_within(const char* at, size_t bytes) {
  expect(at >= block.memory && at + bytes <= block.memory + block.memory_size,
         "an address outside of shared memory");
  expect(reinterpret_cast<uintptr_t>(at) % 16 == 0, "a misaligned address in shared memory");
}

// What all lanes of this thread's warp give, when they all have given it.
inline const Given* exchange(const Given& given, const void* what) {
  static Given all[2][1024];
  static int turns[1024];
  const unsigned number = block.number(), first = number / cuda_on_host::WARP * cuda_on_host::WARP;
  Given* turn = all[turns[number]];
  turns[number] ^= 1;
  turn[number] = given;
  block.warp_wait(what);
  return turn + first;
}

inline unsigned lane() { return block.number() % cuda_on_host::WARP; }

template <typename T>
float element(uint32_t pair, int place) {
  return Number<T>::widen(T{static_cast<uint16_t>(pair >> 16 * place)});
}

}  // namespace on_host

inline char* dynamic_shared() { return on_host::block.memory; }
inline Shared shared_place(const void* at) {
  return const_cast<char*>(static_cast<const char*>(at));
}

inline void copy_async(Shared to, const void* from, bool reads) {
  on_host::expect_within(to, 16);
  on_host::expect(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a copy from a misaligned address");
  on_host::groups().back().push_back({to, from, reads});
}

inline void copies_commit() { on_host::groups().emplace_back(); }

template <int PENDING>
void copies_wait() {
  auto& groups = on_host::groups();
  while (groups.size() > PENDING + 1) {
    for (const on_host::Copy& copy : groups.front())
      if (copy.reads)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t (&matrices)[4], Shared row) {
  static const char what = 0;
  on_host::expect_within(row, 16);
  on_host::Given given;
  std::memcpy(given.words, &row, sizeof(row));
  const on_host::Given* lanes = on_host::exchange(given, &what);
  for (unsigned i = 0; i < 4; ++i) {
    const char* of;
    std::memcpy(&of, lanes[i * 8 + on_host::lane() / 4].words, sizeof(of));
    std::memcpy(&matrices[i], of + on_host::lane() % 4 * 4, 4);
  }
}

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static const char what = 0;
  const on_host::Given* lanes = on_host::exchange({{a[0], a[1], a[2], a[3], b0, b1}}, &what);
  const unsigned lane = on_host::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, half = i / 2, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t left = lanes[row * 4 + k % 8 / 2].words[half + k / 8 * 2];
      const uint32_t right = lanes[column * 4 + k % 8 / 2].words[4 + k / 8];
      sums[i] += on_host::element<T>(left, k % 2) * on_host::element<T>(right, k % 2);
    }
  }
}

inline uint32_t from_neighbour(uint32_t given) {
  static const char what = 0;
  return on_host::exchange({{given}}, &what)[on_host::lane() ^ 1].words[0];
}

}  // namespace cvkernels
