// The kernels of batch_norm_act. CUDA only. Every pass reads and writes each element of its maps
// once; the statistics read a few pixels more, the same for all blocks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "batch_norm_act/pixels.cuh"

namespace cvkernels::batch_norm_act {

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
__global__ void __launch_bounds__(THREADS, 3)
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

template <typename T>
__global__ void __launch_bounds__(FINISH_CHANNELS* FINISH_ROWS)
    batch_norm_act_statistics_finish_kernel(const T* x_ptr, const float* partial_ptr, int64_t parts,
                                            Matrix x, int64_t share, StatisticsOut out) {
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
  out.put<T>(c, pivot[0] + off, var < 0 ? 0 : var, double(x.pixels));
}

// out = act((x - mean) * scale + bias), with the residual added before act where ADDS.
template <typename T, int LANES, bool ADDS, typename Activation>
__global__ void __launch_bounds__(THREADS)
    batch_norm_act_apply_kernel(const T* x_ptr,         // [pixels, C]
                                const T* residual_ptr,  // [pixels, C]
                                T* out_ptr,             // [pixels, C], may be x or the residual
                                Matrix x, int64_t share, int64_t residual_stride,
                                int64_t out_stride, BatchNorm bn, Activation activation) {
  const Place place = Place::of<LANES>(x.pixels, x.C, share);
  Lanes<float, LANES> vectors[NORM_VECTORS];
  share_vectors(place, x.C, vectors,
                [&](int64_t c, float* values) { norm_vectors<T>(bn, c, values); });
  if (!place.inside) return;
  place.over_pixels<ADDS ? PIXELS_OF_TWO : PIXELS>([&]<int COUNT>(int64_t p) {
    Lanes<T, LANES> values[COUNT];
    [[maybe_unused]] Lanes<T, LANES> residuals[COUNT];
    load_pixels(values, x_ptr + p * x.stride + place.c, place.rows * x.stride);
    if constexpr (ADDS)
      load_pixels(residuals, residual_ptr + p * residual_stride + place.c,
                  place.rows * residual_stride);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
#pragma unroll
      for (int i = 0; i < LANES; ++i) {
        float z = norm_at(vectors, i)(Number<T>::widen(values[k].at[i]));
        if constexpr (ADDS) z += Number<T>::widen(residuals[k].at[i]);
        values[k].at[i] = Number<T>::narrow(activation(z));
      }
      store<T, LANES>(out_ptr + (p + k * place.rows) * out_stride + place.c, values[k]);
    }
  });
}

// What a pass that sums dy also does with it: nothing,
struct Alone {
  template <int LANES, int COUNT>
  struct Pixels {
    __device__ Pixels(Alone, int64_t, int, int64_t) {}
    __device__ float z(int, int, float normalised) const { return normalised; }
    __device__ void take(int, int, float, float) {}
    __device__ void put(int) {}
  };
};

// total += dy * scale,
struct IntoTotal {
  float* ptr;
  int64_t stride;

  template <int LANES, int COUNT>
  struct Pixels {
    float* to;
    int64_t step;
    Lanes<float, LANES> values[COUNT];

    __device__ Pixels(const IntoTotal& total, int64_t p, int rows, int64_t c)
        : to(total.ptr + p * total.stride + c), step(rows * total.stride) {
      load_pixels(values, to, step);
    }
    __device__ float z(int, int, float normalised) const { return normalised; }
    __device__ void take(int k, int i, float dy, float scale) { values[k].at[i] += dy * scale; }
    __device__ void put(int k) { store<float, LANES>(to + k * step, values[k]); }
  };
};

// or grad_residual = dy, which goes by what the ReLU behind the sum with a residual gave.
template <typename T>
struct OfOutput {
  const T* output_ptr;
  T* grad_residual_ptr;
  int64_t output_stride, grad_residual_stride;

  template <int LANES, int COUNT>
  struct Pixels {
    T* to;
    int64_t step;
    Lanes<T, LANES> values[COUNT];

    __device__ Pixels(const OfOutput& maps, int64_t p, int rows, int64_t c)
        : to(maps.grad_residual_ptr + p * maps.grad_residual_stride + c),
          step(rows * maps.grad_residual_stride) {
      load_pixels(values, maps.output_ptr + p * maps.output_stride + c, rows * maps.output_stride);
    }
    __device__ float z(int k, int i, float) const { return Number<T>::widen(values[k].at[i]); }
    __device__ void take(int k, int i, float dy, float) { values[k].at[i] = Number<T>::narrow(dy); }
    __device__ void put(int k) { store<T, LANES>(to + k * step, values[k]); }
  };
};

// Blocks of a multiprocessor: as many as the registers of the work allow without spills. Told of
// none, ptxas saves registers by loading late.
template <typename Activation, typename With = Alone>
constexpr int BLOCKS =
    std::is_same_v<Activation, Silu<float>> || std::is_same_v<With, IntoTotal> ? 2 : 3;

// partial[part, 0, c] = sum of dy, partial[part, 1, c] = sum of dy * (x - mean).
template <typename T, int LANES, typename Activation, typename With>
__global__ void __launch_bounds__(THREADS, (BLOCKS<Activation, With>))
    batch_norm_act_reduce_kernel(const T* grad_ptr,   // [pixels, C]
                                 const T* x_ptr,      // [pixels, C]
                                 float* partial_ptr,  // [gridDim.x, 2, C]
                                 Matrix x, int64_t share, int64_t grad_stride, BatchNorm bn,
                                 Activation activation, With with) {
  const Place place = Place::of<LANES>(x.pixels, x.C, share);
  Lanes<float, LANES> vectors[NORM_VECTORS];
  share_vectors(place, x.C, vectors,
                [&](int64_t c, float* values) { norm_vectors<T>(bn, c, values); });
  Total<LANES> total = {};
  if (place.inside)
    place.over_pixels<PIXELS_OF_TWO>([&]<int COUNT>(int64_t p) {
      Lanes<T, LANES> values[COUNT], grads[COUNT];
      load_pixels(values, x_ptr + p * x.stride + place.c, place.rows * x.stride);
      load_pixels(grads, grad_ptr + p * grad_stride + place.c, place.rows * grad_stride);
      typename With::template Pixels<LANES, COUNT> others(with, p, place.rows, place.c);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
          const Norm<float> norm = norm_at(vectors, i);
          const float value = Number<T>::widen(values[k].at[i]);
          const float z = others.z(k, i, norm(value));
          const float dy = activation.gradient(Number<T>::widen(grads[k].at[i]), z);
          total.first[i] += dy;
          total.second[i] += dy * (value - norm.mean);
          others.take(k, i, dy, norm.scale);
        }
        others.put(k);
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
template <typename T, typename G, int LANES, typename Activation>
__global__ void __launch_bounds__(THREADS, BLOCKS<Activation>)
    batch_norm_act_input_gradient_kernel(const G* grad_ptr,  // [pixels, C]
                                         const T* x_ptr,     // [pixels, C]
                                         T* out_ptr,         // [pixels, C], may be grad or x
                                         Matrix x, int64_t share, int64_t grad_stride,
                                         int64_t out_stride, BatchNorm bn, Activation activation,
                                         const float* slope_ptr, const float* offset_ptr) {
  const Place place = Place::of<LANES>(x.pixels, x.C, share);
  Lanes<float, LANES> vectors[GRADIENT_VECTORS];
  share_vectors(place, x.C, vectors, [&](int64_t c, float* values) {
    norm_vectors<T>(bn, c, values);
    values[SLOPE] = slope_ptr[c], values[OFFSET] = offset_ptr[c];
  });
  if (!place.inside) return;
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
        const float dy = activation.gradient(Number<G>::widen(grads[k].at[i]), norm(value));
        const float spread = (value - norm.mean) * vectors[SLOPE].at[i] + vectors[OFFSET].at[i];
        values[k].at[i] = Number<T>::narrow(dy * norm.scale + spread);
      }
      store<T, LANES>(out_ptr + (p + k * place.rows) * out_stride + place.c, values[k]);
    }
  });
}

}  // namespace cvkernels::batch_norm_act
