// The maps of one call of se_scale or its parts on the CPU: their checks, and the sums and the
// scaling of an image or a part of it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cpu.h"
#include "common/large_output.h"
#include "common/layout.h"
#include "squeeze_excite/loops.h"

namespace cvkernels::squeeze_excite {

// Functions and not templates: compilers clone only those for each instruction set.
#define CVK_LOOPS(SIMD, T)                                                                        \
  SIMD static void add_pixels(Type<T>, const void* x, int64_t stride, int64_t C, int64_t count,   \
                              float* sums) {                                                      \
    sum_pixels<T>(x, stride, C, count, sums);                                                     \
  }                                                                                               \
  SIMD static void add_planes(Type<T>, const void* x, int64_t HW, int64_t first, int64_t last,    \
                              float* sums) {                                                      \
    for (int64_t c = first; c < last; ++c)                                                        \
      sums[c] = sum_plane<T>(static_cast<const T*>(x) + c * HW, HW);                              \
  }                                                                                               \
  SIMD static void run_layer(Type<T>, const Layer& layer, int64_t images, const float* in,        \
                             float* out, int64_t first, int64_t last) {                           \
    layer_rows<T>(layer, images, in, out, first, last);                                           \
  }                                                                                               \
  SIMD static void scale_by_column(Type<T>, const Rows& rows, Act act, const float* gate,         \
                                   int64_t first, int64_t last) {                                 \
    scale_rows<T, false>(rows, act, gate, first, last);                                           \
  }                                                                                               \
  SIMD static void scale_by_row(Type<T>, const Rows& rows, Act act, const float* gate,            \
                                int64_t first, int64_t last) {                                    \
    scale_rows<T, true>(rows, act, gate, first, last);                                            \
  }                                                                                               \
  SIMD static void add_all_products(Type<T>, const Gradients& maps, int64_t first, int64_t last,  \
                                    double* totals, float* sums) {                                \
    maps.out == nullptr ? sum_products<T, false>(maps, first, last, totals, sums)                 \
                        : sum_products<T, true>(maps, first, last, totals, sums);                 \
  }                                                                                               \
  SIMD static void scale_and_shift(Type<T>, const Rows& rows, const float* scale,                 \
                                   const float* shift, int64_t first, int64_t last) {             \
    shift_rows<T>(rows, scale, shift, first, last);                                               \
  }                                                                                               \
  SIMD static void load_floats(Type<T>, const void* from, int64_t count, float* to) {             \
    for (int64_t i = 0; i < count; ++i) to[i] = Number<T>::widen(static_cast<const T*>(from)[i]); \
  }                                                                                               \
  SIMD static void store_floats(Type<T>, const float* from, int64_t count, void* to) {            \
    for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = Number<T>::narrow(from[i]);      \
  }
CVK_LOOPS(CVK_SIMD, float)
CVK_LOOPS(CVK_SIMD_FEW, float16)
CVK_LOOPS(CVK_SIMD, bfloat16)
#undef CVK_LOOPS

CVK_SIMD static void apply_sigmoid(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = sigmoid(values[i]);
}

CVK_SIMD static void finish_sums(const float* partial, int64_t parts, int64_t C, float divisor,
                                 float* mean) {
  for (int64_t c = 0; c < C; ++c) mean[c] = 0.0f;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t c = 0; c < C; ++c) mean[c] += partial[part * C + c];
  for (int64_t c = 0; c < C; ++c) mean[c] /= divisor;
}

// Where the elements of a map lie. NHWC: channels are neighbours, and all pixels of an image have
// one stride; else dense NCHW.
struct Map {
  int64_t N, C, HW;
  bool nhwc;
  int64_t stride_n, stride_p;

  // From row to row, as Rows means them.
  int64_t row_stride() const { return nhwc ? stride_p : HW; }
};

inline Map map_of(const char* op, const Tensor& x, bool nhwc) {
  CVK_CHECK_CPU(op, x);
  CVK_CHECK_DIM(op, x, 4);
  const PixelMap pixels = pixel_map(x);
  CVK_CHECK(op, pixels.C > 0 && pixels.HW > 0, "x must have channels and pixels, got ",
            shape_of(x));
  CVK_CHECK(op, (nhwc ? pixels.fits : x.is_contiguous()) || x.numel() == 0, "a tensor of shape ",
            shape_of(x), " is neither contiguous nor channels_last as x is");
  return {pixels.N, pixels.C, pixels.HW, nhwc, pixels.stride_n, pixels.stride};
}

inline bool is_nhwc(const Tensor& x) { return x.dim() == 4 && x.stride(1) == 1 && x.size(1) > 1; }

template <typename T>
const void* at(const void* data, int64_t offset) {
  return data ? static_cast<const T*>(data) + offset : nullptr;
}

// The maps of one call, and what is done to one image or a part of it.
template <typename T>
struct Maps {
  Map x, residual, out;
  const void *x_data, *residual_data;
  void* out_data;
  Act act;
  bool streams = false;  // past the caches, into dense memory that is none of the inputs'

  // The same at other addresses, null for one that is absent.
  Maps at_addresses(const void* x_at, const void* residual_at, void* out_at) const {
    Maps maps = *this;
    maps.x_data = x_at, maps.residual_data = residual_at, maps.out_data = out_at;
    const bool dense =
        out.row_stride() == (x.nhwc ? out.C : out.HW) && out.stride_n == out.C * out.HW;
    const int64_t bytes = out.N * out.C * out.HW * sizeof(T);
    const bool fresh = out_at != nullptr && out_at != x_at && out_at != residual_at;
    maps.streams = dense && fresh && bytes >= UNCACHED_BYTES;
    if (dense && fresh) prefer_huge_pages(out_at, bytes);
    return maps;
  }

  int64_t chunks() const { return (x.HW + PIXELS - 1) / PIXELS; }
  // What sums of one image are kept in: partial sums where channels are innermost.
  int64_t sum_parts() const { return x.nhwc ? chunks() : 1; }
  int64_t sum_items() const { return x.nhwc ? chunks() : x.C; }
  int64_t scale_items() const { return x.nhwc ? x.HW : x.C; }

  void sum(int64_t n, int64_t first, int64_t last, float* partial) const {
    const void* image = at<T>(x_data, n * x.stride_n);
    if (!x.nhwc) return add_planes(Type<T>{}, image, x.HW, first, last, partial);
    for (int64_t chunk = first; chunk < last; ++chunk)
      add_pixels(Type<T>{}, at<T>(image, chunk * PIXELS * x.stride_p), x.stride_p, x.C,
                 std::min(PIXELS, x.HW - chunk * PIXELS), partial + chunk * x.C);
  }

  void scale(int64_t n, int64_t first, int64_t last, const float* gate) const {
    const Rows rows{at<T>(x_data, n * x.stride_n),
                    at<T>(residual_data, n * residual.stride_n),
                    const_cast<void*>(at<T>(out_data, n * out.stride_n)),
                    x.row_stride(),
                    residual.row_stride(),
                    out.row_stride(),
                    x.nhwc ? x.C : x.HW};
    if (streams)
      scale_streaming(rows, gate, first, last);
    else
      scale_cached(rows, gate, first, last);
  }

 private:
  void scale_cached(const Rows& rows, const float* gate, int64_t first, int64_t last) const {
    if (x.nhwc)
      scale_by_column(Type<T>{}, rows, act, gate, first, last);
    else
      scale_by_row(Type<T>{}, rows, act, gate, first, last);
  }

  // A few rows at a time by way of the nearest cache.
  void scale_streaming(const Rows& rows, const float* gate, int64_t first, int64_t last) const {
    constexpr int64_t SIZE = 4096;
    alignas(64) T near[SIZE];
    const int64_t width = std::min(rows.width, SIZE);
    const int64_t count = std::max<int64_t>(1, SIZE / rows.width);
    for (int64_t start = 0; start < rows.width; start += width)
      for (int64_t row = first; row < last; row += count) {
        const int64_t rows_now = std::min(count, last - row);
        const int64_t width_now = std::min(width, rows.width - start);
        const Rows part{at<T>(rows.x, row * rows.x_stride + start),
                        at<T>(rows.residual, row * rows.residual_stride + start),
                        near,
                        rows.x_stride,
                        rows.residual_stride,
                        width_now,
                        width_now};
        scale_cached(part, gate + (x.nhwc ? start : row), 0, rows_now);
        stream(const_cast<void*>(at<T>(rows.out, row * rows.out_stride + start)), near,
               rows_now * width_now * sizeof(T));
      }
    finish_streams();
  }
};

template <typename T>
Maps<T> maps_of(const char* op, const Tensor& x, const Maybe& residual, const Tensor* out,
                int64_t act) {
  const bool nhwc = is_nhwc(x);
  Maps<T> maps{};
  maps.x = map_of(op, x, nhwc);
  maps.x_data = x.const_data_ptr();
  maps.act = static_cast<Act>(act);
  if (residual) {
    CVK_CHECK_SAME(op, *residual, x);
    maps.residual = map_of(op, *residual, nhwc);
    CVK_CHECK(op, residual->sizes().equals(x.sizes()), "residual must have x's shape, got ",
              shape_of(*residual));
    maps.residual_data = residual->const_data_ptr();
  }
  if (out) {
    CVK_CHECK_SAME(op, *out, x);
    CVK_CHECK(op, out->sizes().equals(x.sizes()), "out must have x's shape, got ", shape_of(*out));
    maps.out = map_of(op, *out, nhwc);
    maps.out_data = out->mutable_data_ptr();
  }
  return maps;
}

}  // namespace cvkernels::squeeze_excite
