// The kernels of batch_norm_act. CUDA only.
//
// A block has neighbouring packs of channels, at most COLUMNS, and a run of pixels: threads of one
// row hold neighbouring packs, each row takes every rows-th pixel. Every pass reads and writes each
// element of its maps once; the statistics read a few pixels more, the same for all blocks.
#pragma once

#include <cstdint>

#include "batch_norm_act_call.h"
#include "number.h"

namespace cvkernels::batch_norm_act {

constexpr int THREADS = 256;
// Most neighbouring packs of one block: 512 bytes of a pixel.
constexpr int COLUMNS = 32;
// Pixels of one thread whose loads are in flight at once, of one map and of two.
constexpr int PIXELS = 4, PIXELS_OF_TWO = 2;
// How a block shares out the channels and the parts whose sums it finishes.
constexpr int FINISH_CHANNELS = 32, FINISH_ROWS = 32;

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

// With means first and sums of squared distances from them second, so that no large numbers cancel:
// Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
// (1979).
template <int LANES>
__device__ void add_moments(Total<LANES>& total, const Total<LANES>& other) {
  if (other.count == 0) return;
  if (total.count == 0) {  // and no 0 times an infinite square
    total = other;
    return;
  }
  const float count = total.count + other.count;
  const float part = other.count / count, weight = total.count * part;
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    const float apart = other.first[i] - total.first[i];
    total.first[i] += apart * part;
    total.second[i] += other.second[i] + apart * apart * weight;
  }
  total.count = count;
}

template <int LANES>
__device__ void add_sums(Total<LANES>& total, const Total<LANES>& other) {
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    total.first[i] += other.first[i];
    total.second[i] += other.second[i];
  }
}

// About the mean of each channel, from a few pixels: the same for all blocks.
template <typename T, int LANES>
__device__ void pivots(float (&pivot)[LANES], const T* x_ptr, const Matrix& x, int64_t c) {
  constexpr int SAMPLES = 8;
  Lanes<T, LANES> values[SAMPLES];
#pragma unroll
  for (int k = 0; k < SAMPLES; ++k)
    values[k] = load<T, LANES>(x_ptr + x.pixels * k / SAMPLES * x.stride + c);
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    pivot[i] = 0;
#pragma unroll
    for (int k = 0; k < SAMPLES; ++k)
      pivot[i] += Number<T>::widen(values[k].at[i]) * (1.0f / SAMPLES);
  }
}

// partial[part, 0, c] = the mean of x - pivot over the block's pixels, partial[part, 1, c] the sum
// of squared distances from it; the pivot keeps the means small, and so their digits.
template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS)
    batch_norm_act_statistics_kernel(const T* x_ptr,      // [pixels, C]
                                     float* partial_ptr,  // [gridDim.x, 2, C]
                                     Matrix x, int64_t share) {
  const Place place = Place::of<LANES>(x.pixels, x.C, share);
  Total<LANES> total = {};
  if (place.inside) {
    float pivot[LANES];
    pivots<T, LANES>(pivot, x_ptr, x, place.c);
    place.over_pixels<PIXELS>([&]<int COUNT>(int64_t p) {
      Lanes<T, LANES> values[COUNT];
      load_pixels(values, x_ptr + p * x.stride + place.c, place.rows * x.stride);
      Total<LANES> some;
#pragma unroll
      for (int i = 0; i < LANES; ++i) {
        float off[COUNT], sum = 0, square = 0;
#pragma unroll
        for (int k = 0; k < COUNT; ++k)
          sum += off[k] = Number<T>::widen(values[k].at[i]) - pivot[i];
        const float mean = some.first[i] = sum * (1.0f / COUNT);
#pragma unroll
        for (int k = 0; k < COUNT; ++k) square += (off[k] - mean) * (off[k] - mean);
        some.second[i] = square;
      }
      some.count = COUNT;
      add_moments(total, some);
    });
  }
  add_rows(place, total, add_moments<LANES>);
  put_part(place, x.C, partial_ptr, total);
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
  shared[0][threadIdx.y][threadIdx.x] = first;
  shared[1][threadIdx.y][threadIdx.x] = second;
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return false;
  for (int row = 1; row < FINISH_ROWS; ++row) {
    first += shared[0][row][threadIdx.x];
    second += shared[1][row][threadIdx.x];
  }
  return true;
}

template <typename T>
__global__ void __launch_bounds__(FINISH_CHANNELS* FINISH_ROWS)
    batch_norm_act_statistics_finish_kernel(const T* x_ptr, const float* partial_ptr, int64_t parts,
                                            Matrix x, int64_t share, float* mean_ptr,
                                            float* var_ptr) {
  const int64_t c = int64_t(blockIdx.x) * FINISH_CHANNELS + threadIdx.x;
  double sum, square;
  const auto read = [&](int64_t part, double& first, double& second) {
    const double pixels = Place::pixels_of_part(x.pixels, share, part);
    const double mean = partial_ptr[2 * part * x.C + c];
    first = pixels * mean;
    second = partial_ptr[(2 * part + 1) * x.C + c] + pixels * mean * mean;
  };
  if (!add_parts(parts, c < x.C, sum, square, read)) return;
  const double off = sum / x.pixels, var = square / x.pixels - off * off;
  float pivot[1];
  pivots<T, 1>(pivot, x_ptr, x, c);
  mean_ptr[c] = static_cast<float>(pivot[0] + off);
  var_ptr[c] = static_cast<float>(var < 0 ? 0 : var);
}

// out = relu((x - mean) * scale + bias).
template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS)
    batch_norm_act_apply_kernel(const T* x_ptr,  // [pixels, C]
                                T* out_ptr,      // [pixels, C], may be x
                                Matrix x, int64_t share, int64_t out_stride, BatchNorm bn,
                                bool relu) {
  const Place place = Place::of<LANES>(x.pixels, x.C, share);
  Lanes<float, LANES> vectors[NORM_VECTORS];
  share_vectors(place, x.C, vectors,
                [&](int64_t c, float* values) { norm_vectors<T>(bn, c, values); });
  if (!place.inside) return;
  const float lowest = Affine<float>::lowest(relu);
  place.over_pixels<PIXELS>([&]<int COUNT>(int64_t p) {
    Lanes<T, LANES> values[COUNT];
    load_pixels(values, x_ptr + p * x.stride + place.c, place.rows * x.stride);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
#pragma unroll
      for (int i = 0; i < LANES; ++i)
        values[k].at[i] = Number<T>::narrow(
            at_least(norm_at(vectors, i)(Number<T>::widen(values[k].at[i])), lowest));
      store<T, LANES>(out_ptr + (p + k * place.rows) * out_stride + place.c, values[k]);
    }
  });
}

// partial[part, 0, c] = sum of dy, partial[part, 1, c] = sum of dy * (x - mean); with a total,
// total += dy * scale.
template <typename T, int LANES, bool ACCUMULATES>
__global__ void __launch_bounds__(THREADS, 2)
    batch_norm_act_reduce_kernel(const T* grad_ptr,   // [pixels, C]
                                 const T* x_ptr,      // [pixels, C]
                                 float* total_ptr,    // [pixels, C]
                                 float* partial_ptr,  // [gridDim.x, 2, C]
                                 Matrix x, int64_t share, int64_t grad_stride, int64_t total_stride,
                                 BatchNorm bn, bool relu) {
  const Place place = Place::of<LANES>(x.pixels, x.C, share);
  Lanes<float, LANES> vectors[NORM_VECTORS];
  share_vectors(place, x.C, vectors,
                [&](int64_t c, float* values) { norm_vectors<T>(bn, c, values); });
  Total<LANES> total = {};
  const float lowest = Affine<float>::lowest(relu);
  if (place.inside)
    place.over_pixels<PIXELS_OF_TWO>([&]<int COUNT>(int64_t p) {
      Lanes<T, LANES> values[COUNT], grads[COUNT];
      [[maybe_unused]] Lanes<float, LANES> totals[COUNT];
      load_pixels(values, x_ptr + p * x.stride + place.c, place.rows * x.stride);
      load_pixels(grads, grad_ptr + p * grad_stride + place.c, place.rows * grad_stride);
      [[maybe_unused]] float* to = total_ptr + p * total_stride + place.c;
      if constexpr (ACCUMULATES) load_pixels(totals, to, place.rows * total_stride);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
          const Norm<float> norm = norm_at(vectors, i);
          const float value = Number<T>::widen(values[k].at[i]);
          const float dy = relu_gradient(Number<T>::widen(grads[k].at[i]), norm(value), lowest);
          total.first[i] += dy;
          total.second[i] += dy * (value - norm.mean);
          if constexpr (ACCUMULATES) totals[k].at[i] += dy * norm.scale;
        }
        if constexpr (ACCUMULATES)
          store<float, LANES>(to + k * place.rows * total_stride, totals[k]);
      }
    });
  add_rows(place, total, add_sums<LANES>);
  put_part(place, x.C, partial_ptr, total);
}

template <typename T>
__global__ void __launch_bounds__(FINISH_CHANNELS* FINISH_ROWS)
    batch_norm_act_reduce_finish_kernel(const float* partial_ptr, int64_t parts, Matrix x,
                                        BatchNorm bn, Results results) {
  const int64_t c = int64_t(blockIdx.x) * FINISH_CHANNELS + threadIdx.x;
  double sum, product;
  const auto read = [&](int64_t part, double& first, double& second) {
    first = partial_ptr[2 * part * x.C + c];
    second = partial_ptr[(2 * part + 1) * x.C + c];
  };
  if (add_parts(parts, c < x.C, sum, product, read))
    results.put(c, Reduced<T>::of(bn, c, sum, product, double(x.pixels)));
}

// out = dy * scale + (x - mean) * slope + offset.
template <typename T, typename G, int LANES>
__global__ void __launch_bounds__(THREADS)
    batch_norm_act_input_gradient_kernel(const G* grad_ptr,  // [pixels, C]
                                         const T* x_ptr,     // [pixels, C]
                                         T* out_ptr,         // [pixels, C], may be grad or x
                                         Matrix x, int64_t share, int64_t grad_stride,
                                         int64_t out_stride, BatchNorm bn, bool relu,
                                         const float* slope_ptr, const float* offset_ptr) {
  const Place place = Place::of<LANES>(x.pixels, x.C, share);
  Lanes<float, LANES> vectors[GRADIENT_VECTORS];
  share_vectors(place, x.C, vectors, [&](int64_t c, float* values) {
    norm_vectors<T>(bn, c, values);
    values[SLOPE] = slope_ptr[c], values[OFFSET] = offset_ptr[c];
  });
  if (!place.inside) return;
  const float lowest = Affine<float>::lowest(relu);
  place.over_pixels<PIXELS_OF_TWO>([&]<int COUNT>(int64_t p) {
    Lanes<T, LANES> values[COUNT];
    Lanes<G, LANES> grads[COUNT];
    load_pixels(values, x_ptr + p * x.stride + place.c, place.rows * x.stride);
    load_pixels(grads, grad_ptr + p * grad_stride + place.c, place.rows * grad_stride);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
#pragma unroll
      for (int i = 0; i < LANES; ++i) {
        const Norm<float> norm = norm_at(vectors, i);
        const float value = Number<T>::widen(values[k].at[i]);
        const float dy = relu_gradient(Number<G>::widen(grads[k].at[i]), norm(value), lowest);
        const float spread = (value - norm.mean) * vectors[SLOPE].at[i] + vectors[OFFSET].at[i];
        values[k].at[i] = Number<T>::narrow(dy * norm.scale + spread);
      }
      store<T, LANES>(out_ptr + (p + k * place.rows) * out_stride + place.c, values[k]);
    }
  });
}

}  // namespace cvkernels::batch_norm_act
