// The kernels of max_pool. CUDA only, no torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/number.h"
#include "common/pool.cuh"
#include "max_pool/problem.h"

namespace cvkernels::max_pool {

// Maximum<T>::max on each element of a word: the 16-bit formats have an instruction for a pair.
template <typename T>
struct WordMax;

template <>
struct WordMax<float> {
  static __device__ uint32_t lowest() { return __float_as_uint(Maximum<float>::lowest); }
  static __device__ uint32_t max(uint32_t best, uint32_t next) {
    return __float_as_uint(Maximum<float>::max(__uint_as_float(best), __uint_as_float(next)));
  }
};

template <>
struct WordMax<float16> {
  static __device__ uint32_t lowest() { return 0xfc00fc00u; }
  static __device__ uint32_t max(uint32_t best, uint32_t next) {
    return bits_as<uint32_t>(__hmax2_nan(bits_as<__half2>(best), bits_as<__half2>(next)));
  }
};

template <>
struct WordMax<bfloat16> {
  static __device__ uint32_t lowest() { return 0xff80ff80u; }
  static __device__ uint32_t max(uint32_t best, uint32_t next) {
    return bits_as<uint32_t>(
        __hmax2_nan(bits_as<__nv_bfloat162>(best), bits_as<__nv_bfloat162>(next)));
  }
};

template <typename T>
__device__ Pack max_of(Pack best, Pack next) {
  return {WordMax<T>::max(best.x, next.x), WordMax<T>::max(best.y, next.y),
          WordMax<T>::max(best.z, next.z), WordMax<T>::max(best.w, next.w)};
}

__device__ inline int clamp(int index, int size) {
  return index < 0 ? 0 : (index < size ? index : size - 1);
}

// out[n, :, p, :]: one block pools THREADS packs of an output row, each thread one pack of one
// pixel. Rows of x are read once from memory and again, by neighbouring pixels, from the caches:
// N*C*H*W + N*C*P*Q elements, the minimum for this op.
//
// KERNEL > 0 is a square kernel of that size without dilation, all its loads in flight at once; a
// tap outside the input is moved to the nearest pixel inside, which is in the same window and so
// changes no maximum. KERNEL == 0 is any window.
template <typename T, int KERNEL>
__global__ void __launch_bounds__(THREADS)
    max_pool_nhwc_kernel(const T* __restrict__ x_ptr,  // [N, C, H, W], channels innermost
                         T* __restrict__ out_ptr,      // [N, C, P, Q], channels innermost
                         Problem problem) {
  const auto place = PackPlace<T>::of(problem);
  if (!place.inside) return;
  const int q = place.q, c = place.c;
  const int row_stride = problem.x_stride_h, column_stride = problem.x_stride_w;

  place.over_rows(problem, [&](int64_t n, int p) {
    const T* x = x_ptr + n * problem.x_stride_n + c;
    const uint32_t lowest = WordMax<T>::lowest();
    Pack best{lowest, lowest, lowest, lowest};
    const auto load = [&](int ih, int iw) {
      return __ldg(reinterpret_cast<const Pack*>(x + (ih * row_stride + iw * column_stride)));
    };
    if constexpr (KERNEL > 0) {
      const int h_begin = p * static_cast<int>(problem.h.stride) - problem.h.padding;
      const int w_begin = q * static_cast<int>(problem.w.stride) - problem.w.padding;
      Pack taps[KERNEL][KERNEL];
#pragma unroll
      for (int r = 0; r < KERNEL; ++r)
#pragma unroll
        for (int s = 0; s < KERNEL; ++s)
          taps[r][s] = load(clamp(h_begin + r, problem.h.size), clamp(w_begin + s, problem.w.size));
#pragma unroll
      for (int r = 0; r < KERNEL; ++r)
#pragma unroll
        for (int s = 0; s < KERNEL; ++s) best = max_of<T>(best, taps[r][s]);
    } else {
      const Taps h = taps_of(problem.h, p);
      const Taps w = taps_of(problem.w, q);
      for (int ih = h.begin; ih < h.end; ih += problem.h.dilation)
        for (int iw = w.begin; iw < w.end; iw += problem.w.dilation)
          best = max_of<T>(best, load(ih, iw));
    }
    const int offset =
        p * static_cast<int>(problem.out_stride_h) + q * static_cast<int>(problem.out_stride_w) + c;
    T* out = out_ptr + n * problem.out_stride_n + offset;
    *reinterpret_cast<Pack*>(out) = best;
  });
}

// Any strides: one thread pools one output element.
template <typename T, typename Index, bool CHANNELS_INNER>
__global__ void __launch_bounds__(THREADS)
    max_pool_strided_kernel(const T* __restrict__ x_ptr,  // [N, C, H, W]
                            T* __restrict__ out_ptr,      // [N, C, P, Q]
                            Problem problem) {
  using Bits = typename Maximum<T>::Bits;
  using Key = typename Maximum<T>::Key;
  over_outputs<Index, CHANNELS_INNER>(problem, [&](int64_t n, int64_t c, int64_t p, int64_t q) {
    const Taps h = taps_of(problem.h, p);
    const Taps w = taps_of(problem.w, q);
    const Bits* x =
        reinterpret_cast<const Bits*>(x_ptr) + n * problem.x_stride_n + c * problem.x_stride_c;
    Key best = Maximum<T>::lowest;
    for (int64_t ih = h.begin; ih < h.end; ih += problem.h.dilation)
      for (int64_t iw = w.begin; iw < w.end; iw += problem.w.dilation)
        best = Maximum<T>::max(
            best, Maximum<T>::key(__ldg(x + ih * problem.x_stride_h + iw * problem.x_stride_w)));
    Bits* out = reinterpret_cast<Bits*>(out_ptr) + n * problem.out_stride_n +
                c * problem.out_stride_c + p * problem.out_stride_h + q * problem.out_stride_w;
    *out = Maximum<T>::value(best);
  });
}

}  // namespace cvkernels::max_pool
