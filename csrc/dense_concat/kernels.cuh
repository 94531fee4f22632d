// The kernels of dense_concat. CUDA only, no torch header.
#pragma once

#include "common/cuda_launch.cuh"
#include "dense_concat/problem.h"

namespace cvkernels::dense_concat {

constexpr int THREADS = 128;
// Pixels of one thread, all their loads in flight at once.
constexpr int PIXELS = 4;

// Channels innermost on both sides. One block moves PIXELS * rows pixels: each thread keeps its
// pack of channels, and their scale and shift, and steps through the pixels. Reads src once and
// writes it once: 2 * N*C*H*W elements, the minimum for this op.
template <typename T, bool COPIES>
__global__ void __launch_bounds__(THREADS)
    dense_concat_nhwc_kernel(const T* __restrict__ src_ptr,  // [N, C, H, W], channels innermost
                             T* __restrict__ out_ptr,        // [N, C, H, W], channels innermost
                             Problem problem) {
  constexpr int LANES = sizeof(Pack) / sizeof(T);
  const int packs = static_cast<int>(problem.C / LANES);
  const int columns = packs < THREADS ? packs : THREADS;
  const int rows = THREADS / columns;
  const int row = threadIdx.x / columns;
  const int pack = blockIdx.y * columns + threadIdx.x - row * columns;
  if (row >= rows || pack >= packs) return;
  const int64_t c = static_cast<int64_t>(pack) * LANES;

  Affine<float> affine[LANES];
  if constexpr (!COPIES) {
#pragma unroll
    for (int i = 0; i < LANES; ++i) affine[i] = affine_of<T>(problem.bn, c + i);
  }
  const float lowest = Affine<float>::lowest(problem.relu);

  const int64_t pixels = problem.pixels();
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows * PIXELS;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows * PIXELS + row; first < pixels;
       first += step) {
    Pack loaded[PIXELS];
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      const int64_t pixel = first + i * rows;
      if (pixel < pixels)
        loaded[i] =
            __ldg(reinterpret_cast<const Pack*>(src_ptr + problem.offset(problem.src, pixel) + c));
    }
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      const int64_t pixel = first + i * rows;
      if (pixel >= pixels) break;
      if constexpr (!COPIES) {
        T elements[LANES];
        memcpy(elements, &loaded[i], sizeof(Pack));
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane)
          elements[lane] =
              Number<T>::narrow(affine[lane](Number<T>::widen(elements[lane]), lowest));
        memcpy(&loaded[i], elements, sizeof(Pack));
      }
      *reinterpret_cast<Pack*>(out_ptr + problem.offset(problem.out, pixel) + c) = loaded[i];
    }
  }
}

// Any strides: one thread moves one element.
template <typename T, typename Index, bool CHANNELS_INNER>
__global__ void __launch_bounds__(THREADS)
    dense_concat_strided_kernel(const T* __restrict__ src_ptr,  // [N, C, H, W]
                                T* __restrict__ out_ptr,        // [N, C, H, W]
                                Problem problem) {
  const auto move = [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const auto offset = [&](const Strides& strides) {
      return n * strides.n + c * strides.c + h * strides.h + w * strides.w;
    };
    T x = src_ptr[offset(problem.src)];
    if (!problem.copies)
      x = Number<T>::narrow(
          affine_of<T>(problem.bn, c)(Number<T>::widen(x), Affine<float>::lowest(problem.relu)));
    out_ptr[offset(problem.out)] = x;
  };
  over_elements<THREADS, Index, CHANNELS_INNER>(problem.N, problem.C, problem.H, problem.W, move);
}

}  // namespace cvkernels::dense_concat
