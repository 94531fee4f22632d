// The kernel of conv_bn_act. CUDA only, no torch header.
#pragma once

#include "common/cuda_launch.cuh"
#include "common/mma.cuh"
#include "conv_bn_act/halo.h"

namespace cvkernels::conv_bn_act {

// Where a patch lies: its image, and the first of its outputs there.
struct Patch {
  int n, h, w;

  static __device__ Patch of(const Halo& problem, int64_t number) {
    const unsigned of_image = problem.patches_of_image(), columns = problem.patches_w();
    const unsigned n = static_cast<unsigned>(number) / of_image;
    const unsigned rest = static_cast<unsigned>(number) - n * of_image, row = rest / columns;
    return {static_cast<int>(n), static_cast<int>(row) * problem.tile_h(),
            static_cast<int>(rest - row * columns) * problem.tile_w()};
  }

  __device__ void advance(const Halo& problem) {
    if ((w += problem.tile_w()) < problem.W) return;
    w = 0;
    if ((h += problem.tile_h()) < problem.H) return;
    h = 0;
    ++n;
  }
};

// A strip in its tile.
struct Strip {
  int patch, h, w;  // of its first output in the patch

  static __device__ Strip of(const Halo& problem, int number) {
    const int column = number % problem.strips_w, row = number / problem.strips_w;
    return {row / problem.strips_h, row % problem.strips_h * problem.rows, column * STRIP};
  }
};

// The output channel that column `column` of a warp's products computes: the columns of one lane,
// two of every eight, are neighbouring channels, so that it stores them together.
template <int COLUMNS>
CVK_HOST_DEVICE int channel_of(int column) {
  const int tile = column / 8, lane = column % 8 / 2;
  return (lane * COLUMNS + tile) * 2 + column % 2;
}

// Asks for the weights of a chunk's channels, of [9, octets, columns] units. Eight neighbouring
// lanes write eight neighbouring units, and so to all banks; each reads 64 bytes together with
// three others.
template <typename T, int COLUMNS>
__device__ void load_weights(const Halo& problem, const T* weight_ptr, Shared to, int chunk) {
  constexpr int OF_WARP = 8 * COLUMNS;
  const int columns = problem.all_columns(), octets = 2 * problem.all_slices();
  const int first = chunk * problem.octets(), left = octets - first;
  const int chunk_octets = problem.octets() < left ? problem.octets() : left;
  const int groups = (chunk_octets + 3) / 4, blocks = columns / 8, lane = threadIdx.x % 32;
  int block = threadIdx.x / 32, group = 0, tap = 0;
  while (true) {
    for (; block >= blocks; block -= blocks)
      if (++group == groups) group = 0, ++tap;
    if (tap >= 9) break;
    const int octet = first + group * 4 + lane / 8, c = octet * OCTET;
    const int column = block * 8 + lane % 8;
    const int k = column / OF_WARP * OF_WARP + channel_of<COLUMNS>(column % OF_WARP);
    const bool reads = k < problem.K && c < problem.C;
    const T* from = weight_ptr + (k * 9 + tap) * problem.C + c;
    if (octet - first < chunk_octets)
      copy_async(to + ((tap * octets + octet) * columns + column) * 16, reads ? from : weight_ptr,
                 reads);
    block += HALO_WARPS;
  }
}

// How a thread goes through the units that it copies of each stage: from its first pixel on, in
// steps of as many pixels as the block copies at once.
struct Walk {
  int octet, unit, unit_step;
  int row, column, row_step, column_step;

  static __device__ Walk of(const Halo& problem) {
    const int octets = problem.octets(), unit = threadIdx.x / octets;
    const int step = HALO_THREADS / octets, patch_w = problem.patch_w();
    return {static_cast<int>(threadIdx.x) % octets,
            unit,
            step,
            unit / patch_w,
            unit % patch_w,
            step / patch_w,
            step % patch_w};
  }
};

// Asks for a chunk of a tile's channels, as [octets, plane] units; zeros outside of the image.
template <typename T>
__device__ __forceinline__ void load_patches(const Halo& problem, Walk walk, const T* x_ptr,
                                             Shared to, int64_t tile, int chunk) {
  const int c = (chunk * problem.octets() + walk.octet) * OCTET;
  const int patch_w = problem.patch_w(), patch_h = problem.tile_h() + 2;
  const int units = problem.patches * problem.patch_pixels(), step_bytes = walk.unit_step * 16;
  const int stride_h = problem.x_stride_h, stride_w = problem.x_stride_w;
  to += (walk.octet * problem.plane_units() + walk.unit) * 16;
  Patch patch = Patch::of(problem, tile * problem.patches);
  const T* image = x_ptr + patch.n * problem.x_stride_n + c;
  unsigned H = c < problem.C && patch.n < problem.N ? problem.H : 0;
  for (int unit = walk.unit; unit < units; unit += walk.unit_step) {
    if (walk.row >= patch_h) {
      do {
        patch.advance(problem);
        walk.row -= patch_h;
      } while (walk.row >= patch_h);
      image = x_ptr + patch.n * problem.x_stride_n + c;
      H = c < problem.C && patch.n < problem.N ? problem.H : 0;
    }
    const int h = patch.h + walk.row - 1, w = patch.w + walk.column - 1;
    const bool reads = static_cast<unsigned>(h) < H && static_cast<unsigned>(w) < problem.W;
    const T* from = image + static_cast<int64_t>(h) * stride_h + static_cast<int64_t>(w) * stride_w;
    copy_async(to, reads ? from : x_ptr, reads);
    to += step_bytes;
    walk.row += walk.row_step, walk.column += walk.column_step;
    if (walk.column >= patch_w) walk.column -= patch_w, ++walk.row;
  }
}

__device__ __forceinline__ void wait_for_all_but(int pending) {
  if (pending == 0)
    copies_wait<0>();
  else if (pending == 1)
    copies_wait<1>();
  else
    copies_wait<2>();
}

// sums += the products of one slice of 16 channels. The sixteen rows of a product are a row of both
// strips, whose eight pixels are eight neighbouring units of shared memory at every tap, and so in
// all banks; likewise the eight columns of weights. A row of x is loaded once for its three rows of
// taps, since it has the same place in the products of three rows of outputs.
template <typename T, int ROWS, int COLUMNS>
__device__ __forceinline__ void multiply_slice(float (&sums)[ROWS][COLUMNS][4], Shared x,
                                               int row_bytes, Shared weight, int tap_bytes) {
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    uint32_t b[3][COLUMNS / 2][4];
#pragma unroll
    for (int r = 0; r < 3; ++r)
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; ++i)
        load_matrices(b[r][i], weight + (r * 3 + s) * tap_bytes + i * 16 * 16);
#pragma unroll
    for (int row = 0; row < ROWS + 2; ++row) {
      uint32_t a[4];
      load_matrices(a, x + row * row_bytes + s * 16);
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        if (row - r < 0 || row - r >= ROWS) continue;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i)
          multiply_add<T>(sums[row - r][i], a, b[r][i / 2][i % 2 * 2], b[r][i / 2][i % 2 * 2 + 1]);
      }
    }
  }
}

// Adds up the sums of the warps that share outputs, in those of part 0. `memory` is a stage that
// all warps have multiplied; between steps it is read and written by turns.
template <int ROWS, int COLUMNS>
__device__ void add_parts(float (&sums)[ROWS][COLUMNS][4], float* memory, int part, int parts,
                          int others, int number) {
  constexpr int COUNT = ROWS * COLUMNS * 4;
  for (int half = parts / 2; half > 0; half /= 2) {
    __syncthreads();
    float* at = memory + (part % half * others + number) * COUNT * 32 + threadIdx.x % 32;
    if (part >= half && part < 2 * half)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) at[i * 32] = sums[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4];
    __syncthreads();
    if (part < half)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) sums[i / 4 / COLUMNS][i / 4 % COLUMNS][i % 4] += at[i * 32];
  }
}

// Norm and activation of two neighbouring channels, side by side.
template <typename T>
__device__ __forceinline__ uint32_t finish(const float* sums, const float* scale,
                                           const float* shift, Act act) {
  T results[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float y = sums[i] * scale[i] + shift[i];
    if (act == Act::SILU) {
      y *= sigmoid(y);
    } else if (act != Act::NONE) {
      y = y < 0.0f ? 0.0f : y;
      y = act == Act::RELU6 && y > 6.0f ? 6.0f : y;
    }
    results[i] = Number<T>::narrow(y);
  }
  uint32_t packed;
  memcpy(&packed, results, sizeof(packed));
  return packed;
}

// Stores a warp's outputs, 16 bytes at a time: with four columns, each lane has eight channels of
// both pixels, with two, four of them, and gives the next lane those of one pixel for its own.
template <typename T, int ROWS, int COLUMNS>
__device__ void store_outputs(const Halo& problem, const float (&sums)[ROWS][COLUMNS][4],
                              T* out_ptr, const float* scale, const float* shift, int64_t tile,
                              int pair, int first) {
  static_assert(COLUMNS == 2 || COLUMNS == 4);
  const int lane = threadIdx.x % 32, own = first + lane % 4 * 2 * COLUMNS;
  const int64_t out_stride_h = problem.out_stride_h;
  const bool odd = lane % 2 != 0;
  T* at[2];
  int rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Strip strip = Strip::of(problem, 2 * pair + i);
    const Patch patch = Patch::of(problem, tile * problem.patches + strip.patch);
    const int h = patch.h + strip.h, w = patch.w + strip.w + lane / 4;
    const int k = COLUMNS == 4 ? own : first + lane % 4 / 2 * 8;
    const bool inside = patch.n < problem.N && w < problem.W && k < problem.K;
    rows[i] = inside ? problem.H - h : 0;
    at[i] = out_ptr + patch.n * problem.out_stride_n + h * out_stride_h +
            static_cast<int64_t>(w) * problem.out_stride_w + k;
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    uint32_t packed[2][COLUMNS];
#pragma unroll
    for (int i = 0; i < 2 * COLUMNS; ++i)
      packed[i % 2][i / 2] = finish<T>(&sums[row][i / 2][i % 2 * 2], scale + own + i / 2 * 2,
                                       shift + own + i / 2 * 2, problem.act);
    if constexpr (COLUMNS == 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (row < rows[i])
          *reinterpret_cast<Pack*>(at[i] + row * out_stride_h) =
              Pack{packed[i][0], packed[i][1], packed[i][2], packed[i][3]};
    } else {
      const uint32_t x = from_neighbour(odd ? packed[0][0] : packed[1][0]);
      const uint32_t y = from_neighbour(odd ? packed[0][1] : packed[1][1]);
      const Pack pack{odd ? x : packed[0][0], odd ? y : packed[0][1], odd ? packed[1][0] : x,
                      odd ? packed[1][1] : y};
      if (row < (odd ? rows[1] : rows[0]))
        *reinterpret_cast<Pack*>((odd ? at[1] : at[0]) + row * out_stride_h) = pack;
    }
  }
}

// out = act(conv3x3(x) * scale + shift), padded by one pixel. A block keeps all weights, and goes
// through tiles of the outputs in steps of a chunk of their channels; while one chunk is
// multiplied, the next ones are copied. Each pixel of x is read once for all nine taps: L2 gives a
// tile's patches, borders included, and a block's weights, nothing else.
template <typename T, int ROWS, int COLUMNS>
__global__ void __launch_bounds__(HALO_THREADS, 1)
    conv_bn_act_halo_kernel(const T* __restrict__ x_ptr,       // [N, C, H, W]
                            const T* __restrict__ weight_ptr,  // [K, 3, 3, C]
                            T* __restrict__ out_ptr,           // [N, K, H, W]
                            Halo problem) {
  char* memory = dynamic_shared();
  const int stage_bytes = problem.stage_units() * 16, columns = problem.all_columns();
  char* stages = memory + problem.weight_units() * 16;
  float* scale = reinterpret_cast<float*>(stages + problem.stages * stage_bytes);
  float* shift = scale + columns;
  const Shared weights_at = shared_place(memory), stages_at = shared_place(stages);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % problem.warps_n, number = warp % (HALO_WARPS / problem.warps_c);
  const int pair = number / problem.warps_n, part = warp / (HALO_WARPS / problem.warps_c);

  const Walk walk = Walk::of(problem);
  const int chunks = problem.chunks(), tile_step = gridDim.x;
  const int64_t tiles = problem.tiles();
  int64_t next_tile = blockIdx.x;
  int next_chunk = 0, next_stage = 0;
  const auto load_next = [&] {
    if (next_tile == blockIdx.x)
      load_weights<T, COLUMNS>(problem, weight_ptr, weights_at, next_chunk);
    if (next_tile < tiles)
      load_patches(problem, walk, x_ptr, stages_at + next_stage * stage_bytes, next_tile,
                   next_chunk);
    copies_commit();
    next_stage = next_stage + 1 == problem.stages ? 0 : next_stage + 1;
    if (++next_chunk == chunks) next_chunk = 0, next_tile += tile_step;
  };
  for (int i = 0; i < problem.stages - 1; ++i) load_next();

  for (int k = threadIdx.x; k < columns; k += HALO_THREADS) {
    Affine<float> affine{0.0f, 0.0f};
    if (k < problem.K) affine = affine_of<T>(problem.bn, k);
    scale[k] = affine.scale;
    shift[k] = affine.shift;
    if (k < problem.K) shift[k] += problem.bias.template at<T>(k, 0.0f) * affine.scale;
  }

  // What a lane loads rows of: the strip of its matrix's pixels, and the octet of its channels.
  const Strip strip = Strip::of(problem, 2 * pair + lane / 8 % 2);
  const int plane_bytes = problem.plane_units() * 16, row_bytes = problem.patch_w() * 16;
  const int x_lane =
      (strip.patch * problem.patch_pixels() + strip.h * problem.patch_w() + strip.w + lane % 8) *
          16 +
      lane / 16 * plane_bytes;
  const int octet_bytes = columns * 16, tap_bytes = problem.tap_units() * 16;
  const Shared weight_lane = weights_at + lane / 8 % 2 * octet_bytes +
                             (warp_n * COLUMNS * 8 + lane / 16 * 8 + lane % 8) * 16;

  // Of the two warps of each quarter of a multiprocessor one multiplies while the other copies, if
  // more stages than this copy are on their way.
  const bool copies_first = warp < HALO_WARPS / 2 || problem.stages == 2;
  int stage = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += tile_step) {
    float sums[ROWS][COLUMNS][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for_all_but(problem.stages - 2);
      __syncthreads();
      const int first = chunk * problem.slices, left = problem.all_slices() - first;
      const int last = problem.slices < left ? problem.slices : left;
      const int x_at = stage * stage_bytes + x_lane;
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        if (copies_first == (turn == 0)) {
          load_next();
          continue;
        }
        for (int slice = part; slice < last; slice += problem.warps_c)
          multiply_slice<T>(sums, stages_at + x_at + slice * 2 * plane_bytes, row_bytes,
                            weight_lane + (first + slice) * 2 * octet_bytes, tap_bytes);
      }
      if (chunk + 1 < chunks) stage = stage + 1 == problem.stages ? 0 : stage + 1;
    }
    add_parts(sums, reinterpret_cast<float*>(stages + stage * stage_bytes), part, problem.warps_c,
              problem.pairs() * problem.warps_n, number);
    stage = stage + 1 == problem.stages ? 0 : stage + 1;
    if (part == 0)
      store_outputs<T>(problem, sums, out_ptr, scale, shift, tile, pair, warp_n * COLUMNS * 8);
  }
}

}  // namespace cvkernels::conv_bn_act
