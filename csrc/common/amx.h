// The tiles of AMX, eight in each thread, of 16 rows of 64 bytes, and their products of pairs of
// bfloat16; and the same in plain C++, for processors without them. No torch header.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "number.h"

#if defined(__x86_64__) && defined(__GLIBC__)
#include <sys/syscall.h>
#include <unistd.h>
#define CVK_HAS_AMX 1
#endif

namespace cvkernels {

constexpr int64_t TILE_ROWS = 16;     // of a tile
constexpr int64_t TILE_NUMBERS = 32;  // bfloat16 of a row, and floats of two

#if defined(CVK_HAS_AMX)
// Whether this process may use tiles: 0, or the error of the operating system, which is asked once
// where the processor has them, since it then keeps 8 KB more of each thread. ENODEV without them.
inline int amx_error() {
  static const int error = [] {
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and its feature
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) return ENODEV;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0 ? 0 : errno;
  }();
  return error;
}

// This thread's tiles, which are its own between construction and destruction.
struct AmxTiles {
  AmxTiles() {
    alignas(64) uint8_t shapes[64] = {1};  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      shapes[16 + 2 * tile] = 2 * TILE_NUMBERS;  // bytes of a row
      shapes[48 + tile] = TILE_ROWS;
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~AmxTiles() { asm volatile("tilerelease" ::: "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int TILE>
  CVK_HOST_DEVICE void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
  }

  // Rows are `stride` bytes apart.
  template <int TILE>
  CVK_HOST_DEVICE void load(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(TILE) : "memory");
  }

  template <int TILE>
  CVK_HOST_DEVICE void store(void* rows, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(TILE) : "memory");
  }

  // sums[row][column] += a[row][2 i] * b[i][2 column] + a[row][2 i + 1] * b[i][2 column + 1], over
  // i: floats, and bfloat16.
  template <int SUMS, int A, int B>
  CVK_HOST_DEVICE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
  }
};
#else
inline int amx_error() { return ENODEV; }
#endif

struct PlainTiles {
  template <int TILE>
  CVK_HOST_DEVICE void clear() {
    std::memset(tiles[TILE], 0, sizeof(tiles[TILE]));
  }

  template <int TILE>
  CVK_HOST_DEVICE void load(const void* rows, int64_t stride) {
    for (int row = 0; row < TILE_ROWS; ++row)
      std::memcpy(tiles[TILE][row], static_cast<const char*>(rows) + row * stride, 64);
  }

  template <int TILE>
  CVK_HOST_DEVICE void store(void* rows, int64_t stride) const {
    for (int row = 0; row < TILE_ROWS; ++row)
      std::memcpy(static_cast<char*>(rows) + row * stride, tiles[TILE][row], 64);
  }

  template <int SUMS, int A, int B>
  CVK_HOST_DEVICE void multiply_add() {
    for (int row = 0; row < TILE_ROWS; ++row) {
      float sums[16];
      std::memcpy(sums, tiles[SUMS][row], 64);
      for (int i = 0; i < 16; ++i) {
        const uint32_t a = tiles[A][row][i];
        for (int column = 0; column < 16; ++column) {
          const uint32_t b = tiles[B][i][column];
          sums[column] += bits_as<float>(a << 16) * bits_as<float>(b << 16);
          sums[column] += bits_as<float>(a & 0xffff0000u) * bits_as<float>(b & 0xffff0000u);
        }
      }
      std::memcpy(tiles[SUMS][row], sums, 64);
    }
  }

  alignas(64) uint32_t tiles[8][TILE_ROWS][16];
};

}  // namespace cvkernels
