// batch_norm_act's passes on CUDA.
#include "batch_norm_act/kernels.cuh"
#include "batch_norm_act/ops.h"
#include "common/cuda.h"

namespace cvkernels::batch_norm_act {
namespace {

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

// Blocks whose threads have `pixels` pixels each, or more where that were over `most` blocks.
template <int LANES>
Blocks blocks_for(const Matrix& x, int64_t pixels, int64_t most) {
  const int64_t packed = x.C / LANES;
  const int64_t columns = std::min<int64_t>(packed, COLUMNS);
  const int64_t of_block = THREADS / columns * pixels;
  const int64_t across = (packed + columns - 1) / columns;
  const int64_t parts =
      std::max<int64_t>(1, std::min((x.pixels + of_block - 1) / of_block, most / across));
  return {dim3(static_cast<unsigned>(parts), static_cast<unsigned>(across)),
          (x.pixels + parts - 1) / parts};
}

// Calls launch.operator()<LANES>() with 16 bytes of T, or with one element.
template <typename T, typename Launch>
void with_lanes(const Matrix& x, bool packed, Launch&& launch) {
  constexpr int LANES = sizeof(Pack) / sizeof(T);
  CVK_CHECK("batch_norm_act", x.C <= GRID_Y_MAX * COLUMNS, "x must have at most ",
            GRID_Y_MAX * COLUMNS, " channels, got ", x.C);
  if (packed)
    launch.template operator()<LANES>();
  else
    launch.template operator()<1>();
}

dim3 finish_grid(int64_t C) {
  return dim3(static_cast<unsigned>((C + FINISH_CHANNELS - 1) / FINISH_CHANNELS));
}

// Of a map that is absent too.
template <typename T, int LANES>
bool packs(const Map& map, int64_t C) {
  return map.data == nullptr || packs<T, LANES>(map.data, C, map.stride);
}

struct OnCuda : Cuda {
  template <typename T>
  static void statistics(const Cuda& cuda, Type<T>, const void* x, const Matrix& map,
                         const StatisticsOut& out) {
    if (map.C == 0) return;
    const T* x_ptr = static_cast<const T*>(x);
    constexpr int WIDE = sizeof(Pack) / sizeof(T);
    with_lanes<T>(map, packs<T, WIDE>(x_ptr, map.C, map.stride), [&]<int LANES>() {
      const int64_t most =
          cuda.resident_blocks(batch_norm_act_statistics_kernel<T, LANES>, THREADS);
      const auto [grid, share] = blocks_for<LANES>(map, PIXELS, most);
      const Tensor partial = cuda.floats(int64_t(grid.x) * 2 * map.C);
      float* partial_ptr = static_cast<float*>(partial.mutable_data_ptr());
      batch_norm_act_statistics_kernel<T, LANES>
          <<<grid, THREADS, 0, cuda.stream>>>(x_ptr, partial_ptr, map, share);
      batch_norm_act_statistics_finish_kernel<T>
          <<<finish_grid(map.C), dim3(FINISH_CHANNELS, FINISH_ROWS), 0, cuda.stream>>>(
              x_ptr, partial_ptr, grid.x, map, share, out);
    });
  }

  template <typename T>
  static void apply(const Cuda& cuda, Type<T>, const void* x, const Matrix& map,
                    const BatchNorm& bn, Act act, const Map& residual, const Map& out) {
    if (map.pixels * map.C == 0) return;
    const T* x_ptr = static_cast<const T*>(x);
    const T* residual_ptr = static_cast<const T*>(residual.data);
    T* out_ptr = static_cast<T*>(out.data);
    constexpr int WIDE = sizeof(Pack) / sizeof(T);
    const bool packed = packs<T, WIDE>(x_ptr, map.C, map.stride) && packs<T, WIDE>(out, map.C) &&
                        packs<T, WIDE>(residual, map.C);
    with_lanes<T>(map, packed, [&]<int LANES>() {
      const auto [grid, share] = blocks_for<LANES>(map, STREAMED, 1 << 20);
      const auto launch = [&, grid = grid, share = share]<bool ADDS>(auto activation) {
        batch_norm_act_apply_kernel<T, LANES, ADDS><<<grid, THREADS, 0, cuda.stream>>>(
            x_ptr, residual_ptr, out_ptr, map, share, residual.stride, out.stride, bn, activation);
      };
      if (act == Act::SILU)
        launch.template operator()<false>(Silu<float>{});
      else if (residual_ptr == nullptr)
        launch.template operator()<false>(Bounded<float>::of(act == Act::RELU));
      else
        launch.template operator()<true>(Bounded<float>::of(act == Act::RELU));
    });
  }

  template <typename T>
  static void reduce(const Cuda& cuda, Type<T>, const Map& grad, const void* x, const Matrix& map,
                     const BatchNorm& bn, Act act, const ReduceMaps& maps, const Results& results) {
    if (map.C == 0) return;
    const T* x_ptr = static_cast<const T*>(x);
    const T* grad_ptr = static_cast<const T*>(grad.data);
    constexpr int WIDE = sizeof(Pack) / sizeof(T);
    const bool packed = packs<T, WIDE>(x_ptr, map.C, map.stride) && packs<T, WIDE>(grad, map.C) &&
                        packs<T, WIDE>(maps.output, map.C) &&
                        packs<T, WIDE>(maps.grad_residual, map.C) &&
                        packs<float, WIDE>(maps.total, map.C);
    with_lanes<T>(map, packed, [&]<int LANES>() {
      const auto launch = [&](auto activation, auto with) {
        using Activation = decltype(activation);
        using With = decltype(with);
        const int64_t most =
            cuda.resident_blocks(batch_norm_act_reduce_kernel<T, LANES, Activation, With>, THREADS);
        const auto [grid, share] = blocks_for<LANES>(map, PIXELS, most);
        const Tensor partial = cuda.floats(int64_t(grid.x) * 2 * map.C);
        float* partial_ptr = static_cast<float*>(partial.mutable_data_ptr());
        batch_norm_act_reduce_kernel<T, LANES><<<grid, THREADS, 0, cuda.stream>>>(
            grad_ptr, x_ptr, partial_ptr, map, share, grad.stride, bn, activation, with);
        batch_norm_act_reduce_finish_kernel<T>
            <<<finish_grid(map.C), dim3(FINISH_CHANNELS, FINISH_ROWS), 0, cuda.stream>>>(
                partial_ptr, grid.x, map, bn, results);
      };
      const auto bounded = Bounded<float>::of(act == Act::RELU);
      if (act == Act::SILU)
        launch(Silu<float>{}, Alone{});
      else if (maps.output.data != nullptr)
        launch(bounded, OfOutput<T>{static_cast<const T*>(maps.output.data),
                                    static_cast<T*>(maps.grad_residual.data), maps.output.stride,
                                    maps.grad_residual.stride});
      else if (maps.total.data != nullptr)
        launch(bounded, IntoTotal{static_cast<float*>(maps.total.data), maps.total.stride});
      else
        launch(bounded, Alone{});
    });
  }

  template <typename T>
  static void input_gradient(const Cuda& cuda, Type<T>, const Map& grad, bool wide, const void* x,
                             const Matrix& map, const BatchNorm& bn, Act act, const void* slope,
                             const void* offset, const Map& out) {
    if (map.pixels * map.C == 0) return;
    const T* x_ptr = static_cast<const T*>(x);
    const float* slope_ptr = static_cast<const float*>(slope);
    const float* offset_ptr = static_cast<const float*>(offset);
    T* out_ptr = static_cast<T*>(out.data);
    constexpr int WIDE = sizeof(Pack) / sizeof(T);
    const bool packed = packs<T, WIDE>(x_ptr, map.C, map.stride) && packs<T, WIDE>(out, map.C) &&
                        (wide ? packs<float, WIDE>(grad, map.C) : packs<T, WIDE>(grad, map.C));
    with_lanes<T>(map, packed, [&]<int LANES>() {
      const auto [grid, share] = blocks_for<LANES>(map, STREAMED, 1 << 20);
      const auto launch = [&, grid = grid, share = share]<typename G>(auto activation) {
        batch_norm_act_input_gradient_kernel<T, G, LANES><<<grid, THREADS, 0, cuda.stream>>>(
            static_cast<const G*>(grad.data), x_ptr, out_ptr, map, share, grad.stride, out.stride,
            bn, activation, slope_ptr, offset_ptr);
      };
      const auto bounded = Bounded<float>::of(act == Act::RELU);
      if (act == Act::SILU)
        launch.template operator()<T>(Silu<float>{});
      else if (wide)
        launch.template operator()<float>(bounded);
      else
        launch.template operator()<T>(bounded);
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) { Ops<OnCuda>::add_to(library); }

}  // namespace
}  // namespace cvkernels::batch_norm_act
