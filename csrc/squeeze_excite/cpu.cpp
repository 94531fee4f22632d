// se_scale and its parts on the CPU. Schemas: cvkernels/ops/squeeze_excite/native.py.
#include <vector>

#include "common/arguments.h"
#include "squeeze_excite/maps.h"

namespace cvkernels::squeeze_excite {
namespace {

// The two layers; all four tensors hold one dtype.
struct Excite {
  ScalarType dtype;
  Layer first, second;

  int64_t C() const { return first.columns; }
  int64_t R() const { return first.rows; }
  int64_t K() const { return second.rows; }

  // The same with both weights and biases at these addresses.
  Excite at(void* const* layers) const {
    Excite excite = *this;
    excite.first.weight = layers[0], excite.first.bias = layers[1];
    excite.second.weight = layers[2], excite.second.bias = layers[3];
    return excite;
  }
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
  const int64_t R = weight1.size(0), C = weight1.size(1), K = weight2.size(0);
  CVK_CHECK(op, R > 0, "weight1 must have rows, got ", shape_of(weight1));
  CVK_CHECK_SAME(op, weight2, weight1);
  CVK_CHECK(op, K > 0 && weight2.size(1) == R, "weight2 must have rows and ", R, " columns, got ",
            shape_of(weight2));
  const auto data = [&](const Maybe& bias, int64_t size) -> const void* {
    if (!bias) return nullptr;
    CVK_CHECK_SAME(op, *bias, weight1);
    CVK_CHECK(op, bias->dim() == 1 && bias->size(0) == size && bias->is_contiguous(),
              "bias must be contiguous with shape [", size, "], got ", shape_of(*bias));
    return bias->const_data_ptr();
  };
  return {weight1.scalar_type(),
          {weight1.const_data_ptr(), data(bias1, R), R, C, static_cast<Act>(act)},
          {weight2.const_data_ptr(), data(bias2, K), K, R, Act::NONE}};
}

// gate[images, K] = the logits, or their sigmoid, of mean[images, C]; hidden[images, R] is scratch.
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
  if (sigmoid) apply_sigmoid(gate, images * excite.K());
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
  if (x.N == 1 || (x.N < threads && x.C * x.HW / 32768 > x.N)) {
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

// The means of every image of the maps, to means[N, C].
template <typename T>
void squeeze_images(const Maps<T>& maps, void* means) {
  const Map& map = maps.x;
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
    store_floats(Type<T>{}, mean.data(), map.C, const_cast<void*>(at<T>(means, n * map.C)));
  }
}

void squeeze_out(const Tensor& x, const Tensor& out) {
  const Map map = map_of("squeeze", x, is_nhwc(x));
  CVK_CHECK_SAME("squeeze", out, x);
  CVK_CHECK("squeeze",
            out.dim() == 2 && out.size(0) == map.N && out.size(1) == map.C && out.is_contiguous(),
            "out must be contiguous with shape [", map.N, ", ", map.C, "], got ", shape_of(out));
  dispatch("squeeze", x.scalar_type(), [&]<typename T>(Type<T>) {
    const Maps<T> maps = maps_of<T>("squeeze", x, std::nullopt, nullptr, 0);
    perform({x.const_data_ptr(), out.mutable_data_ptr()}, [=](void* const* at) {
      squeeze_images(maps.at_addresses(at[0], nullptr, nullptr), at[1]);
    });
  });
}

Tensor squeeze(const Tensor& x) {
  CVK_CHECK_DIM("squeeze", x, 4);
  const Tensor out = new_matrix(x, x.size(0), x.size(1), x.scalar_type());
  squeeze_out(x, out);
  return out;
}

// count: of the pixels, where pooled holds their sums; 0 where it holds means.
Tensor excite(const Tensor& pooled, const Tensor& weight1, const Maybe& bias1,
              const Tensor& weight2, const Maybe& bias2, int64_t act, bool sigmoid, int64_t count) {
  CVK_CHECK_CPU("excite", pooled);
  const Excite layers = excite_of("excite", weight1, bias1, weight2, bias2, act);
  CVK_CHECK("excite", pooled.dim() == 2 && pooled.size(1) == layers.C() && pooled.is_contiguous(),
            "pooled must be contiguous with shape [N, ", layers.C(), "], got ", shape_of(pooled));
  const int64_t N = pooled.size(0), size = N * layers.C(), made = N * layers.K();
  const ScalarType dtype = count ? weight1.scalar_type() : pooled.scalar_type();
  const Tensor out = new_matrix(pooled, N, layers.K(), dtype);
  const ScalarType from_dtype = pooled.scalar_type();
  perform({pooled.const_data_ptr(), layers.first.weight, layers.first.bias, layers.second.weight,
           layers.second.bias, out.mutable_data_ptr()},
          [=](void* const* at) {
            std::vector<float> mean(size), hidden(N * layers.R()), gate(made);
            dispatch("excite", from_dtype,
                     [&](auto type) { load_floats(type, at[0], size, mean.data()); });
            if (count)
              for (float& value : mean) value /= static_cast<float>(count);
            excite_images(layers.at(at + 1), N, mean.data(), hidden.data(), gate.data(), sigmoid);
            dispatch("excite", dtype,
                     [&](auto type) { store_floats(type, gate.data(), made, at[5]); });
          });
  return out;
}

// Every image of the maps by gates[N, C], which are logits.
template <typename T>
void scale_images(const Maps<T>& maps, ScalarType gate_dtype, const void* gates) {
  const Map& map = maps.x;
  std::vector<float> multiplier(map.N * map.C);
  dispatch("se_scale", gate_dtype,
           [&](auto type) { load_floats(type, gates, map.N * map.C, multiplier.data()); });
  apply_sigmoid(multiplier.data(), map.N * map.C);
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
}

void se_scale_out(const Tensor& x, const Tensor& gate, const Maybe& residual, int64_t act,
                  const Tensor& out) {
  const Map map = map_of("se_scale", x, is_nhwc(x));
  CVK_CHECK_CPU("se_scale", gate);
  CVK_CHECK(
      "se_scale",
      gate.dim() == 2 && gate.size(0) == map.N && gate.size(1) == map.C && gate.is_contiguous(),
      "gate must be contiguous with shape [", map.N, ", ", map.C, "], got ", shape_of(gate));
  const ScalarType gate_dtype = gate.scalar_type();
  dispatch("se_scale", x.scalar_type(), [&]<typename T>(Type<T>) {
    const Maps<T> maps = maps_of<T>("se_scale", x, residual, &out, act);
    perform({maps.x_data, gate.const_data_ptr(), maps.residual_data, maps.out_data},
            [=](void* const* at) {
              scale_images(maps.at_addresses(at[0], at[2], at[3]), gate_dtype, at[1]);
            });
  });
}

void squeeze_excite_out(const Tensor& x, const Tensor& weight1, const Maybe& bias1,
                        const Tensor& weight2, const Maybe& bias2, int64_t act,
                        const Maybe& residual, int64_t out_act, const Tensor& out) {
  const Map map = map_of("squeeze_excite", x, is_nhwc(x));
  const Excite layers = excite_of("squeeze_excite", weight1, bias1, weight2, bias2, act);
  CVK_CHECK("squeeze_excite", layers.C() == map.C && layers.K() == map.C,
            "the layers must be from ", map.C, " channels to as many, got weight1 ",
            shape_of(weight1), " and weight2 ", shape_of(weight2));
  dispatch("squeeze_excite", x.scalar_type(), [&]<typename T>(Type<T>) {
    const Maps<T> maps = maps_of<T>("squeeze_excite", x, residual, &out, out_act);
    const int64_t element_size = x.element_size();
    perform({maps.x_data, layers.first.weight, layers.first.bias, layers.second.weight,
             layers.second.bias, maps.residual_data, maps.out_data},
            [=](void* const* at) {
              run_block(maps.at_addresses(at[0], at[5], at[6]), layers.at(at + 1), element_size);
            });
  });
}

// A float32 matrix [N, C], dense.
float* matrix_of(const char* op, const char* name, const Tensor& matrix, const Map& map) {
  CVK_CHECK_CPU(op, matrix);
  CVK_CHECK(op,
            matrix.dim() == 2 && matrix.size(0) == map.N && matrix.size(1) == map.C &&
                matrix.is_contiguous() && matrix.scalar_type() == ScalarType::Float,
            name, " must be float32 and contiguous with shape [", map.N, ", ", map.C, "], got ",
            shape_of(matrix));
  return static_cast<float*>(matrix.mutable_data_ptr());
}

// A channels_last map like x.
Map map_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  CVK_CHECK_SAME(op, tensor, x);
  CVK_CHECK(op, tensor.sizes().equals(x.sizes()), name, " must have x's shape, got ",
            shape_of(tensor));
  return map_of(op, tensor, true);
}

// sums[n, c] = sum of dz * x over the pixels; dz = grad, or where `out` > 0, also in `masked`.
void sum_gradients(const Tensor& grad, const Tensor& x, const Maybe& out, const Maybe& masked,
                   const Tensor& sums) {
  const char* op = "se_scale_native_sums";
  const Map map = map_of(op, x, true), from = map_like(op, "grad", grad, x);
  CVK_CHECK(op, out.has_value() == masked.has_value(), "out and masked belong together");
  const Map of_out = out ? map_like(op, "out", *out, x) : Map{};
  const Map to = masked ? map_like(op, "masked", *masked, x) : Map{};
  float* sums_data = matrix_of(op, "sums", sums, map);
  dispatch(op, x.scalar_type(), [&]<typename T>(Type<T> type) {
    const int64_t chunk = 4 * PRODUCTS, chunks = (map.HW + chunk - 1) / chunk;
    std::vector<double> partial(map.N * chunks * map.C);
    parallel_for(0, map.N * chunks, grain_of(chunk * map.C), [&](int64_t first, int64_t last) {
      std::vector<float> memory(map.C);
      for (int64_t item = first; item < last; ++item) {
        const int64_t n = item / chunks, start = item % chunks * chunk;
        const Gradients maps{
            at<T>(grad.const_data_ptr(), n * from.stride_n),
            at<T>(x.const_data_ptr(), n * map.stride_n),
            out ? at<T>(out->const_data_ptr(), n * of_out.stride_n) : nullptr,
            masked ? const_cast<void*>(at<T>(masked->mutable_data_ptr(), n * to.stride_n))
                   : nullptr,
            from.stride_p,
            map.stride_p,
            of_out.stride_p,
            to.stride_p,
            map.C};
        add_all_products(type, maps, start, std::min(map.HW, start + chunk), &partial[item * map.C],
                         memory.data());
      }
    });
    for (int64_t n = 0; n < map.N; ++n)
      for (int64_t c = 0; c < map.C; ++c) {
        double total = 0;
        for (int64_t i = 0; i < chunks; ++i) total += partial[(n * chunks + i) * map.C + c];
        sums_data[n * map.C + c] = static_cast<float>(total);
      }
  });
}

// out = x * scale[n, c] + shift[n, c].
void scale_shifted(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& out) {
  const char* op = "se_scale_native_shifted";
  const Map map = map_of(op, x, true), to = map_like(op, "out", out, x);
  const float *scales = matrix_of(op, "scale", scale, map),
              *shifts = matrix_of(op, "shift", shift, map);
  dispatch(op, x.scalar_type(), [&]<typename T>(Type<T> type) {
    parallel_for(0, map.N * map.HW, grain_of(map.C), [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last;) {
        const int64_t n = item / map.HW, start = item % map.HW;
        const int64_t stop = std::min(map.HW, start + last - item);
        const Rows rows{at<T>(x.const_data_ptr(), n * map.stride_n),
                        nullptr,
                        const_cast<void*>(at<T>(out.mutable_data_ptr(), n * to.stride_n)),
                        map.stride_p,
                        0,
                        to.stride_p,
                        map.C};
        scale_and_shift(type, rows, scales + n * map.C, shifts + n * map.C, start, stop);
        item += stop - start;
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("squeeze_native", TORCH_BOX(&squeeze));
  library.impl("squeeze_native_out", TORCH_BOX(&squeeze_out));
  library.impl("excite_native", TORCH_BOX(&excite));
  library.impl("se_scale_native_out", TORCH_BOX(&se_scale_out));
  library.impl("squeeze_excite_native_out", TORCH_BOX(&squeeze_excite_out));
  library.impl("se_scale_native_sums", TORCH_BOX(&sum_gradients));
  library.impl("se_scale_native_shifted", TORCH_BOX(&scale_shifted));
}

}  // namespace
}  // namespace cvkernels::squeeze_excite
