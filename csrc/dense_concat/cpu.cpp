// dense_concat on the CPU.
#include <cstring>
#include <vector>

#include "common/cpu.h"
#include "dense_concat/ops.h"

namespace cvkernels::dense_concat {
namespace {

// Pixels [first, last), with channel stride 1 on both sides: vectors along the channels.
template <typename T>
CVK_HOST_DEVICE void concat_pixels(const void* src_data, void* out_data, const Problem& problem,
                                   const void* scale_data, const void* shift_data, int64_t first,
                                   int64_t last) {
  using Wide = typename Number<T>::Wide;
  const Wide* scale = static_cast<const Wide*>(scale_data);
  const Wide* shift = static_cast<const Wide*>(shift_data);
  const Wide lowest = Affine<Wide>::lowest(problem.relu);
  for (int64_t pixel = first; pixel < last; ++pixel) {
    const T* src = static_cast<const T*>(src_data) + problem.offset(problem.src, pixel);
    T* out = static_cast<T*>(out_data) + problem.offset(problem.out, pixel);
    CVK_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < problem.C; ++c)
      out[c] =
          Number<T>::narrow(Affine<Wide>{scale[c], shift[c]}(Number<T>::widen(src[c]), lowest));
  }
}

// Rows [first, last) of the N * C * H, any strides.
template <typename T>
CVK_HOST_DEVICE void concat_rows(const void* src_data, void* out_data, const Problem& problem,
                                 const void* scale_data, const void* shift_data, int64_t first,
                                 int64_t last) {
  using Wide = typename Number<T>::Wide;
  const Wide lowest = Affine<Wide>::lowest(problem.relu);
  for (int64_t row = first; row < last; ++row) {
    const int64_t plane = row / problem.H, h = row % problem.H;
    const int64_t n = plane / problem.C, c = plane % problem.C;
    const Strides &from = problem.src, &to = problem.out;
    const T* src = static_cast<const T*>(src_data) + n * from.n + c * from.c + h * from.h;
    T* out = static_cast<T*>(out_data) + n * to.n + c * to.c + h * to.h;
    const Affine<Wide> affine{static_cast<const Wide*>(scale_data)[c],
                              static_cast<const Wide*>(shift_data)[c]};
    if (from.w == 1 && to.w == 1) {
      CVK_INDEPENDENT_ITERATIONS
      for (int64_t w = 0; w < problem.W; ++w)
        out[w] = Number<T>::narrow(affine(Number<T>::widen(src[w]), lowest));
    } else {
      for (int64_t w = 0; w < problem.W; ++w)
        out[w * to.w] = Number<T>::narrow(affine(Number<T>::widen(src[w * from.w]), lowest));
    }
  }
}

// Functions and not templates: compilers clone only those for each instruction set.
#define CVK_CONCAT(T)                                                                       \
  CVK_SIMD void pixels(Type<T>, const void* src, void* out, const Problem& problem,         \
                       const void* scale, const void* shift, int64_t first, int64_t last) { \
    concat_pixels<T>(src, out, problem, scale, shift, first, last);                         \
  }                                                                                         \
  CVK_SIMD void rows(Type<T>, const void* src, void* out, const Problem& problem,           \
                     const void* scale, const void* shift, int64_t first, int64_t last) {   \
    concat_rows<T>(src, out, problem, scale, shift, first, last);                           \
  }
CVK_CONCAT(float)
CVK_CONCAT(double)
CVK_CONCAT(float16)
CVK_CONCAT(bfloat16)
#undef CVK_CONCAT

// Lines that are asked for before they are copied. Short runs far apart are no stream that a
// processor would fetch by itself: each line that is not in a cache would be waited for.
constexpr int64_t LINE = 64, LINES_AHEAD = 32;

template <typename T>
void copy_pixels(const T* src_data, T* out_data, const Problem& problem, int64_t first,
                 int64_t last) {
  const auto* src = reinterpret_cast<const char*>(src_data);
  auto* out = reinterpret_cast<char*>(out_data);
  const auto from = [&](int64_t pixel) { return problem.offset(problem.src, pixel) * sizeof(T); };
  const auto to = [&](int64_t pixel) { return problem.offset(problem.out, pixel) * sizeof(T); };
  const int64_t bytes = problem.C * sizeof(T), ahead = LINE * LINES_AHEAD / bytes;
  for (int64_t pixel = first; pixel < last; ++pixel) {
    if (const int64_t next = pixel + ahead; ahead != 0 && next < last)
      for (int64_t byte = 0; byte < bytes; byte += LINE) {
        __builtin_prefetch(src + from(next) + byte, 0);
        __builtin_prefetch(out + to(next) + byte, 1);
      }
    std::memcpy(out + to(pixel), src + from(pixel), bytes);
  }
}

template <typename T>
void copy_rows(const T* src_data, T* out_data, const Problem& problem, int64_t first,
               int64_t last) {
  const Strides &from = problem.src, &to = problem.out;
  for (int64_t row = first; row < last; ++row) {
    const int64_t plane = row / problem.H, h = row % problem.H;
    const int64_t n = plane / problem.C, c = plane % problem.C;
    const T* src = src_data + n * from.n + c * from.c + h * from.h;
    T* out = out_data + n * to.n + c * to.c + h * to.h;
    if (from.w == 1 && to.w == 1)
      std::memcpy(out, src, problem.W * sizeof(T));
    else
      for (int64_t w = 0; w < problem.W; ++w) out[w * to.w] = src[w * from.w];
  }
}

struct OnCpu : Cpu {
  template <typename T>
  static void launch(Cpu, Type<T> type, const Problem& problem, const void* src, void* out) {
    const bool channels_inner = problem.src.c == 1 && problem.out.c == 1;
    const int64_t tasks = channels_inner ? problem.pixels() : problem.N * problem.C * problem.H;
    const int64_t grain = grain_of(channels_inner ? problem.C : problem.W);
    if (problem.copies) {
      const T* from = static_cast<const T*>(src);
      T* to = static_cast<T*>(out);
      parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
        channels_inner ? copy_pixels(from, to, problem, first, last)
                       : copy_rows(from, to, problem, first, last);
      });
      return;
    }
    std::vector<typename Number<T>::Wide> scale(problem.C), shift(problem.C);
    for (int64_t c = 0; c < problem.C; ++c) {
      const auto affine = affine_of<T>(problem.bn, c);
      scale[c] = affine.scale;
      shift[c] = affine.shift;
    }
    parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
      channels_inner ? pixels(type, src, out, problem, scale.data(), shift.data(), first, last)
                     : rows(type, src, out, problem, scale.data(), shift.data(), first, last);
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) { Ops<OnCpu>::add_to(library); }

}  // namespace
}  // namespace cvkernels::dense_concat
