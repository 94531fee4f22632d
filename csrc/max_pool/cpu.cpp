// max_pool on the CPU.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/cpu.h"
#include "common/large_output.h"
#include "max_pool/ops.h"

namespace cvkernels::max_pool {
namespace {

// How many taps the inner loop of the channels-innermost path takes at once: the 3x3 window's.
constexpr int64_t TAPS = 9;

// out[c] = the largest of COUNT taps' channel c; out may be one of the taps.
template <typename T, int COUNT>
CVK_HOST_DEVICE void pool_pixel(const typename Maximum<T>::Bits* const* taps,
                                typename Maximum<T>::Bits* out, int64_t C) {
  const typename Maximum<T>::Bits* tap[COUNT];
  for (int i = 0; i < COUNT; ++i) tap[i] = taps[i];
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < C; ++c) {
    auto best = Maximum<T>::key(tap[0][c]);
#pragma GCC unroll 9
    for (int i = 1; i < COUNT; ++i) best = Maximum<T>::max(best, Maximum<T>::key(tap[i][c]));
    out[c] = Maximum<T>::value(best);
  }
}

// Output rows [first, last) of the N * P, with x_stride_c == out_stride_c == 1: vectors along the
// channels, kept in registers over all taps of a pixel.
template <typename T>
CVK_HOST_DEVICE void pool_rows_nhwc(const void* x_data, void* out_data, const Problem& problem,
                                    int64_t first, int64_t last) {
  using Bits = typename Maximum<T>::Bits;
  for (int64_t row = first; row < last; ++row) {
    const int64_t n = row / problem.P, p = row % problem.P;
    const Bits* x = static_cast<const Bits*>(x_data) + n * problem.x_stride_n;
    Bits* out = static_cast<Bits*>(out_data) + n * problem.out_stride_n + p * problem.out_stride_h;
    const Taps h = taps_of(problem.h, p);
    for (int64_t q = 0; q < problem.Q; ++q, out += problem.out_stride_w) {
      const Taps w = taps_of(problem.w, q);
      const Bits* taps[TAPS];
      int64_t count = 0;
      for (int64_t ih = h.begin; ih < h.end; ih += problem.h.dilation) {
        for (int64_t iw = w.begin; iw < w.end; iw += problem.w.dilation) {
          if (count == TAPS) {
            pool_pixel<T, TAPS>(taps, out, problem.C);
            taps[0] = out;
            count = 1;
          }
          taps[count++] = x + ih * problem.x_stride_h + iw * problem.x_stride_w;
        }
      }
      if (count == 0) {  // a dilated window may step over a small x
        for (int64_t c = 0; c < problem.C; ++c) out[c] = Maximum<T>::value(Maximum<T>::lowest);
        continue;
      }
      // A tap given twice changes no maximum, so two loops serve every count.
      const int64_t filled = count <= 4 ? 4 : TAPS;
      while (count < filled) taps[count++] = taps[0];
      if (filled == 4)
        pool_pixel<T, 4>(taps, out, problem.C);
      else
        pool_pixel<T, TAPS>(taps, out, problem.C);
    }
  }
}

// Output rows [first, last) of the N * C * P, any strides: down the rows first, over the whole
// width into `columns` [W], then along it.
template <typename T>
CVK_HOST_DEVICE void pool_rows_strided(const void* x_data, void* out_data, const Problem& problem,
                                       int64_t first, int64_t last, void* column_data) {
  using Bits = typename Maximum<T>::Bits;
  using Key = typename Maximum<T>::Key;
  Key* __restrict__ columns = static_cast<Key*>(column_data);
  const int64_t W = problem.w.size;
  for (int64_t row = first; row < last; ++row) {
    const int64_t plane = row / problem.P, p = row % problem.P;
    const int64_t n = plane / problem.C, c = plane % problem.C;
    const Bits* x =
        static_cast<const Bits*>(x_data) + n * problem.x_stride_n + c * problem.x_stride_c;
    Bits* out = static_cast<Bits*>(out_data) + n * problem.out_stride_n + c * problem.out_stride_c +
                p * problem.out_stride_h;
    const Taps h = taps_of(problem.h, p);
    for (int64_t iw = 0; iw < W; ++iw) columns[iw] = Maximum<T>::lowest;
    for (int64_t ih = h.begin; ih < h.end; ih += problem.h.dilation) {
      const Bits* __restrict__ taps = x + ih * problem.x_stride_h;
      if (problem.x_stride_w == 1) {
        CVK_INDEPENDENT_ITERATIONS
        for (int64_t iw = 0; iw < W; ++iw)
          columns[iw] = Maximum<T>::max(columns[iw], Maximum<T>::key(taps[iw]));
      } else {
        for (int64_t iw = 0; iw < W; ++iw)
          columns[iw] =
              Maximum<T>::max(columns[iw], Maximum<T>::key(taps[iw * problem.x_stride_w]));
      }
    }
    for (int64_t q = 0; q < problem.Q; ++q) {
      const Taps w = taps_of(problem.w, q);
      Key best = Maximum<T>::lowest;
      for (int64_t iw = w.begin; iw < w.end; iw += problem.w.dilation)
        best = Maximum<T>::max(best, columns[iw]);
      out[q * problem.out_stride_w] = Maximum<T>::value(best);
    }
  }
}

// Functions and not templates: compilers clone only those for each instruction set.
#define CVK_ROWS(SIMD, T)                                                                          \
  SIMD void rows_nhwc(Type<T>, const void* x, void* out, const Problem& problem, int64_t first,    \
                      int64_t last) {                                                              \
    pool_rows_nhwc<T>(x, out, problem, first, last);                                               \
  }                                                                                                \
  SIMD void rows_strided(Type<T>, const void* x, void* out, const Problem& problem, int64_t first, \
                         int64_t last, void* columns) {                                            \
    pool_rows_strided<T>(x, out, problem, first, last, columns);                                   \
  }
CVK_ROWS(CVK_SIMD, float)
CVK_ROWS(CVK_SIMD_FEW, double)
CVK_ROWS(CVK_SIMD_FEW, float16)
CVK_ROWS(CVK_SIMD, bfloat16)
CVK_ROWS(CVK_SIMD, uint8_t)
#undef CVK_ROWS

struct OnCpu : Cpu {
  static constexpr bool HAS_BYTES = true;

  template <typename T>
  static void launch(Cpu, Type<T> type, const Problem& problem, const void* x, void* out) {
    prefer_huge_pages(out, problem.out_extent() * sizeof(T));
    const int64_t kernel = problem.h.kernel * problem.w.kernel;
    if (problem.x_stride_c == 1 && problem.out_stride_c == 1 && problem.C > 1) {
      parallel_for(
          0, problem.N * problem.P, grain_of(problem.Q * problem.C * kernel),
          [&](int64_t first, int64_t last) { rows_nhwc(type, x, out, problem, first, last); });
      return;
    }
    parallel_for(0, problem.N * problem.C * problem.P, grain_of(problem.Q * kernel),
                 [&](int64_t first, int64_t last) {
                   std::vector<typename Maximum<T>::Key> columns(problem.w.size);
                   rows_strided(type, x, out, problem, first, last, columns.data());
                 });
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) { Ops<OnCpu>::add_to(library); }

}  // namespace
}  // namespace cvkernels::max_pool
