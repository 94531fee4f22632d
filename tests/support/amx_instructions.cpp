// Runs the convolutions by AMX tiles with their own instructions on a processor that has none: a
// handler of the signal that each of them raises decodes it and does what it would have done. The
// results have to be, bit for bit, those of the tiles in plain C++.
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "common/number.h"
#include "common/sigmoid_table.h"
#include "conv_bn_act/problem.h"
#include "conv_bn_act/tiled.h"

namespace cvkernels::conv_bn_act {
namespace {
#define CVK_SOURCE "conv_bn_act/tiles.h"
#include "common/isa.h"
}  // namespace
}  // namespace cvkernels::conv_bn_act

namespace {

using namespace cvkernels;
using namespace cvkernels::conv_bn_act;

uint32_t tiles[8][16][16];
bool is_configured = false;
long products = 0, configurations = 0;

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::_Exit(1);
}

// A general register, as instructions number them.
uint64_t register_of(const ucontext_t* context, int number) {
  constexpr int NAMES[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[NAMES[number]];
}

void configure(const uint8_t* shapes) {
  if (shapes[0] != 1 || shapes[1] != 0) fail("ldtilecfg: the palette must be 1, from row 0");
  for (int i = 2; i < 64; ++i) {
    const int expected = i < 16 ? 0 : i < 32 ? (i % 2 == 0 ? 64 : 0) : i < 48 ? 0 : i < 56 ? 16 : 0;
    if (shapes[i] != expected) fail("ldtilecfg: not eight tiles of 16 rows of 64 bytes");
  }
  std::memset(tiles, 0, sizeof(tiles));
  is_configured = true;
  ++configurations;
}

void multiply(float* sums, const uint32_t* a, const uint32_t* b) {
  for (int row = 0; row < 16; ++row)
    for (int i = 0; i < 16; ++i)
      for (int column = 0; column < 16; ++column) {
        const uint32_t x = a[row * 16 + i], y = b[i * 16 + column];
        float& sum = sums[row * 16 + column];
        sum += bits_as<float>(x << 16) * bits_as<float>(y << 16);
        sum += bits_as<float>(x & 0xffff0000u) * bits_as<float>(y & 0xffff0000u);
      }
  ++products;
}

// Intel's Software Developer's Manual, volume 2: VEX.128 of three bytes, map 0F38, W0.
void emulate(int, siginfo_t*, void* of_signal) {
  auto* context = static_cast<ucontext_t*>(of_signal);
  const auto* code = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  if (code[0] != 0xc4 || (code[1] & 31) != 2 || (code[2] & 0x84) != 0)
    fail("an instruction that is none of AMX");
  const int high_index = (~code[1] >> 6 & 1) * 8, high_base = (~code[1] >> 5 & 1) * 8;
  const int third = ~(code[2] >> 3) & 15, prefix = code[2] & 3, opcode = code[3];
  const int mode = code[4] >> 6, tile = code[4] >> 3 & 7, second = code[4] & 7;
  int length = 5;
  char* address = nullptr;
  int64_t stride = 0;
  if (mode != 3) {
    int base = second;
    if (second == 4) {
      const int index = (code[5] >> 3 & 7) + high_index;
      base = code[5] & 7;
      length = 6;
      if (index != 4) stride = register_of(context, index) << (code[5] >> 6);
    }
    if (mode == 0 && base == 5) fail("an address that is not decoded here");
    address = reinterpret_cast<char*>(register_of(context, base + high_base));
    int32_t offset = 0;
    if (mode == 1) offset = static_cast<int8_t>(code[length]), length += 1;
    if (mode == 2) std::memcpy(&offset, code + length, 4), length += 4;
    address += offset;
  }
  enum { NONE = 0, F3 = 2, F2 = 3 };
  if (opcode == 0x49 && prefix == NONE && mode != 3) {
    configure(reinterpret_cast<const uint8_t*>(address));
  } else if (!is_configured) {
    fail("tiles are used that are not configured");
  } else if (opcode == 0x49 && prefix == NONE && code[4] == 0xc0) {
    is_configured = false;
  } else if (opcode == 0x49 && prefix == F2 && mode == 3) {
    std::memset(tiles[tile], 0, sizeof(tiles[tile]));
  } else if (opcode == 0x4b && prefix == F2 && second == 4) {
    for (int row = 0; row < 16; ++row) std::memcpy(tiles[tile][row], address + row * stride, 64);
  } else if (opcode == 0x4b && prefix == F3 && second == 4) {
    for (int row = 0; row < 16; ++row) std::memcpy(address + row * stride, tiles[tile][row], 64);
  } else if (opcode == 0x5c && prefix == F3 && mode == 3) {
    multiply(reinterpret_cast<float*>(tiles[tile]), tiles[second][0], tiles[third][0]);
  } else {
    fail("an instruction that is not decoded here");
  }
  context->uc_mcontext.gregs[REG_RIP] += length;
}

std::mt19937 random_bits(1);

std::vector<bfloat16> numbers(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<bfloat16> made(count);
  for (bfloat16& number : made) number = Number<bfloat16>::narrow(normal(random_bits));
  return made;
}

// What one thread does for the whole of a convolution, with these tiles.
template <typename Tiles>
std::vector<bfloat16> convolve(const Problem& problem, const Data<bfloat16>& given) {
  std::vector<bfloat16> out(problem.pixels() * problem.K);
  Data<bfloat16> data = given;
  data.out = out.data();
  const Tiled tiled(problem, 1, false);
  std::vector<int64_t> offsets(tiled.parts);
  for (int64_t part = 0; part < tiled.parts; ++part)
    offsets[part] = tiled.offset(problem, part / problem.S, part % problem.S);
  std::vector<float> sums(STRIP * COLUMNS);
  std::vector<const Pair*> pointers(STRIP);
  std::vector<bfloat16> operand(tiled.units * tiled.unit_size() + STRIP * tiled.channels);
  baseline::convolve_by_tiles<Tiles>(problem, data, tiled, {0, tiled.units}, {0, problem.panels()},
                                     offsets.data(), sums.data(), operand.data(), pointers.data());
  return out;
}

void compare(int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t side, int64_t stride,
             int64_t padding) {
  Problem problem{N, C, H, W, K};
  problem.R = problem.S = side;
  problem.stride_h = problem.stride_w = stride;
  problem.padding_h = problem.padding_w = padding;
  problem.dilation_h = problem.dilation_w = 1;
  problem.P = (H + 2 * padding - side) / stride + 1;
  problem.Q = (W + 2 * padding - side) / stride + 1;
  problem.act = Act::RELU;
  problem.x_stride_n = H * W * C, problem.x_stride_c = 1;
  problem.x_stride_h = W * C, problem.x_stride_w = C;
  problem.out_stride = K;
  problem.pairs = problem.tiles = problem.pairs_weights = true;
  const auto x = numbers(N * H * W * C),
             weight = numbers(2 * problem.panels() * problem.panel_size());
  const std::vector<float> shift(problem.panels() * PANEL, 0.5f);
  Data<bfloat16> data{};
  data.x = x.data();
  data.weight = reinterpret_cast<const float*>(weight.data());
  data.shift = shift.data();
  const auto expected = convolve<PlainTiles>(problem, data);
  const long before = products;
  const auto found = convolve<AmxTiles>(problem, data);
  if (is_configured) fail("tiles are left configured");
  if (products == before) fail("no product was of tiles");
  if (std::memcmp(expected.data(), found.data(), found.size() * sizeof(bfloat16)) != 0)
    fail("the products differ");
}

}  // namespace

int main() {
  struct sigaction action{};
  action.sa_sigaction = emulate;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
  compare(2, 64, 7, 9, 48, 1, 1, 0);    // x as it lies, and its last strip copied
  compare(2, 40, 7, 9, 33, 1, 1, 0);    // gathered
  compare(1, 3, 20, 21, 64, 7, 2, 3);   // few channels
  compare(2, 48, 9, 10, 80, 3, 1, 1);   // a band
  compare(2, 32, 11, 10, 16, 3, 2, 1);  // in planes
  std::printf("%ld products of tiles in %ld configurations\n", products, configurations);
}
