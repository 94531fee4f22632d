// batch_norm_act's passes on CUDA.
#include "batch_norm_act_kernels.h"
#include "batch_norm_act_ops.h"
#include "cuda_pack.h"

namespace cvkernels::batch_norm_act {
namespace {

// Most blocks whose sums are finished together: four for each multiprocessor of an H100.
constexpr int64_t PARTS = 528;
// Pixels of one thread in the passes that sum nothing, enough to pay for the vectors it reads.
constexpr int64_t STREAMED = 2 * PIXELS;

// True if every pixel of a map starts where LANES of its channels are loaded together.
template <typename T, int LANES>
bool packs(const void* data, int64_t C, int64_t stride) {
  constexpr int64_t ALIGNED = alignof(Lanes<T, LANES>);
  return C % LANES == 0 && stride * sizeof(T) % ALIGNED == 0 &&
         reinterpret_cast<uintptr_t>(data) % ALIGNED == 0;
}

// The blocks of a pass, grid.x of them along the pixels, and the pixels that each of those has.
struct Blocks {
  dim3 grid;
  int64_t share;
};

// Blocks whose threads have `pixels` pixels each, or more where that were over `most_parts`.
template <int LANES>
Blocks blocks_for(const Matrix& x, int64_t pixels, int64_t most_parts) {
  const int64_t packed = x.C / LANES;
  const int64_t columns = std::min<int64_t>(packed, COLUMNS);
  const int64_t of_block = THREADS / columns * pixels;
  const int64_t parts =
      std::max<int64_t>(1, std::min((x.pixels + of_block - 1) / of_block, most_parts));
  return {
      dim3(static_cast<unsigned>(parts), static_cast<unsigned>((packed + columns - 1) / columns)),
      (x.pixels + parts - 1) / parts};
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

struct Cuda {
  static void check(const char* op, const Tensor& x) { CVK_CHECK_CUDA(op, x); }

  static void statistics(const char* op, const Tensor& x, const Start& start) {
    const Matrix map = matrix_of(op, "x", x);
    CVK_CHECK(op, map.pixels > 0, "x must have pixels, got ", shape_of(x));
    const DeviceGuard guard(x.get_device_index());
    if (map.C == 0) return;
    const cudaStream_t stream = current_stream(x);
    dispatch_floating(op, x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
      constexpr int WIDE = sizeof(Pack) / sizeof(T);
      with_lanes<T>(op, map, packs<T, WIDE>(x_ptr, map.C, map.stride), [&]<int LANES>() {
        const auto [grid, share] = blocks_for<LANES>(map, PIXELS, PARTS);
        const Tensor partial = partial_sums(x, grid);
        float* partial_ptr = static_cast<float*>(partial.mutable_data_ptr());
        batch_norm_act_statistics_kernel<T, LANES>
            <<<grid, THREADS, 0, stream>>>(x_ptr, partial_ptr, map, share);
        batch_norm_act_statistics_finish_kernel<T>
            <<<finish_grid(map.C), dim3(FINISH_CHANNELS, FINISH_ROWS), 0, stream>>>(
                x_ptr, partial_ptr, grid.x, map, share, start);
      });
    });
    CVK_CHECK_LAUNCH(op);
  }

  static void apply(const char* op, const Tensor& x, const BatchNorm& bn, Act act,
                    const Maybe& residual, const Tensor& out) {
    const Matrix map = matrix_of(op, "x", x), to = matrix_like(op, "out", out, x, false);
    const int64_t residual_stride =
        residual ? matrix_like(op, "residual", *residual, x, false).stride : 0;
    const DeviceGuard guard(x.get_device_index());
    if (x.numel() == 0) return;
    const cudaStream_t stream = current_stream(x);
    dispatch_floating(op, x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
      const T* residual_ptr =
          residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
      T* out_ptr = static_cast<T*>(out.mutable_data_ptr());
      constexpr int WIDE = sizeof(Pack) / sizeof(T);
      const bool packed = packs<T, WIDE>(x_ptr, map.C, map.stride) &&
                          packs<T, WIDE>(out_ptr, map.C, to.stride) &&
                          (!residual || packs<T, WIDE>(residual_ptr, map.C, residual_stride));
      with_lanes<T>(op, map, packed, [&]<int LANES>() {
        const auto [grid, share] = blocks_for<LANES>(map, STREAMED, 1 << 20);
        const auto launch = [&, grid = grid, share = share]<bool ADDS>(auto activation) {
          batch_norm_act_apply_kernel<T, LANES, ADDS><<<grid, THREADS, 0, stream>>>(
              x_ptr, residual_ptr, out_ptr, map, share, residual_stride, to.stride, bn, activation);
        };
        if (act == Act::SILU)
          launch.template operator()<false>(Silu<float>{});
        else if (residual_ptr == nullptr)
          launch.template operator()<false>(Bounded<float>::of(act == Act::RELU));
        else
          launch.template operator()<true>(Bounded<float>::of(act == Act::RELU));
      });
    });
    CVK_CHECK_LAUNCH(op);
  }

  static void reduce(const char* op, const Tensor& grad, const Tensor& x, const BatchNorm& bn,
                     Act act, const Beside& beside, const Results& results) {
    const Matrix map = matrix_of(op, "x", x), from = matrix_like(op, "grad", grad, x, false);
    CVK_CHECK(op, map.pixels > 0, "x must have pixels, got ", shape_of(x));
    const DeviceGuard guard(x.get_device_index());
    if (map.C == 0) return;
    const cudaStream_t stream = current_stream(x);
    dispatch_floating(op, x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const T *x_ptr = static_cast<const T*>(x.const_data_ptr()),
              *grad_ptr = static_cast<const T*>(grad.const_data_ptr());
      const T* joined_ptr = static_cast<const T*>(beside.joined);
      T* masked_ptr = static_cast<T*>(beside.masked);
      float* total_ptr = static_cast<float*>(beside.total);
      constexpr int WIDE = sizeof(Pack) / sizeof(T);
      const bool packed =
          packs<T, WIDE>(x_ptr, map.C, map.stride) &&
          packs<T, WIDE>(grad_ptr, map.C, from.stride) &&
          (joined_ptr == nullptr || (packs<T, WIDE>(joined_ptr, map.C, beside.joined_stride) &&
                                     packs<T, WIDE>(masked_ptr, map.C, beside.masked_stride))) &&
          (total_ptr == nullptr || packs<float, WIDE>(total_ptr, map.C, beside.total_stride));
      with_lanes<T>(op, map, packed, [&]<int LANES>() {
        const auto [grid, share] = blocks_for<LANES>(map, PIXELS, PARTS);
        const Tensor partial = partial_sums(x, grid);
        float* partial_ptr = static_cast<float*>(partial.mutable_data_ptr());
        const auto launch = [&, grid = grid, share = share](auto activation, auto with) {
          batch_norm_act_reduce_kernel<T, LANES><<<grid, THREADS, 0, stream>>>(
              grad_ptr, x_ptr, partial_ptr, map, share, from.stride, bn, activation, with);
        };
        const auto bounded = Bounded<float>::of(act == Act::RELU);
        if (act == Act::SILU)
          launch(Silu<float>{}, Alone{});
        else if (joined_ptr != nullptr)
          launch(bounded,
                 Joined<T>{joined_ptr, masked_ptr, beside.joined_stride, beside.masked_stride});
        else if (total_ptr != nullptr)
          launch(bounded, IntoTotal{total_ptr, beside.total_stride});
        else
          launch(bounded, Alone{});
        batch_norm_act_reduce_finish_kernel<T>
            <<<finish_grid(map.C), dim3(FINISH_CHANNELS, FINISH_ROWS), 0, stream>>>(
                partial_ptr, grid.x, map, bn, results);
      });
    });
    CVK_CHECK_LAUNCH(op);
  }

  static void input_gradient(const char* op, const Tensor& grad, const Tensor& x,
                             const BatchNorm& bn, Act act, const void* slope, const void* offset,
                             const Tensor& out) {
    const bool wide = grad.scalar_type() != x.scalar_type();
    const Matrix map = matrix_of(op, "x", x), from = matrix_like(op, "grad", grad, x, wide),
                 to = matrix_like(op, "out", out, x, false);
    const float *slope_ptr = static_cast<const float*>(slope),
                *offset_ptr = static_cast<const float*>(offset);
    const DeviceGuard guard(x.get_device_index());
    if (x.numel() == 0) return;
    const cudaStream_t stream = current_stream(x);
    dispatch_floating(op, x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const T* x_ptr = static_cast<const T*>(x.const_data_ptr());
      T* out_ptr = static_cast<T*>(out.mutable_data_ptr());
      constexpr int WIDE = sizeof(Pack) / sizeof(T);
      const bool packed = packs<T, WIDE>(x_ptr, map.C, map.stride) &&
                          packs<T, WIDE>(out_ptr, map.C, to.stride) &&
                          (wide ? packs<float, WIDE>(grad.const_data_ptr(), map.C, from.stride)
                                : packs<T, WIDE>(grad.const_data_ptr(), map.C, from.stride));
      with_lanes<T>(op, map, packed, [&]<int LANES>() {
        const auto [grid, share] = blocks_for<LANES>(map, STREAMED, 1 << 20);
        const auto launch = [&, grid = grid, share = share]<typename G>(auto activation) {
          batch_norm_act_input_gradient_kernel<T, G, LANES><<<grid, THREADS, 0, stream>>>(
              static_cast<const G*>(grad.const_data_ptr()), x_ptr, out_ptr, map, share, from.stride,
              to.stride, bn, activation, slope_ptr, offset_ptr);
        };
        const auto bounded = Bounded<float>::of(act == Act::RELU);
        if (act == Act::SILU)
          launch.template operator()<T>(Silu<float>{});
        else if (wide)
          launch.template operator()<float>(bounded);
        else
          launch.template operator()<T>(bounded);
      });
    });
    CVK_CHECK_LAUNCH(op);
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) { CVK_BATCH_NORM_ACT_OPS(library, Cuda); }

}  // namespace
}  // namespace cvkernels::batch_norm_act
