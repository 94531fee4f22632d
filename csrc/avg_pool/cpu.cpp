// avg_pool on the CPU.
#include <algorithm>
#include <vector>

#include "avg_pool/ops.h"
#include "common/cpu.h"
#include "common/large_output.h"

namespace cvkernels::avg_pool {
namespace {

// What a task needs beside the tensors: scale and shift [C], and sums [C], or [W] for the strided
// path.
struct Scratch {
  const void* scale;
  const void* shift;
  void* sums;
};

// sums[c] += the tap's channel c.
template <typename T, bool NORMALISES>
CVK_HOST_DEVICE void add_pixel(const T* __restrict__ tap,
                               const typename Number<T>::Wide* __restrict__ scale,
                               const typename Number<T>::Wide* __restrict__ shift,
                               typename Number<T>::Wide* __restrict__ sums, int64_t C) {
  using Wide = typename Number<T>::Wide;
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < C; ++c) {
    Wide x = Number<T>::widen(tap[c]);
    if constexpr (NORMALISES) x = Affine<Wide>{scale[c], shift[c]}(x, Wide(0));
    sums[c] += x;
  }
}

// Channels that a window is summed for in registers, where it has so many taps: for fewer, the sums
// of all channels cost less than to leave the order in which memory is read, for more too.
constexpr int64_t BLOCK = 32;
constexpr int64_t TAPS_MIN = 5, TAPS_MAX = 9;

// One window, whose taps are at x + ih * stride_h + iw * stride_w, for BLOCK channels.
template <typename T, bool NORMALISES>
CVK_HOST_DEVICE void pool_block(const T* __restrict__ x, T* __restrict__ out,
                                const typename Number<T>::Wide* __restrict__ scale,
                                const typename Number<T>::Wide* __restrict__ shift,
                                const Problem& problem, const Taps& h, const Taps& w,
                                const Average& average, int64_t taps) {
  typename Number<T>::Wide sums[BLOCK] = {};
  for (int64_t ih = h.begin; ih < h.end; ++ih)
    for (int64_t iw = w.begin; iw < w.end; ++iw)
      add_pixel<T, NORMALISES>(x + ih * problem.x_stride_h + iw * problem.x_stride_w, scale, shift,
                               sums, BLOCK);
  for (int64_t c = 0; c < BLOCK; ++c) out[c] = Number<T>::narrow(average.of(sums[c], taps));
}

// Output rows [first, last) of the N * P, with x_stride_c == out_stride_c == 1: vectors along the
// channels.
template <typename T, bool NORMALISES>
CVK_HOST_DEVICE void pool_rows_nhwc(const void* x_data, void* out_data, const Problem& problem,
                                    const Average& average, const Scratch& scratch, int64_t first,
                                    int64_t last) {
  using Wide = typename Number<T>::Wide;
  const Wide* scale = static_cast<const Wide*>(scratch.scale);
  const Wide* shift = static_cast<const Wide*>(scratch.shift);
  Wide* __restrict__ sums = static_cast<Wide*>(scratch.sums);
  const int64_t most_taps = problem.h.kernel * problem.w.kernel;
  const bool blocks = problem.C >= BLOCK && most_taps >= TAPS_MIN && most_taps <= TAPS_MAX;
  for (int64_t row = first; row < last; ++row) {
    const int64_t n = row / problem.P, p = row % problem.P;
    const T* x = static_cast<const T*>(x_data) + n * problem.x_stride_n;
    T* __restrict__ out =
        static_cast<T*>(out_data) + n * problem.out_stride_n + p * problem.out_stride_h;
    const Taps h = taps_of(problem.h, p);
    const int64_t h_counted = average.counted(problem.h, p, h);
    for (int64_t q = 0; q < problem.Q; ++q, out += problem.out_stride_w) {
      const Taps w = taps_of(problem.w, q);
      const int64_t taps = h_counted * average.counted(problem.w, q, w);
      if (blocks) {
        // The last block overlaps the one before it.
        for (int64_t next = 0; next < problem.C; next += BLOCK) {
          const int64_t c = next < problem.C - BLOCK ? next : problem.C - BLOCK;
          pool_block<T, NORMALISES>(x + c, out + c, NORMALISES ? scale + c : scale,
                                    NORMALISES ? shift + c : shift, problem, h, w, average, taps);
        }
        continue;
      }
      for (int64_t c = 0; c < problem.C; ++c) sums[c] = 0;
      for (int64_t ih = h.begin; ih < h.end; ++ih)
        for (int64_t iw = w.begin; iw < w.end; ++iw)
          add_pixel<T, NORMALISES>(x + ih * problem.x_stride_h + iw * problem.x_stride_w, scale,
                                   shift, sums, problem.C);
      CVK_INDEPENDENT_ITERATIONS
      for (int64_t c = 0; c < problem.C; ++c) out[c] = Number<T>::narrow(average.of(sums[c], taps));
    }
  }
}

// Output rows [first, last) of the N * C * P, any strides: down the rows first, over the whole
// width into sums, then along it.
template <typename T, bool NORMALISES>
CVK_HOST_DEVICE void pool_rows_strided(const void* x_data, void* out_data, const Problem& problem,
                                       const Average& average, const Scratch& scratch,
                                       int64_t first, int64_t last) {
  using Wide = typename Number<T>::Wide;
  Wide* __restrict__ columns = static_cast<Wide*>(scratch.sums);
  const int64_t W = problem.w.size;
  for (int64_t row = first; row < last; ++row) {
    const int64_t plane = row / problem.P, p = row % problem.P;
    const int64_t n = plane / problem.C, c = plane % problem.C;
    const T* x = static_cast<const T*>(x_data) + n * problem.x_stride_n + c * problem.x_stride_c;
    T* out = static_cast<T*>(out_data) + n * problem.out_stride_n + c * problem.out_stride_c +
             p * problem.out_stride_h;
    Affine<Wide> affine{};
    if constexpr (NORMALISES)
      affine = {static_cast<const Wide*>(scratch.scale)[c],
                static_cast<const Wide*>(scratch.shift)[c]};
    const Taps h = taps_of(problem.h, p);
    for (int64_t iw = 0; iw < W; ++iw) columns[iw] = 0;
    for (int64_t ih = h.begin; ih < h.end; ++ih) {
      const T* __restrict__ taps = x + ih * problem.x_stride_h;
      const int64_t step = problem.x_stride_w;
      const auto add = [&](int64_t iw, const T& tap) __attribute__((always_inline)) {
        Wide value = Number<T>::widen(tap);
        if constexpr (NORMALISES) value = affine(value, Wide(0));
        columns[iw] += value;
      };
      if (step == 1) {
        CVK_INDEPENDENT_ITERATIONS
        for (int64_t iw = 0; iw < W; ++iw) add(iw, taps[iw]);
      } else {
        for (int64_t iw = 0; iw < W; ++iw) add(iw, taps[iw * step]);
      }
    }
    const int64_t h_counted = average.counted(problem.h, p, h);
    for (int64_t q = 0; q < problem.Q; ++q) {
      const Taps w = taps_of(problem.w, q);
      Wide sum = 0;
      for (int64_t iw = w.begin; iw < w.end; ++iw) sum += columns[iw];
      const int64_t taps = h_counted * average.counted(problem.w, q, w);
      out[q * problem.out_stride_w] = Number<T>::narrow(average.of(sum, taps));
    }
  }
}

// Functions and not templates: compilers clone only those for each instruction set.
#define CVK_ROWS(SIMD, T)                                                                          \
  SIMD void rows_nhwc(Type<T>, const void* x, void* out, const Problem& problem,                   \
                      const Average& average, const Scratch& scratch, int64_t first,               \
                      int64_t last) {                                                              \
    average.normalises ? pool_rows_nhwc<T, true>(x, out, problem, average, scratch, first, last)   \
                       : pool_rows_nhwc<T, false>(x, out, problem, average, scratch, first, last); \
  }                                                                                                \
  SIMD void rows_strided(Type<T>, const void* x, void* out, const Problem& problem,                \
                         const Average& average, const Scratch& scratch, int64_t first,            \
                         int64_t last) {                                                           \
    average.normalises                                                                             \
        ? pool_rows_strided<T, true>(x, out, problem, average, scratch, first, last)               \
        : pool_rows_strided<T, false>(x, out, problem, average, scratch, first, last);             \
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
  static void launch(Cpu, Type<T> type, const Problem& problem, const Average& average,
                     const void* x, void* out) {
    using Wide = typename Number<T>::Wide;
    prefer_huge_pages(out, problem.out_extent() * sizeof(T));
    std::vector<Wide> scale, shift;
    for (int64_t c = 0; average.normalises && c < problem.C; ++c) {
      const auto affine = affine_of<T>(average.bn, c);
      scale.push_back(affine.scale);
      shift.push_back(affine.shift);
    }
    const bool channels_inner = problem.x_stride_c == 1 && problem.out_stride_c == 1;
    const int64_t rows = problem.N * problem.P * (channels_inner ? 1 : problem.C);
    const int64_t taps = problem.Q * problem.h.kernel * problem.w.kernel;
    const int64_t taps_per_row = channels_inner ? taps * problem.C : taps;
    parallel_for(0, rows, grain_of(taps_per_row), [&](int64_t first, int64_t last) {
      std::vector<Wide> sums(channels_inner ? problem.C : problem.w.size);
      const Scratch scratch{scale.data(), shift.data(), sums.data()};
      channels_inner ? rows_nhwc(type, x, out, problem, average, scratch, first, last)
                     : rows_strided(type, x, out, problem, average, scratch, first, last);
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) { Ops<OnCpu>::add_to(library); }

}  // namespace
}  // namespace cvkernels::avg_pool
