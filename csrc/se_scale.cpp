// se_scale and its parts on the CPU. Schemas: cvkernels/ops/se_scale/native.py.
#include "se_scale.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "check.h"
#include "large_output.h"

namespace cvkernels::se_scale {
namespace {

using torch::stable::parallel_for;
using Maybe = std::optional<Tensor>;

// Functions and not templates: compilers clone only those for each instruction set.
#define CVK_LOOPS(T)                                                                               \
  CVK_SIMD void add_pixels(Type<T>, const void* x, int64_t stride, int64_t C, int64_t count,       \
                           float* sums) {                                                          \
    sum_pixels<T>(x, stride, C, count, sums);                                                      \
  }                                                                                                \
  CVK_SIMD void add_planes(Type<T>, const void* x, int64_t HW, int64_t first, int64_t last,        \
                           float* sums) {                                                          \
    for (int64_t c = first; c < last; ++c)                                                         \
      sums[c] = sum_plane<T>(static_cast<const Element<T>::Bits*>(x) + c * HW, HW);                \
  }                                                                                                \
  CVK_SIMD void run_layer(Type<T>, const Layer& layer, int64_t images, const float* in,            \
                          float* out, int64_t first, int64_t last) {                               \
    layer_rows<T>(layer, images, in, out, first, last);                                            \
  }                                                                                                \
  CVK_SIMD void scale_by_column(Type<T>, const Rows& rows, Act act, const float* gate,             \
                                int64_t first, int64_t last) {                                     \
    scale_rows<T, false>(rows, act, gate, first, last);                                            \
  }                                                                                                \
  CVK_SIMD void scale_by_row(Type<T>, const Rows& rows, Act act, const float* gate, int64_t first, \
                             int64_t last) {                                                       \
    scale_rows<T, true>(rows, act, gate, first, last);                                             \
  }                                                                                                \
  CVK_SIMD void load_floats(Type<T>, const void* from, int64_t count, float* to) {                 \
    for (int64_t i = 0; i < count; ++i)                                                            \
      to[i] = Element<T>::load(static_cast<const Element<T>::Bits*>(from)[i]);                     \
  }                                                                                                \
  CVK_SIMD void store_floats(Type<T>, const float* from, int64_t count, void* to) {                \
    for (int64_t i = 0; i < count; ++i)                                                            \
      static_cast<Element<T>::Bits*>(to)[i] = Element<T>::store(from[i]);                          \
  }
CVK_LOOPS(float)
CVK_LOOPS(float16)
CVK_LOOPS(bfloat16)
#undef CVK_LOOPS

CVK_SIMD void apply_sigmoid(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = sigmoid(values[i]);
}

CVK_SIMD void finish_sums(const float* partial, int64_t parts, int64_t C, float divisor,
                          float* mean) {
  for (int64_t c = 0; c < C; ++c) mean[c] = 0.0f;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t c = 0; c < C; ++c) mean[c] += partial[part * C + c];
  for (int64_t c = 0; c < C; ++c) mean[c] /= divisor;
}

template <typename Launch>
void dispatch(const char* op, ScalarType dtype, Launch&& launch) {
  dispatch_floating(op, dtype, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), Type<double>>)
      fail(op, ": dtype must be float32, float16 or bfloat16, got Double");
    else
      launch(type);
  });
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

Map map_of(const char* op, const Tensor& x, bool nhwc) {
  CVK_CHECK_CPU(op, x);
  CVK_CHECK_DIM(op, x, 4);
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  CVK_CHECK(op, C > 0 && H * W > 0, "x must have channels and pixels, got ", shape_of(x));
  const int64_t stride_p = W > 1 ? x.stride(3) : x.stride(2);
  const bool flat = H == 1 || W == 1 || x.stride(2) == W * x.stride(3);
  const bool fits = nhwc ? flat && (C == 1 || x.stride(1) == 1) : x.is_contiguous();
  CVK_CHECK(op, fits || x.numel() == 0, "a tensor of shape ", shape_of(x),
            " is neither contiguous nor channels_last as x is");
  return {x.size(0), C, H * W, nhwc, x.stride(0), stride_p};
}

bool is_nhwc(const Tensor& x) { return x.dim() == 4 && x.stride(1) == 1 && x.size(1) > 1; }

template <typename T>
const void* at(const void* data, int64_t offset) {
  return data ? static_cast<const Element<T>::Bits*>(data) + offset : nullptr;
}

// Elements of a task that is worth a thread.
constexpr int64_t TASK = 32768;

int64_t grain_of(int64_t elements_per_item) {
  return std::max<int64_t>(1, TASK / std::max<int64_t>(1, elements_per_item));
}

// The maps of one call, and what is done to one image or a part of it.
template <typename T>
struct Maps {
  Map x, residual, out;
  const void *x_data, *residual_data;
  void* out_data;
  Act act;
  bool streams;  // past the caches, into dense memory that is none of the inputs'

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
    using Bits = Element<T>::Bits;
    constexpr int64_t SIZE = 4096;
    alignas(64) Bits near[SIZE];
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
               rows_now * width_now * sizeof(Bits));
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
    const int64_t bytes = maps.out.N * maps.out.C * maps.out.HW * sizeof(typename Element<T>::Bits);
    const bool dense = maps.out.row_stride() == (nhwc ? maps.out.C : maps.out.HW) &&
                       maps.out.stride_n == maps.out.C * maps.out.HW;
    const bool fresh = maps.out_data != maps.x_data && maps.out_data != maps.residual_data;
    maps.streams = dense && fresh && bytes >= UNCACHED_BYTES;
    if (dense && fresh) prefer_huge_pages(maps.out_data, bytes);
  }
  return maps;
}

// The two layers; all four tensors hold one dtype.
struct Excite {
  ScalarType dtype;
  Layer first, second;

  int64_t C() const { return second.rows; }
  int64_t R() const { return first.rows; }
};

Excite excite_of(const char* op, const Tensor& weight1, const Maybe& bias1, const Tensor& weight2,
                 const Maybe& bias2, int64_t act) {
  for (const Tensor* weight : {&weight1, &weight2}) {
    CVK_CHECK_CPU(op, *weight);
    CVK_CHECK(
        op,
        weight->dim() == 2 || (weight->dim() == 4 && weight->size(2) == 1 && weight->size(3) == 1),
        "a weight must be a matrix or a 1x1 convolution's, got ", shape_of(*weight));
    CVK_CHECK(op, weight->is_contiguous(), "weights must be contiguous");
  }
  const int64_t R = weight1.size(0), C = weight1.size(1);
  CVK_CHECK_SAME(op, weight2, weight1);
  CVK_CHECK(op, weight2.size(0) == C && weight2.size(1) == R, "weight2 must have shape [", C, ", ",
            R, "], got ", shape_of(weight2));
  const auto data = [&](const Maybe& bias, int64_t size) -> const void* {
    if (!bias) return nullptr;
    CVK_CHECK_SAME(op, *bias, weight1);
    CVK_CHECK(op, bias->dim() == 1 && bias->size(0) == size && bias->is_contiguous(),
              "bias must be contiguous with shape [", size, "], got ", shape_of(*bias));
    return bias->const_data_ptr();
  };
  return {weight1.scalar_type(),
          {weight1.const_data_ptr(), data(bias1, R), R, C, static_cast<Act>(act)},
          {weight2.const_data_ptr(), data(bias2, C), C, R, Act::NONE}};
}

// gate[images, C] = the logits, or their sigmoid, of mean[images, C]; hidden[images, R] is scratch.
void excite_images(const Excite& excite, int64_t images, const float* mean, float* hidden,
                   float* gate, bool sigmoid) {
  dispatch("excite", excite.dtype, [&](auto type) {
    const auto run = [&](const Layer& layer, const float* in, float* out) {
      parallel_for(0, layer.rows, grain_of(images * layer.columns),
                   [&](int64_t first, int64_t last) {
                     run_layer(type, layer, images, in, out, first, last);
                   });
    };
    run(excite.first, mean, hidden);
    run(excite.second, hidden, gate);
  });
  if (sigmoid) apply_sigmoid(gate, images * excite.C());
}

// Images that a thread takes together: the layers' weights are read once for four of them, and
// their maps are still in the cache when they are scaled.
int64_t group_of(int64_t image_bytes, int64_t images, int64_t threads) {
  constexpr int64_t CACHE = 1 << 22;
  const int64_t fitting = std::min(CACHE / image_bytes, images / threads);
  return fitting >= 8 ? 8 : (fitting >= 4 ? 4 : 1);
}

// What was summed last, which is in the nearest cache, is scaled first.
template <typename T>
void scale_backwards(const Maps<T>& maps, int64_t n, int64_t first, int64_t last,
                     const float* gate) {
  const int64_t step = grain_of(maps.x.nhwc ? maps.x.C : maps.x.HW);
  for (int64_t end = last; end > first; end -= step)
    maps.scale(n, std::max(first, end - step), end, gate);
}

template <typename T>
void run_block(const Maps<T>& maps, const Excite& excite, int64_t element_size) {
  const Map& x = maps.x;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = maps.sum_parts();
  const auto floats = static_cast<float>(x.HW);
  // Threads share an image where it keeps more of them busy than there are images.
  if (x.N == 1 || (x.N < threads && x.C * x.HW / TASK > x.N)) {
    std::vector<float> partial(parts * x.C), mean(x.C), hidden(excite.R()), gate(x.C);
    for (int64_t n = 0; n < x.N; ++n) {
      parallel_for(0, maps.sum_items(), grain_of(x.nhwc ? PIXELS * x.C : x.HW),
                   [&](int64_t first, int64_t last) { maps.sum(n, first, last, partial.data()); });
      finish_sums(partial.data(), parts, x.C, floats, mean.data());
      excite_images(excite, 1, mean.data(), hidden.data(), gate.data(), true);
      parallel_for(
          0, maps.scale_items(), grain_of(x.nhwc ? x.C : x.HW),
          [&](int64_t first, int64_t last) { scale_backwards(maps, n, first, last, gate.data()); });
    }
    return;
  }
  const int64_t group = group_of(x.C * x.HW * element_size, x.N, threads);
  const int64_t groups = (x.N + group - 1) / group;
  parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    std::vector<float> partial(parts * x.C), mean(group * x.C), hidden(group * excite.R());
    std::vector<float> gate(group * x.C);
    for (int64_t g = first; g < last; ++g) {
      const int64_t start = g * group, images = std::min(group, x.N - start);
      for (int64_t i = 0; i < images; ++i) {
        maps.sum(start + i, 0, maps.sum_items(), partial.data());
        finish_sums(partial.data(), parts, x.C, floats, mean.data() + i * x.C);
      }
      excite_images(excite, images, mean.data(), hidden.data(), gate.data(), true);
      for (int64_t i = images; i-- > 0;)
        scale_backwards(maps, start + i, 0, maps.scale_items(), gate.data() + i * x.C);
    }
  });
}

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  return torch::stable::empty({rows, columns}, dtype, std::nullopt, like.device());
}

Tensor squeeze(const Tensor& x) {
  const Map map = map_of("squeeze", x, is_nhwc(x));
  const Tensor out = new_matrix(x, map.N, map.C, x.scalar_type());
  dispatch("squeeze", x.scalar_type(), [&]<typename T>(Type<T> type) {
    const Maps<T> maps = maps_of<T>("squeeze", x, std::nullopt, nullptr, 0);
    const int64_t parts = maps.sum_parts(), items = maps.sum_items();
    std::vector<float> partial(map.N * parts * map.C), mean(map.C);
    parallel_for(0, map.N * items, grain_of(map.nhwc ? PIXELS * map.C : map.HW),
                 [&](int64_t first, int64_t last) {
                   for (int64_t item = first; item < last;) {
                     const int64_t n = item / items, start = item % items;
                     const int64_t stop = std::min(items, start + last - item);
                     maps.sum(n, start, stop, partial.data() + n * parts * map.C);
                     item += stop - start;
                   }
                 });
    for (int64_t n = 0; n < map.N; ++n) {
      finish_sums(partial.data() + n * parts * map.C, parts, map.C, static_cast<float>(map.HW),
                  mean.data());
      store_floats(type, mean.data(), map.C,
                   const_cast<void*>(at<T>(out.mutable_data_ptr(), n * map.C)));
    }
  });
  return out;
}

// count: of the pixels, where pooled holds their sums; 0 where it holds means.
Tensor excite(const Tensor& pooled, const Tensor& weight1, const Maybe& bias1,
              const Tensor& weight2, const Maybe& bias2, int64_t act, bool sigmoid, int64_t count) {
  CVK_CHECK_CPU("excite", pooled);
  const Excite layers = excite_of("excite", weight1, bias1, weight2, bias2, act);
  CVK_CHECK("excite", pooled.dim() == 2 && pooled.size(1) == layers.C() && pooled.is_contiguous(),
            "pooled must be contiguous with shape [N, ", layers.C(), "], got ", shape_of(pooled));
  const int64_t N = pooled.size(0), size = N * layers.C();
  const ScalarType dtype = count ? weight1.scalar_type() : pooled.scalar_type();
  const Tensor out = new_matrix(pooled, N, layers.C(), dtype);
  std::vector<float> mean(size), hidden(N * layers.R()), gate(size);
  dispatch("excite", pooled.scalar_type(),
           [&](auto type) { load_floats(type, pooled.const_data_ptr(), size, mean.data()); });
  if (count)
    for (float& value : mean) value /= static_cast<float>(count);
  excite_images(layers, N, mean.data(), hidden.data(), gate.data(), sigmoid);
  dispatch("excite", dtype,
           [&](auto type) { store_floats(type, gate.data(), size, out.mutable_data_ptr()); });
  return out;
}

void se_scale_out(const Tensor& x, const Tensor& gate, const Maybe& residual, int64_t act,
                  const Tensor& out) {
  const Map map = map_of("se_scale", x, is_nhwc(x));
  CVK_CHECK_CPU("se_scale", gate);
  CVK_CHECK(
      "se_scale",
      gate.dim() == 2 && gate.size(0) == map.N && gate.size(1) == map.C && gate.is_contiguous(),
      "gate must be contiguous with shape [", map.N, ", ", map.C, "], got ", shape_of(gate));
  std::vector<float> multiplier(map.N * map.C);
  dispatch("se_scale", gate.scalar_type(), [&](auto type) {
    load_floats(type, gate.const_data_ptr(), map.N * map.C, multiplier.data());
  });
  apply_sigmoid(multiplier.data(), map.N * map.C);
  dispatch("se_scale", x.scalar_type(), [&]<typename T>(Type<T>) {
    const Maps<T> maps = maps_of<T>("se_scale", x, residual, &out, act);
    const int64_t items = maps.scale_items();
    parallel_for(0, map.N * items, grain_of(map.nhwc ? map.C : map.HW),
                 [&](int64_t first, int64_t last) {
                   for (int64_t item = first; item < last;) {
                     const int64_t n = item / items, start = item % items;
                     const int64_t stop = std::min(items, start + last - item);
                     maps.scale(n, start, stop, multiplier.data() + n * map.C);
                     item += stop - start;
                   }
                 });
  });
}

void squeeze_excite_out(const Tensor& x, const Tensor& weight1, const Maybe& bias1,
                        const Tensor& weight2, const Maybe& bias2, int64_t act,
                        const Maybe& residual, int64_t out_act, const Tensor& out) {
  const Map map = map_of("squeeze_excite", x, is_nhwc(x));
  const Excite layers = excite_of("squeeze_excite", weight1, bias1, weight2, bias2, act);
  CVK_CHECK("squeeze_excite", layers.C() == map.C, "weight1 must have shape [R, ", map.C, "], got ",
            shape_of(weight1));
  dispatch("squeeze_excite", x.scalar_type(), [&]<typename T>(Type<T>) {
    run_block(maps_of<T>("squeeze_excite", x, residual, &out, out_act), layers, x.element_size());
  });
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("squeeze_native", TORCH_BOX(&squeeze));
  library.impl("excite_native", TORCH_BOX(&excite));
  library.impl("se_scale_native_out", TORCH_BOX(&se_scale_out));
  library.impl("squeeze_excite_native_out", TORCH_BOX(&squeeze_excite_out));
}

}  // namespace
}  // namespace cvkernels::se_scale
