// The kernels of avg_pool. CUDA only, no torch header.
#pragma once

#include "avg_pool/problem.h"
#include "common/pool.cuh"

namespace cvkernels::avg_pool {

// One block pools THREADS packs of an output row, each thread one pack of one pixel, in rows
// gridDim.x apart. Reads each element of x that some window holds once from memory, and again, for
// windows that overlap, from the caches; writes out once.
//
// KERNEL > 0 is a square kernel of that size, all its loads in flight at once. KERNEL == 0 is any
// window.
template <typename T, int KERNEL, bool NORMALISES>
__global__ void __launch_bounds__(THREADS)
    avg_pool_nhwc_kernel(const T* __restrict__ x_ptr,  // [N, C, H, W], channels innermost
                         T* __restrict__ out_ptr,      // [N, C, P, Q], channels innermost
                         Problem problem, Average average) {
  constexpr int LANES = PackPlace<T>::LANES;
  const auto place = PackPlace<T>::of(problem);
  if (!place.inside) return;
  const int q = place.q, c = place.c;

  Affine<float> affine[LANES];
  if constexpr (NORMALISES) {
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) affine[lane] = affine_of<T>(average.bn, c + lane);
  }
  const Taps w = taps_of(problem.w, q);
  const int64_t w_counted = average.counted(problem.w, q, w);
  const int row_stride = problem.x_stride_h, column_stride = problem.x_stride_w;
  const int w_begin = w.begin, w_end = w.end;

  place.over_rows(problem, [&](int64_t n, int p) {
    const T* x = x_ptr + n * problem.x_stride_n + c;
    const Taps h = taps_of(problem.h, p);
    const int h_begin = h.begin, h_end = h.end;
    float sums[LANES] = {};
    const auto load = [&](int ih, int iw) {
      return __ldg(reinterpret_cast<const Pack*>(x + (ih * row_stride + iw * column_stride)));
    };
    const auto add = [&](const Pack& pack) {
      T elements[LANES];
      memcpy(elements, &pack, sizeof(Pack));
#pragma unroll
      for (int lane = 0; lane < LANES; ++lane) {
        const float element = Number<T>::widen(elements[lane]);
        sums[lane] += NORMALISES ? affine[lane](element, 0.0f) : element;
      }
    };
    if constexpr (KERNEL > 0) {
      Pack taps[KERNEL][KERNEL];
#pragma unroll
      for (int r = 0; r < KERNEL; ++r)
#pragma unroll
        for (int s = 0; s < KERNEL; ++s)
          if (h_begin + r < h_end && w_begin + s < w_end)
            taps[r][s] = load(h_begin + r, w_begin + s);
#pragma unroll
      for (int r = 0; r < KERNEL; ++r)
#pragma unroll
        for (int s = 0; s < KERNEL; ++s)
          if (h_begin + r < h_end && w_begin + s < w_end) add(taps[r][s]);
    } else {
      for (int ih = h_begin; ih < h_end; ++ih)
#pragma unroll 4
        for (int iw = w_begin; iw < w_end; ++iw) add(load(ih, iw));
    }
    const int64_t taps = average.counted(problem.h, p, h) * w_counted;
    T elements[LANES];
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane)
      elements[lane] = Number<T>::narrow(average.of(sums[lane], taps));
    Pack pooled;
    memcpy(&pooled, elements, sizeof(Pack));
    const int offset =
        p * static_cast<int>(problem.out_stride_h) + q * static_cast<int>(problem.out_stride_w) + c;
    T* out = out_ptr + n * problem.out_stride_n + offset;
    *reinterpret_cast<Pack*>(out) = pooled;
  });
}

// Any strides: one thread pools one output element.
template <typename T, typename Index, bool CHANNELS_INNER>
__global__ void __launch_bounds__(THREADS)
    avg_pool_strided_kernel(const T* __restrict__ x_ptr,  // [N, C, H, W]
                            T* __restrict__ out_ptr,      // [N, C, P, Q]
                            Problem problem, Average average) {
  over_outputs<Index, CHANNELS_INNER>(problem, [&](int64_t n, int64_t c, int64_t p, int64_t q) {
    const Taps h = taps_of(problem.h, p);
    const Taps w = taps_of(problem.w, q);
    const T* x = x_ptr + n * problem.x_stride_n + c * problem.x_stride_c;
    Affine<float> affine{1.0f, 0.0f};
    if (average.normalises) affine = affine_of<T>(average.bn, c);
    const float lowest = Affine<float>::lowest(average.normalises);
    float sum = 0.0f;
    for (int64_t ih = h.begin; ih < h.end; ++ih)
      for (int64_t iw = w.begin; iw < w.end; ++iw)
        sum +=
            affine(Number<T>::widen(x[ih * problem.x_stride_h + iw * problem.x_stride_w]), lowest);
    const int64_t taps = average.counted(problem.h, p, h) * average.counted(problem.w, q, w);
    out_ptr[n * problem.out_stride_n + c * problem.out_stride_c + p * problem.out_stride_h +
            q * problem.out_stride_w] = Number<T>::narrow(average.of(sum, taps));
  });
}

}  // namespace cvkernels::avg_pool
