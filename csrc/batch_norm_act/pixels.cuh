// How the CUDA kernels of batch_norm_act share out a map, and what their threads sum.
//
// A block has neighbouring packs of channels, at most COLUMNS, and a run of pixels: threads of one
// row hold neighbouring packs, each row takes every rows-th pixel.
#pragma once

#include <cstdint>

#include "batch_norm_act/problem.h"
#include "common/cuda_launch.cuh"
#include "common/number.h"

namespace cvkernels::batch_norm_act {

constexpr int THREADS = 256;
// Most neighbouring packs of one block: 512 bytes of a pixel.
constexpr int COLUMNS = 32;
// Pixels of one thread whose loads are in flight at once, of one map and of two.
constexpr int PIXELS = 4, PIXELS_OF_TWO = 2;
// How a block shares out the channels and the parts whose sums it finishes: a sector of channels,
// so that few of them still make several blocks.
constexpr int FINISH_CHANNELS = 8, FINISH_ROWS = 64;

// Which pixels and channels a thread has.
struct Place {
  int columns, column, rows, row;
  int64_t c, first, last;  // first channel of the pack; pixels of the block
  bool inside;

  // share: pixels of a block, the same for all but the last ones. The host divides: a 64-bit
  // division here is a call of some hundred instructions, around which registers are spilled.
  template <int LANES>
  static __device__ Place of(int64_t pixels, int64_t C, int64_t share) {
    const int64_t packs = C / LANES;
    Place place;
    place.columns = packs < COLUMNS ? static_cast<int>(packs) : COLUMNS;
    place.column = threadIdx.x % place.columns;
    place.rows = THREADS / place.columns;
    place.row = threadIdx.x / place.columns;
    const int64_t pack = int64_t(blockIdx.y) * place.columns + place.column;
    place.c = pack * LANES;
    place.first = blockIdx.x * share;
    place.last = place.first + pixels_of_part(pixels, share, blockIdx.x);
    place.inside = place.row < place.rows && pack < packs;
    return place;
  }

  static __device__ int64_t pixels_of_part(int64_t pixels, int64_t share, int64_t part) {
    const int64_t left = pixels - part * share;
    return left < 0 ? 0 : (left < share ? left : share);
  }

  // Calls body.operator()<COUNT>(p) for this thread's pixels p, p + rows, ..., COUNT together while
  // there are so many.
  template <int COUNT, typename Body>
  __device__ void over_pixels(Body&& body) const {
    int64_t p = first + row;
    for (; p + (COUNT - 1) * rows < last; p += COUNT * rows) body.template operator()<COUNT>(p);
    for (; p < last; p += rows) body.template operator()<1>(p);
  }
};

// LANES neighbouring channels of one pixel, in accesses of 16 bytes.
template <typename T, int LANES>
struct alignas(sizeof(T) * LANES < 16 ? sizeof(T) * LANES : 16) Lanes {
  T at[LANES];
};

template <typename T, int LANES>
__device__ Lanes<T, LANES> load(const T* from) {
  return *reinterpret_cast<const Lanes<T, LANES>*>(from);
}

template <typename T, int LANES>
__device__ void store(T* to, const Lanes<T, LANES>& values) {
  *reinterpret_cast<Lanes<T, LANES>*>(to) = values;
}

template <typename T, int LANES, int COUNT>
__device__ void load_pixels(Lanes<T, LANES> (&values)[COUNT], const T* from, int64_t step) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] = load<T, LANES>(from + i * step);
}

// A thread's part of vectors of the block's channels. Each is computed by one thread and read by
// the rows: every thread of a block has to come here.
template <int VECTORS, int LANES, typename At>
__device__ void share_vectors(const Place& place, int64_t C, Lanes<float, LANES> (&mine)[VECTORS],
                              At&& at) {
  __shared__ Lanes<float, LANES> shared[VECTORS][COLUMNS];
  const int64_t first = int64_t(blockIdx.y) * place.columns * LANES;
  for (int i = threadIdx.x; i < place.columns * LANES && first + i < C; i += THREADS) {
    float values[VECTORS];
    at(first + i, values);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) shared[v][i / LANES].at[i % LANES] = values[v];
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) mine[v] = shared[v][place.column];
}

enum { MEAN, SCALE, BIAS, NORM_VECTORS, SLOPE = NORM_VECTORS, OFFSET, GRADIENT_VECTORS };

template <typename T>
__device__ void norm_vectors(const BatchNorm& bn, int64_t c, float* values) {
  const Norm<float> norm = norm_of<T>(bn, c);
  values[MEAN] = norm.mean, values[SCALE] = norm.scale, values[BIAS] = norm.bias;
}

template <int VECTORS, int LANES>
__device__ Norm<float> norm_at(const Lanes<float, LANES> (&vectors)[VECTORS], int lane) {
  return {vectors[MEAN].at[lane], vectors[SCALE].at[lane], vectors[BIAS].at[lane]};
}

// Two values of each lane, and the number of pixels that they are of. An odd number of words, so
// that neighbouring threads' are in different banks of shared memory.
template <int LANES>
struct Total {
  float first[LANES], second[LANES];
  float count;
};

// The rows' totals in that of the block's first row: add(total, other) in pairs, as a tree. Every
// thread of a block has to come here.
template <int LANES, typename Add>
__device__ void add_rows(const Place& place, Total<LANES>& total, Add&& add) {
  __shared__ Total<LANES> shared[THREADS];
  shared[threadIdx.x] = total;
  for (int rows = place.rows; rows > 1;) {
    const int half = (rows + 1) / 2;
    __syncthreads();
    if (place.row + half < rows) {
      add(total, shared[threadIdx.x + half * place.columns]);
      shared[threadIdx.x] = total;
    }
    rows = half;
  }
}

// out[part, 0, c], out[part, 1, c], by the block's first row.
template <int LANES>
__device__ void put_part(const Place& place, int64_t C, float* partial_ptr,
                         const Total<LANES>& total) {
  if (!place.inside || place.row != 0) return;
  float* out = partial_ptr + int64_t(blockIdx.x) * 2 * C + place.c;
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    out[i] = total.first[i];
    out[C + i] = total.second[i];
  }
}

// Both sums over all parts of what read(part, first, second) gives, by the first row of a block of
// FINISH_CHANNELS x FINISH_ROWS threads.
template <typename Read>
__device__ bool add_parts(int64_t parts, bool inside, double& first, double& second, Read&& read) {
  __shared__ double shared[2][FINISH_ROWS][FINISH_CHANNELS];
  first = second = 0;
  if (inside)
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts; part += FINISH_ROWS) {
      double part_first, part_second;
      read(part, part_first, part_second);
      first += part_first;
      second += part_second;
    }
  for (int rows = FINISH_ROWS; rows > 1; rows /= 2) {
    shared[0][threadIdx.y][threadIdx.x] = first;
    shared[1][threadIdx.y][threadIdx.x] = second;
    __syncthreads();
    if (int(threadIdx.y) < rows / 2) {
      first += shared[0][threadIdx.y + rows / 2][threadIdx.x];
      second += shared[1][threadIdx.y + rows / 2][threadIdx.x];
    }
  }
  return inside && threadIdx.y == 0;
}

}  // namespace cvkernels::batch_norm_act
