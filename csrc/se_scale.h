// Arithmetic of se_scale: the sums, the two layers and the scaling, as plain loops
// that vectorise. No torch header.
#pragma once

#include <cstdint>

#include "element.h"
#include "exponential.h"

namespace cvkernels::se_scale {

enum class Act : int64_t { NONE = 0, RELU = 1, SILU = 2 };

// Pixels whose sum is taken at once; sums of sums keep the rounding of large maps small.
constexpr int64_t PIXELS = 128;

CVK_HOST_DEVICE float sigmoid(float x) {
  const float y = 1.0f / (1.0f + exponential(-x));
  return x != x ? x : y;
}

template <Act ACT>
CVK_HOST_DEVICE float activate(float x) {
  if constexpr (ACT == Act::RELU) return x < 0.0f ? 0.0f : x;
  if constexpr (ACT == Act::SILU) return x / (1.0f + exponential(-x));
  return x;
}

CVK_HOST_DEVICE float activate(Act act, float x) {
  if (act == Act::RELU) return activate<Act::RELU>(x);
  return act == Act::SILU ? activate<Act::SILU>(x) : x;
}

// sums[c] = the sum of x[p, c] over `count` pixels, at most PIXELS.
template <typename T>
CVK_HOST_DEVICE void sum_pixels(const void* x_data, int64_t stride, int64_t C, int64_t count,
                                float* __restrict__ sums) {
  using Bits = typename Element<T>::Bits;
  const Bits* x = static_cast<const Bits*>(x_data);
  for (int64_t c = 0; c < C; ++c) sums[c] = 0.0f;
  int64_t p = 0;
  for (; p + 8 <= count; p += 8, x += 8 * stride) {
    const Bits *a = x, *b = a + stride, *c = b + stride, *d = c + stride;
    const Bits *e = d + stride, *f = e + stride, *g = f + stride, *h = g + stride;
    CVK_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < C; ++i) {
      const float first = Element<T>::load(a[i]) + Element<T>::load(b[i]) +
                          (Element<T>::load(c[i]) + Element<T>::load(d[i]));
      const float second = Element<T>::load(e[i]) + Element<T>::load(f[i]) +
                           (Element<T>::load(g[i]) + Element<T>::load(h[i]));
      sums[i] += first + second;
    }
  }
  for (; p < count; ++p, x += stride) {
    CVK_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < C; ++i) sums[i] += Element<T>::load(x[i]);
  }
}

// The sum of one plane's HW neighbouring pixels. In double: it is read once from memory, which
// takes longer, and has the rounding of one addition.
template <typename T>
CVK_HOST_DEVICE float sum_plane(const void* x_data, int64_t HW) {
  const auto* x = static_cast<const typename Element<T>::Bits*>(x_data);
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < HW; ++i) sum += Element<T>::load(x[i]);
  return static_cast<float>(sum);
}

// One of the two layers: out[i][row] = act(weight[row] . in[i] + bias[row]) for each image i.
// weight[rows, columns] and bias hold T, in[images, columns] and out[images, rows] float.
struct Layer {
  const void* weight;
  const void* bias;  // may be null
  int64_t rows, columns;
  Act act;
};

// dots[i] = shared . others[i], each `size` long; `distance` leads from one other to the next.
template <typename S, typename T>
CVK_HOST_DEVICE void four_dots(const typename Element<S>::Bits* shared,
                               const typename Element<T>::Bits* others, int64_t distance,
                               int64_t size, float* dots) {
  const auto *first = others, *second = first + distance;
  const auto *third = second + distance, *fourth = third + distance;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < size; ++i) {
    const float value = Element<S>::load(shared[i]);
    a += value * Element<T>::load(first[i]);
    b += value * Element<T>::load(second[i]);
    c += value * Element<T>::load(third[i]);
    d += value * Element<T>::load(fourth[i]);
  }
  dots[0] = a, dots[1] = b, dots[2] = c, dots[3] = d;
}

// Rows [first, last) of a layer; four images share a row of weights, else four rows an image. Each
// product is summed in one order, however rows and images are shared out.
template <typename T>
CVK_HOST_DEVICE void layer_rows(const Layer& layer, int64_t images, const float* in, float* out,
                                int64_t first, int64_t last) {
  const auto* weight = static_cast<const typename Element<T>::Bits*>(layer.weight);
  const int64_t columns = layer.columns, rows = layer.rows;
  const int64_t fours = images / 4 * 4;
  float dots[4];
  for (int64_t row = first; row < last; ++row)
    for (int64_t i = 0; i < fours; i += 4) {
      four_dots<T, float>(weight + row * columns, in + i * columns, columns, columns, dots);
      for (int64_t j = 0; j < 4; ++j) out[(i + j) * rows + row] = dots[j];
    }
  for (int64_t i = fours; i < images; ++i)
    for (int64_t row = first; row < last;) {
      const int64_t count = last - row >= 4 ? 4 : 1;
      four_dots<float, T>(in + i * columns, weight + row * columns, count == 4 ? columns : 0,
                          columns, dots);
      for (int64_t j = 0; j < count; ++j) out[i * rows + row + j] = dots[j];
      row += count;
    }
  const auto* bias = static_cast<const typename Element<T>::Bits*>(layer.bias);
  for (int64_t i = 0; i < images; ++i)
    for (int64_t row = first; row < last; ++row) {
      const float y = out[i * rows + row] + (bias ? Element<T>::load(bias[row]) : 0.0f);
      out[i * rows + row] = activate(layer.act, y);
    }
}

// x, residual and out of one image as rows of neighbouring elements: a pixel's channels where they
// are innermost, else a channel's pixels. Bits of T, and strides from row to row.
struct Rows {
  const void* x;
  const void* residual;  // may be null
  void* out;
  int64_t x_stride, residual_stride, out_stride;
  int64_t width;
};

// out = act(x * gate + residual) in rows [first, last); a gate for each column, or for each row.
template <typename T, Act ACT, bool RESIDUAL, bool GATE_PER_ROW>
CVK_HOST_DEVICE void scale_rows(const Rows& rows, const float* __restrict__ gate, int64_t first,
                                int64_t last) {
  using Bits = typename Element<T>::Bits;
  for (int64_t row = first; row < last; ++row) {
    const Bits* x = static_cast<const Bits*>(rows.x) + row * rows.x_stride;
    const Bits* residual = static_cast<const Bits*>(rows.residual);
    if constexpr (RESIDUAL) residual += row * rows.residual_stride;
    Bits* out = static_cast<Bits*>(rows.out) + row * rows.out_stride;
    const float of_row = gate[GATE_PER_ROW ? row : 0];
    CVK_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < rows.width; ++i) {
      float y = Element<T>::load(x[i]) * (GATE_PER_ROW ? of_row : gate[i]);
      if constexpr (RESIDUAL) y += Element<T>::load(residual[i]);
      out[i] = Element<T>::store(activate<ACT>(y));
    }
  }
}

template <typename T, bool RESIDUAL, bool GATE_PER_ROW>
CVK_HOST_DEVICE void scale_rows(const Rows& rows, Act act, const float* gate, int64_t first,
                                int64_t last) {
  if (act == Act::RELU)
    scale_rows<T, Act::RELU, RESIDUAL, GATE_PER_ROW>(rows, gate, first, last);
  else if (act == Act::SILU)
    scale_rows<T, Act::SILU, RESIDUAL, GATE_PER_ROW>(rows, gate, first, last);
  else
    scale_rows<T, Act::NONE, RESIDUAL, GATE_PER_ROW>(rows, gate, first, last);
}

template <typename T, bool GATE_PER_ROW>
CVK_HOST_DEVICE void scale_rows(const Rows& rows, Act act, const float* gate, int64_t first,
                                int64_t last) {
  if (rows.residual != nullptr)
    scale_rows<T, true, GATE_PER_ROW>(rows, act, gate, first, last);
  else
    scale_rows<T, false, GATE_PER_ROW>(rows, act, gate, first, last);
}

}  // namespace cvkernels::se_scale
