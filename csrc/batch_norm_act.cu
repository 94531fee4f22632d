// batch_norm_act's passes on CUDA. Schemas: cvkernels/ops/batch_norm_act/passes.py.
#include "batch_norm_act_call.h"
#include "cuda_pack.h"

namespace cvkernels::batch_norm_act {
namespace {

constexpr int THREADS = 256;
// Most neighbouring packs of one block: 512 bytes of a pixel.
constexpr int COLUMNS = 32;
// Most blocks whose sums are finished together, and how finishing shares them out.
constexpr int64_t PARTS = 512;
constexpr int FINISH_CHANNELS = 32, FINISH_ROWS = 8;

// Who does what in a block: threads of one row hold neighbouring packs of channels, each row takes
// every rows-th pixel of the block's.
struct Place {
  int columns, rows, row;
  int64_t c, first, last;  // first channel of the pack; pixels of the block
  bool inside;

  template <int LANES>
  static __device__ Place of(int64_t pixels, int64_t C) {
    const int64_t packs = C / LANES;
    Place place;
    place.columns = packs < COLUMNS ? static_cast<int>(packs) : COLUMNS;
    place.rows = THREADS / place.columns;
    place.row = threadIdx.x / place.columns;
    const int64_t pack = int64_t(blockIdx.y) * place.columns + threadIdx.x % place.columns;
    const int64_t share = (pixels + gridDim.x - 1) / gridDim.x;
    place.c = pack * LANES;
    place.first = blockIdx.x * share;
    place.last = place.first + share < pixels ? place.first + share : pixels;
    place.inside = place.row < place.rows && pack < packs;
    return place;
  }
};

// LANES neighbouring channels of one pixel, in one access.
template <typename T, int LANES>
struct alignas(sizeof(T) * LANES) Lanes {
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

// The sums of a block's rows, by its first row: each thread's LANES pairs go through shared memory.
template <int LANES>
__device__ void add_over_rows(const Place& place, float (&first)[LANES], float (&second)[LANES]) {
  __shared__ float shared[2][LANES][THREADS];
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    shared[0][i][threadIdx.x] = first[i];
    shared[1][i][threadIdx.x] = second[i];
  }
  __syncthreads();
  if (place.row != 0) return;
  for (int row = 1; row < place.rows; ++row)
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
      first[i] += shared[0][i][row * place.columns + threadIdx.x];
      second[i] += shared[1][i][row * place.columns + threadIdx.x];
    }
}

// partial[part, 0, c] = the sum of x - pivot over the block's pixels, partial[part, 1, c] that of
// its square; the pivot, x's first pixel, keeps the squares from cancelling. Reads x once.
template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS)
    batch_norm_act_statistics_kernel(const T* x_ptr,      // [pixels, C]
                                     float* partial_ptr,  // [gridDim.x, 2, C]
                                     Matrix x) {
  const Place place = Place::of<LANES>(x.pixels, x.C);
  float sum[LANES] = {}, square[LANES] = {};
  if (place.inside) {
    const auto pivot = load<T, LANES>(x_ptr + place.c);
    for (int64_t p = place.first + place.row; p < place.last; p += place.rows) {
      const auto values = load<T, LANES>(x_ptr + p * x.stride + place.c);
#pragma unroll
      for (int i = 0; i < LANES; ++i) {
        const float off = Number<T>::widen(values.at[i]) - Number<T>::widen(pivot.at[i]);
        sum[i] += off;
        square[i] += off * off;
      }
    }
  }
  add_over_rows(place, sum, square);
  if (!place.inside || place.row != 0) return;
  float* out = partial_ptr + (int64_t(blockIdx.x) * 2) * x.C + place.c;
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    out[i] = sum[i];
    out[x.C + i] = square[i];
  }
}

// Both sums over all parts, by the first row of a block of FINISH_CHANNELS x FINISH_ROWS threads.
__device__ bool add_parts(const float* partial_ptr, int64_t parts, int64_t C, int64_t c,
                          double& first, double& second) {
  __shared__ double shared[2][FINISH_ROWS][FINISH_CHANNELS];
  first = second = 0;
  if (c < C)
    for (int64_t part = threadIdx.y; part < parts; part += FINISH_ROWS) {
      first += partial_ptr[(2 * part) * C + c];
      second += partial_ptr[(2 * part + 1) * C + c];
    }
  shared[0][threadIdx.y][threadIdx.x] = first;
  shared[1][threadIdx.y][threadIdx.x] = second;
  __syncthreads();
  if (threadIdx.y != 0 || c >= C) return false;
  for (int row = 1; row < FINISH_ROWS; ++row) {
    first += shared[0][row][threadIdx.x];
    second += shared[1][row][threadIdx.x];
  }
  return true;
}

template <typename T>
__global__ void batch_norm_act_statistics_finish_kernel(const T* x_ptr, const float* partial_ptr,
                                                        int64_t parts, Matrix x, float* mean_ptr,
                                                        float* var_ptr) {
  const int64_t c = int64_t(blockIdx.x) * FINISH_CHANNELS + threadIdx.x;
  double sum, square;
  if (!add_parts(partial_ptr, parts, x.C, c, sum, square)) return;
  const double off = sum / x.pixels, var = square / x.pixels - off * off;
  mean_ptr[c] = static_cast<float>(Number<T>::widen(x_ptr[c]) + off);
  var_ptr[c] = static_cast<float>(var < 0 ? 0 : var);
}

// out = relu((x - mean) * scale + bias). Reads x and writes out: 2 * pixels * C elements.
template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS)
    batch_norm_act_apply_kernel(const T* x_ptr,  // [pixels, C]
                                T* out_ptr,      // [pixels, C]
                                Matrix x, int64_t out_stride, BatchNorm bn, bool relu) {
  const Place place = Place::of<LANES>(x.pixels, x.C);
  if (!place.inside) return;
  const float lowest = Affine<float>::lowest(relu);
  Norm<float> norm[LANES];
#pragma unroll
  for (int i = 0; i < LANES; ++i) norm[i] = norm_of<T>(bn, place.c + i);
#pragma unroll 4
  for (int64_t p = place.first + place.row; p < place.last; p += place.rows) {
    auto values = load<T, LANES>(x_ptr + p * x.stride + place.c);
#pragma unroll
    for (int i = 0; i < LANES; ++i)
      values.at[i] = Number<T>::narrow(at_least(norm[i](Number<T>::widen(values.at[i])), lowest));
    store<T, LANES>(out_ptr + p * out_stride + place.c, values);
  }
}

// partial[part, 0, c] = sum of dy, partial[part, 1, c] = sum of dy * (x - mean); with a total,
// total += dy * scale. Reads grad and x once, reads and writes total once.
template <typename T, int LANES, bool ACCUMULATES>
__global__ void __launch_bounds__(THREADS)
    batch_norm_act_reduce_kernel(const T* grad_ptr,   // [pixels, C]
                                 const T* x_ptr,      // [pixels, C]
                                 float* total_ptr,    // [pixels, C]
                                 float* partial_ptr,  // [gridDim.x, 2, C]
                                 Matrix x, int64_t grad_stride, int64_t total_stride, BatchNorm bn,
                                 bool relu) {
  const Place place = Place::of<LANES>(x.pixels, x.C);
  float sum[LANES] = {}, product[LANES] = {};
  if (place.inside) {
    const float lowest = Affine<float>::lowest(relu);
    Norm<float> norm[LANES];
#pragma unroll
    for (int i = 0; i < LANES; ++i) norm[i] = norm_of<T>(bn, place.c + i);
    for (int64_t p = place.first + place.row; p < place.last; p += place.rows) {
      const auto values = load<T, LANES>(x_ptr + p * x.stride + place.c);
      const auto grads = load<T, LANES>(grad_ptr + p * grad_stride + place.c);
      float* total = total_ptr + p * total_stride + place.c;
#pragma unroll
      for (int i = 0; i < LANES; ++i) {
        const float value = Number<T>::widen(values.at[i]);
        const float dy = relu_gradient(Number<T>::widen(grads.at[i]), norm[i](value), lowest);
        sum[i] += dy;
        product[i] += dy * (value - norm[i].mean);
        if constexpr (ACCUMULATES) total[i] += dy * norm[i].scale;
      }
    }
  }
  add_over_rows(place, sum, product);
  if (!place.inside || place.row != 0) return;
  float* out = partial_ptr + (int64_t(blockIdx.x) * 2) * x.C + place.c;
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    out[i] = sum[i];
    out[x.C + i] = product[i];
  }
}

template <typename T>
__global__ void batch_norm_act_reduce_finish_kernel(const float* partial_ptr, int64_t parts,
                                                    Matrix x, BatchNorm bn, Results results) {
  const int64_t c = int64_t(blockIdx.x) * FINISH_CHANNELS + threadIdx.x;
  double sum, product;
  if (add_parts(partial_ptr, parts, x.C, c, sum, product))
    results.put(c, Reduced<T>::of(bn, c, sum, product, double(x.pixels)));
}

// out = dy * scale + (x - mean) * slope + offset. Reads grad and x, writes out.
template <typename T, typename G, int LANES>
__global__ void __launch_bounds__(THREADS)
    batch_norm_act_input_gradient_kernel(const G* grad_ptr,  // [pixels, C]
                                         const T* x_ptr,     // [pixels, C]
                                         T* out_ptr,         // [pixels, C], may be grad
                                         Matrix x, int64_t grad_stride, int64_t out_stride,
                                         BatchNorm bn, bool relu, const float* slope_ptr,
                                         const float* offset_ptr) {
  const Place place = Place::of<LANES>(x.pixels, x.C);
  if (!place.inside) return;
  const float lowest = Affine<float>::lowest(relu);
  Norm<float> norm[LANES];
  float slope[LANES], offset[LANES];
#pragma unroll
  for (int i = 0; i < LANES; ++i) {
    norm[i] = norm_of<T>(bn, place.c + i);
    slope[i] = slope_ptr[place.c + i];
    offset[i] = offset_ptr[place.c + i];
  }
  for (int64_t p = place.first + place.row; p < place.last; p += place.rows) {
    auto values = load<T, LANES>(x_ptr + p * x.stride + place.c);
    const G* grads = grad_ptr + p * grad_stride + place.c;
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
      const float value = Number<T>::widen(values.at[i]);
      const float dy = relu_gradient(Number<G>::widen(grads[i]), norm[i](value), lowest);
      values.at[i] =
          Number<T>::narrow(dy * norm[i].scale + ((value - norm[i].mean) * slope[i] + offset[i]));
    }
    store<T, LANES>(out_ptr + p * out_stride + place.c, values);
  }
}

// True if each pixel of every map starts on a pack of `lanes` of its elements.
template <typename T>
bool packs(const void* data, int64_t C, int64_t stride, int lanes) {
  return C % lanes == 0 && stride % lanes == 0 &&
         reinterpret_cast<uintptr_t>(data) % (sizeof(T) * lanes) == 0;
}

template <int LANES>
dim3 grid_for(const Matrix& x, int64_t most_parts) {
  const int64_t packed = x.C / LANES;
  const int64_t columns = std::min<int64_t>(packed, COLUMNS);
  const int64_t pixels_at_once = THREADS / columns * 4;
  const int64_t parts = std::min((x.pixels + pixels_at_once - 1) / pixels_at_once, most_parts);
  return dim3(static_cast<unsigned>(std::max<int64_t>(1, parts)),
              static_cast<unsigned>((packed + columns - 1) / columns));
}

// Calls launch.operator()<LANES>() with 16 bytes of T, or with one element.
template <typename T, typename Launch>
void with_lanes(const char* op, const Matrix& x, bool packed, Launch&& launch) {
  constexpr int LANES = sizeof(Pack) / sizeof(T);
  CVK_CHECK(op, x.C <= GRID_Y_MAX * COLUMNS, "x must have at most ", GRID_Y_MAX * COLUMNS,
            " channels, got ", x.C);
  if (packed)
    launch.template operator()<LANES>();
  else
    launch.template operator()<1>();
}

Tensor partial_sums(const Tensor& x, const dim3& grid) {
  return torch::stable::empty({int64_t(grid.x) * 2 * x.size(1)}, ScalarType::Float, std::nullopt,
                              x.device(), std::nullopt, std::nullopt);
}

dim3 finish_grid(int64_t C) {
  return dim3(static_cast<unsigned>((C + FINISH_CHANNELS - 1) / FINISH_CHANNELS));
}

void statistics(const Tensor& x, const Tensor& mean, const Tensor& var) {
  const char* op = "batch_norm_act_statistics";
  CVK_CHECK_CUDA(op, x);
  const Matrix map = matrix_of(op, "x", x);
  float *mean_ptr = static_cast<float*>(result_of(op, "mean", mean, x)),
        *var_ptr = static_cast<float*>(result_of(op, "var", var, x));
  CVK_CHECK(op, map.pixels > 0, "x must have pixels, got ", shape_of(x));
  const DeviceGuard guard(x.get_device_index());
  if (map.C == 0) return;
  const cudaStream_t stream = current_stream(x);
  dispatch_floating(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
    constexpr int WIDE = sizeof(Pack) / sizeof(T);
    with_lanes<T>(op, map, packs<T>(x_ptr, map.C, map.stride, WIDE), [&]<int LANES>() {
      const dim3 grid = grid_for<LANES>(map, PARTS);
      const Tensor partial = partial_sums(x, grid);
      float* partial_ptr = static_cast<float*>(partial.mutable_data_ptr());
      batch_norm_act_statistics_kernel<T, LANES>
          <<<grid, THREADS, 0, stream>>>(x_ptr, partial_ptr, map);
      batch_norm_act_statistics_finish_kernel<T>
          <<<finish_grid(map.C), dim3(FINISH_CHANNELS, FINISH_ROWS), 0, stream>>>(
              x_ptr, partial_ptr, grid.x, map, mean_ptr, var_ptr);
    });
  });
  CVK_CHECK_LAUNCH(op);
}

void apply(const Tensor& x, const Maybe& weight, const Maybe& bias, const Tensor& mean,
           const Tensor& var, double eps, bool relu, const Tensor& out) {
  const char* op = "batch_norm_act_apply";
  CVK_CHECK_CUDA(op, x);
  const Matrix map = matrix_of(op, "x", x), to = matrix_like(op, "out", out, x, false);
  const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, map.C);
  const DeviceGuard guard(x.get_device_index());
  if (x.numel() == 0) return;
  const cudaStream_t stream = current_stream(x);
  dispatch_floating(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
    T* out_ptr = static_cast<T*>(out.mutable_data_ptr());
    constexpr int WIDE = sizeof(Pack) / sizeof(T);
    const bool packed =
        packs<T>(x_ptr, map.C, map.stride, WIDE) && packs<T>(out_ptr, map.C, to.stride, WIDE);
    with_lanes<T>(op, map, packed, [&]<int LANES>() {
      batch_norm_act_apply_kernel<T, LANES><<<grid_for<LANES>(map, 1 << 20), THREADS, 0, stream>>>(
          x_ptr, out_ptr, map, to.stride, bn, relu);
    });
  });
  CVK_CHECK_LAUNCH(op);
}

void reduce(const Tensor& grad, const Tensor& x, const Maybe& weight, const Maybe& bias,
            const Tensor& mean, const Tensor& var, double eps, bool relu, const Maybe& total,
            const Tensor& d_weight, const Tensor& d_bias, const Tensor& slope,
            const Tensor& offset) {
  const char* op = "batch_norm_act_reduce";
  CVK_CHECK_CUDA(op, x);
  const Matrix map = matrix_of(op, "x", x), from = matrix_like(op, "grad", grad, x, false);
  const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, map.C);
  const Results results{result_of(op, "d_weight", d_weight, x), result_of(op, "d_bias", d_bias, x),
                        result_of(op, "slope", slope, x), result_of(op, "offset", offset, x)};
  const int64_t total_stride = total ? matrix_like(op, "total", *total, x, true).stride : 0;
  CVK_CHECK(op, map.pixels > 0, "x must have pixels, got ", shape_of(x));
  const DeviceGuard guard(x.get_device_index());
  if (map.C == 0) return;
  const cudaStream_t stream = current_stream(x);
  dispatch_floating(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T *x_ptr = static_cast<const T*>(x.const_data_ptr()),
            *grad_ptr = static_cast<const T*>(grad.const_data_ptr());
    float* total_ptr = total ? static_cast<float*>(total->mutable_data_ptr()) : nullptr;
    constexpr int WIDE = sizeof(Pack) / sizeof(T);
    const bool packed =
        packs<T>(x_ptr, map.C, map.stride, WIDE) && packs<T>(grad_ptr, map.C, from.stride, WIDE);
    with_lanes<T>(op, map, packed, [&]<int LANES>() {
      const dim3 grid = grid_for<LANES>(map, PARTS);
      const Tensor partial = partial_sums(x, grid);
      float* partial_ptr = static_cast<float*>(partial.mutable_data_ptr());
      if (total_ptr == nullptr)
        batch_norm_act_reduce_kernel<T, LANES, false><<<grid, THREADS, 0, stream>>>(
            grad_ptr, x_ptr, nullptr, partial_ptr, map, from.stride, 0, bn, relu);
      else
        batch_norm_act_reduce_kernel<T, LANES, true><<<grid, THREADS, 0, stream>>>(
            grad_ptr, x_ptr, total_ptr, partial_ptr, map, from.stride, total_stride, bn, relu);
      batch_norm_act_reduce_finish_kernel<T>
          <<<finish_grid(map.C), dim3(FINISH_CHANNELS, FINISH_ROWS), 0, stream>>>(
              partial_ptr, grid.x, map, bn, results);
    });
  });
  CVK_CHECK_LAUNCH(op);
}

void input_gradient(const Tensor& grad, const Tensor& x, const Maybe& weight, const Maybe& bias,
                    const Tensor& mean, const Maybe& var, double eps, bool relu,
                    const Tensor& slope, const Tensor& offset, const Tensor& out) {
  const char* op = "batch_norm_act_input_gradient";
  CVK_CHECK_CUDA(op, x);
  const bool wide = grad.scalar_type() != x.scalar_type();
  const Matrix map = matrix_of(op, "x", x), from = matrix_like(op, "grad", grad, x, wide),
               to = matrix_like(op, "out", out, x, false);
  const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, map.C);
  const float *slope_ptr = static_cast<const float*>(result_of(op, "slope", slope, x)),
              *offset_ptr = static_cast<const float*>(result_of(op, "offset", offset, x));
  const DeviceGuard guard(x.get_device_index());
  if (x.numel() == 0) return;
  const cudaStream_t stream = current_stream(x);
  dispatch_floating(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
    T* out_ptr = static_cast<T*>(out.mutable_data_ptr());
    constexpr int WIDE = sizeof(Pack) / sizeof(T);
    const bool packed =
        packs<T>(x_ptr, map.C, map.stride, WIDE) && packs<T>(out_ptr, map.C, to.stride, WIDE);
    with_lanes<T>(op, map, packed, [&]<int LANES>() {
      const dim3 grid = grid_for<LANES>(map, 1 << 20);
      if (wide)
        batch_norm_act_input_gradient_kernel<T, float, LANES><<<grid, THREADS, 0, stream>>>(
            static_cast<const float*>(grad.const_data_ptr()), x_ptr, out_ptr, map, from.stride,
            to.stride, bn, relu, slope_ptr, offset_ptr);
      else
        batch_norm_act_input_gradient_kernel<T, T, LANES><<<grid, THREADS, 0, stream>>>(
            static_cast<const T*>(grad.const_data_ptr()), x_ptr, out_ptr, map, from.stride,
            to.stride, bn, relu, slope_ptr, offset_ptr);
    });
  });
  CVK_CHECK_LAUNCH(op);
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) {
  library.impl("batch_norm_act_statistics", TORCH_BOX(&statistics));
  library.impl("batch_norm_act_apply", TORCH_BOX(&apply));
  library.impl("batch_norm_act_reduce", TORCH_BOX(&reduce));
  library.impl("batch_norm_act_input_gradient", TORCH_BOX(&input_gradient));
}

}  // namespace
}  // namespace cvkernels::batch_norm_act
