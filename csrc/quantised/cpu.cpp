// Between numbers and the bytes that stand for them, on the CPU. Schemas:
// cvkernels/ops/quantised/maps.py.
#include <algorithm>

#include "common/arguments.h"
#include "common/cpu.h"
#include "common/layout.h"
#include "common/number.h"

namespace cvkernels::quantised {
namespace {

// A map from x to x * scale + shift.
struct Line {
  float scale, shift;

  CVK_HOST_DEVICE float operator()(float x) const { return x * scale + shift; }
};

// Elements that lie together.
template <typename From, typename To>
CVK_HOST_DEVICE void map_elements(const From* __restrict__ x, To* __restrict__ out,
                                  const Line& line, int64_t count) {
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) out[i] = Number<To>::narrow(line(Number<From>::widen(x[i])));
}

// Pixels of three channels as bytes side by side, and a fourth that is `fill`. The channels of
// neighbouring pixels are STEP apart.
template <int STEP>
CVK_HOST_DEVICE void pack_pixels(const float* __restrict__ red, const float* __restrict__ green,
                                 const float* __restrict__ blue, uint32_t* __restrict__ out,
                                 const Line& line, uint32_t fill, int64_t count) {
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t r = rounded_byte(line(red[i * STEP]));
    const uint32_t g = rounded_byte(line(green[i * STEP]));
    const uint32_t b = rounded_byte(line(blue[i * STEP]));
    out[i] = r | g << 8 | b << 16 | fill << 24;
  }
}

// Functions and not templates: compilers clone only those for each instruction set.
CVK_SIMD void map_all(const float* x, uint8_t* out, const Line& line, int64_t count) {
  map_elements(x, out, line, count);
}
CVK_SIMD void map_all(const uint8_t* x, float* out, const Line& line, int64_t count) {
  map_elements(x, out, line, count);
}
CVK_SIMD void map_all(const uint8_t* x, uint8_t* out, const Line& line, int64_t count) {
  map_elements(x, out, line, count);
}
CVK_SIMD void pack_all(const float* red, const float* green, const float* blue, uint32_t* out,
                       const Line& line, uint32_t fill, int64_t count) {
  pack_pixels<1>(red, green, blue, out, line, fill, count);
}
CVK_SIMD void pack_together(const float* x, uint32_t* out, const Line& line, uint32_t fill,
                            int64_t count) {
  pack_pixels<3>(x, x + 1, x + 2, out, line, fill, count);
}

struct Shape {
  int64_t N, C, H, W;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of x
  int64_t channels, out_stride;                    // of out, the distance from pixel to pixel
  float fill;                                      // of the channels that x lacks
};

// Rows [first, last) of the N * H.
template <typename From, typename To>
void map_rows(const Shape& shape, const From* x, To* out, const Line& line, int64_t first,
              int64_t last) {
  const auto& [N, C, H, W, stride_n, stride_c, stride_h, stride_w, channels, step, fill] = shape;
  for (int64_t row = first; row < last; ++row) {
    const From* from = x + row / H * stride_n + row % H * stride_h;
    To* to = out + row * W * step;
    if constexpr (std::is_same_v<From, float> && std::is_same_v<To, uint8_t>) {
      if (C == 3 && channels == 4 && step == 4) {
        auto* pixels = reinterpret_cast<uint32_t*>(to);
        const uint32_t last = Number<uint8_t>::narrow(fill);
        if (stride_w == 1) {
          pack_all(from, from + stride_c, from + 2 * stride_c, pixels, line, last, W);
          continue;
        }
        if (stride_w == 3 && stride_c == 1) {
          pack_together(from, pixels, line, last, W);
          continue;
        }
      }
    }
    if (stride_c == 1 && stride_w == C && step == C && channels == C) {
      map_all(from, to, line, W * C);
      continue;
    }
    for (int64_t w = 0; w < W; ++w, from += stride_w, to += step) {
      if (stride_c == 1)
        map_all(from, to, line, C);
      else
        for (int64_t c = 0; c < C; ++c)
          to[c] = Number<To>::narrow(line(Number<From>::widen(from[c * stride_c])));
      std::fill(to + C, to + channels, Number<To>::narrow(fill));
    }
  }
}

void quantised_map(const Tensor& x, double scale, double shift, double fill, const Tensor& out) {
  constexpr const char* OP = "quantised_map";
  CVK_CHECK_CPU(OP, x);
  CVK_CHECK_CPU(OP, out);
  CVK_CHECK_DIM(OP, x, 4);
  CVK_CHECK_DIM(OP, out, 4);
  const bool widens = out.scalar_type() == ScalarType::Float;
  const bool from_bytes = x.scalar_type() == ScalarType::Byte;
  CVK_CHECK(OP,
            (from_bytes || (x.scalar_type() == ScalarType::Float && !widens)) &&
                (widens || out.scalar_type() == ScalarType::Byte),
            "x and out must be uint8 and float32, or both uint8, got ",
            torch::headeronly::toString(x.scalar_type()), " and ",
            torch::headeronly::toString(out.scalar_type()));
  Shape shape{x.size(0),   x.size(1),   x.size(2),   x.size(3),  x.stride(0),
              x.stride(1), x.stride(2), x.stride(3), out.size(1)};
  CVK_CHECK(OP,
            out.size(0) == shape.N && out.size(2) == shape.H && out.size(3) == shape.W &&
                shape.channels >= shape.C,
            "out must have the size of x and at least its channels, got ", shape_of(out), " for ",
            shape_of(x));
  shape.out_stride = pixel_stride(OP, "out", out);
  shape.fill = static_cast<float>(fill);
  const Line line{static_cast<float>(scale), static_cast<float>(shift)};
  if (out.numel() == 0) return;
  perform({x.const_data_ptr(), out.mutable_data_ptr()}, [=](void* const* at) {
    const auto run = [&](auto* from, auto* to) {
      parallel_for(
          0, shape.N * shape.H, grain_of(shape.W * shape.channels),
          [&](int64_t first, int64_t last) { map_rows(shape, from, to, line, first, last); });
    };
    const auto bytes = [at](int i) { return static_cast<uint8_t*>(at[i]); };
    const auto floats = [at](int i) { return static_cast<float*>(at[i]); };
    if (widens) return run(bytes(0), floats(1));
    from_bytes ? run(bytes(0), bytes(1)) : run(floats(0), bytes(1));
  });
}

// Channels of a task that takes a mean.
constexpr int64_t CHANNELS = 256;

// sums[c] of pixels of x, `stride` apart.
CVK_SIMD void add_pixels(const uint8_t* x, int64_t stride, int64_t pixels, int64_t channels,
                         int32_t* __restrict__ sums) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += stride)
    for (int64_t c = 0; c < channels; ++c) sums[c] += x[c];
}

// The same of relu(x * scale + shift).
CVK_SIMD void add_affine_pixels(const uint8_t* x, int64_t stride, int64_t pixels, int64_t channels,
                                const float* scale, const float* shift, float* __restrict__ sums) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += stride)
    for (int64_t c = 0; c < channels; ++c) {
      const float y = static_cast<float>(x[c]) * scale[c] + shift[c];
      sums[c] += y < 0.0f ? 0.0f : y;
    }
}

// out[N, C] = (mean of x over its pixels) * scale + shift, or with an affine map [2, C] the mean of
// relu(x * affine[0] + affine[1]).
void quantised_mean(const Tensor& x, double scale, double shift, const Maybe& affine,
                    const Tensor& out) {
  constexpr const char* OP = "quantised_mean";
  CVK_CHECK_CPU(OP, x);
  CVK_CHECK_DIM(OP, x, 4);
  CVK_CHECK(OP, x.scalar_type() == ScalarType::Byte, "x must be uint8, got ",
            torch::headeronly::toString(x.scalar_type()));
  const int64_t N = x.size(0), C = x.size(1), pixels = x.size(2) * x.size(3);
  CVK_CHECK(OP, pixels > 0 && pixels <= (int64_t{1} << 23), "x must have between 1 and ",
            int64_t{1} << 23, " pixels, got shape ", shape_of(x));
  const int64_t stride = pixel_stride(OP, "x", x);
  const void* to = floats_of(OP, "out", out, N * C);
  const void* vectors = floats_of(OP, "affine", affine, 2 * C);
  const double count = static_cast<double>(pixels);
  const float inverse = static_cast<float>(1.0 / count);
  const Line line{static_cast<float>(scale / count), static_cast<float>(shift)};
  perform({x.const_data_ptr(), vectors, to}, [=](void* const* at) {
    const auto* bytes = static_cast<const uint8_t*>(at[0]);
    const auto* before = static_cast<const float*>(at[1]);
    auto* means = static_cast<float*>(at[2]);
    const int64_t parts = (C + CHANNELS - 1) / CHANNELS;
    parallel_for(0, N * parts, grain_of(pixels * CHANNELS), [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t n = task / parts, begin = task % parts * CHANNELS;
        const int64_t channels = std::min(CHANNELS, C - begin);
        const uint8_t* from = bytes + n * pixels * stride + begin;
        if (before != nullptr) {
          float sums[CHANNELS] = {};
          add_affine_pixels(from, stride, pixels, channels, before + begin, before + C + begin,
                            sums);
          for (int64_t c = 0; c < channels; ++c) means[n * C + begin + c] = sums[c] * inverse;
          continue;
        }
        int32_t sums[CHANNELS] = {};
        add_pixels(from, stride, pixels, channels, sums);
        for (int64_t c = 0; c < channels; ++c)
          means[n * C + begin + c] = line(static_cast<float>(sums[c]));
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("quantised_map", TORCH_BOX(&quantised_map));
  library.impl("quantised_mean", TORCH_BOX(&quantised_mean));
}

}  // namespace
}  // namespace cvkernels::quantised
