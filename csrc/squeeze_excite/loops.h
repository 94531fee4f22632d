// Arithmetic of se_scale: the sums, the two layers and the scaling, as plain loops
// that vectorise. No torch header.
#pragma once

#include <cstdint>

#include "common/act.h"
#include "common/number.h"

namespace cvkernels::squeeze_excite {

// Pixels whose sum is taken at once; sums of sums keep the rounding of large maps small.
constexpr int64_t PIXELS = 128;

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
  const T* x = static_cast<const T*>(x_data);
  for (int64_t c = 0; c < C; ++c) sums[c] = 0.0f;
  int64_t p = 0;
  for (; p + 8 <= count; p += 8, x += 8 * stride) {
    const T *a = x, *b = a + stride, *c = b + stride, *d = c + stride;
    const T *e = d + stride, *f = e + stride, *g = f + stride, *h = g + stride;
    CVK_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < C; ++i) {
      const float first = Number<T>::widen(a[i]) + Number<T>::widen(b[i]) +
                          (Number<T>::widen(c[i]) + Number<T>::widen(d[i]));
      const float second = Number<T>::widen(e[i]) + Number<T>::widen(f[i]) +
                           (Number<T>::widen(g[i]) + Number<T>::widen(h[i]));
      sums[i] += first + second;
    }
  }
  for (; p < count; ++p, x += stride) {
    CVK_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < C; ++i) sums[i] += Number<T>::widen(x[i]);
  }
}

// The sum of one plane's HW neighbouring pixels. In double: it is read once from memory, which
// takes longer, and has the rounding of one addition.
template <typename T>
CVK_HOST_DEVICE float sum_plane(const void* x_data, int64_t HW) {
  const auto* x = static_cast<const T*>(x_data);
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < HW; ++i) sum += Number<T>::widen(x[i]);
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
CVK_HOST_DEVICE void four_dots(const S* shared, const T* others, int64_t distance, int64_t size,
                               float* dots) {
  const auto *first = others, *second = first + distance;
  const auto *third = second + distance, *fourth = third + distance;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < size; ++i) {
    const float value = Number<S>::widen(shared[i]);
    a += value * Number<T>::widen(first[i]);
    b += value * Number<T>::widen(second[i]);
    c += value * Number<T>::widen(third[i]);
    d += value * Number<T>::widen(fourth[i]);
  }
  dots[0] = a, dots[1] = b, dots[2] = c, dots[3] = d;
}

// Rows [first, last) of a layer; four images share a row of weights, else four rows an image. Each
// product is summed in one order, however rows and images are shared out.
template <typename T>
CVK_HOST_DEVICE void layer_rows(const Layer& layer, int64_t images, const float* in, float* out,
                                int64_t first, int64_t last) {
  const auto* weight = static_cast<const T*>(layer.weight);
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
  const auto* bias = static_cast<const T*>(layer.bias);
  for (int64_t i = 0; i < images; ++i)
    for (int64_t row = first; row < last; ++row) {
      const float y = out[i * rows + row] + (bias ? Number<T>::widen(bias[row]) : 0.0f);
      out[i * rows + row] = activate(layer.act, y);
    }
}

// x, residual and out of one image as rows of neighbouring elements: a pixel's channels where they
// are innermost, else a channel's pixels. T of T, and strides from row to row.
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
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_stride;
    const T* residual = static_cast<const T*>(rows.residual);
    if constexpr (RESIDUAL) residual += row * rows.residual_stride;
    T* out = static_cast<T*>(rows.out) + row * rows.out_stride;
    const float of_row = gate[GATE_PER_ROW ? row : 0];
    CVK_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < rows.width; ++i) {
      float y = Number<T>::widen(x[i]) * (GATE_PER_ROW ? of_row : gate[i]);
      if constexpr (RESIDUAL) y += Number<T>::widen(residual[i]);
      out[i] = Number<T>::narrow(activate<ACT>(y));
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

// The gradient, of channels_last maps: with z = x * s + residual and dz the gradient behind a ReLU
// where there is one, sums[c] of dz * x over an image's pixels, and dx = dz * s + shift.

// Pixels whose products are summed in float; these sums are summed in double.
constexpr int64_t PRODUCTS = 32;

// The pixels of an image: bits of T, and strides from pixel to pixel.
struct Gradients {
  const void *grad, *x;
  const void* out;  // what the ReLU gave; null where there is none
  void* masked;     // receives dz
  int64_t grad_stride, x_stride, out_stride, masked_stride, C;
};

template <typename T, int COUNT, bool MASKS>
CVK_HOST_DEVICE void add_products(const Gradients& maps, int64_t first, float* __restrict__ sums) {
  const T *grad[COUNT], *x[COUNT], *out[COUNT];
  T* masked[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    grad[i] = static_cast<const T*>(maps.grad) + (first + i) * maps.grad_stride;
    x[i] = static_cast<const T*>(maps.x) + (first + i) * maps.x_stride;
    if constexpr (MASKS) {
      out[i] = static_cast<const T*>(maps.out) + (first + i) * maps.out_stride;
      masked[i] = static_cast<T*>(maps.masked) + (first + i) * maps.masked_stride;
    }
  }
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < maps.C; ++c) {
    float sum = 0.0f;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      float dz = Number<T>::widen(grad[i][c]);
      if constexpr (MASKS) {
        dz = Number<T>::widen(out[i][c]) <= 0.0f ? 0.0f : dz;  // NaN passes, as in PyTorch
        masked[i][c] = Number<T>::narrow(dz);
      }
      sum += dz * Number<T>::widen(x[i][c]);
    }
    sums[c] += sum;
  }
}

// totals[c] += the products' sum over pixels [first, last); sums is memory for C.
template <typename T, bool MASKS>
CVK_HOST_DEVICE void sum_products(const Gradients& maps, int64_t first, int64_t last,
                                  double* __restrict__ totals, float* __restrict__ sums) {
  for (int64_t p = first; p < last;) {
    const int64_t stop = p + PRODUCTS < last ? p + PRODUCTS : last;
    for (int64_t c = 0; c < maps.C; ++c) sums[c] = 0.0f;
    for (; p + 4 <= stop; p += 4) add_products<T, 4, MASKS>(maps, p, sums);
    for (; p < stop; ++p) add_products<T, 1, MASKS>(maps, p, sums);
    for (int64_t c = 0; c < maps.C; ++c) totals[c] += sums[c];
  }
}

// out = x * scale + shift in rows [first, last), both for each column.
template <typename T>
CVK_HOST_DEVICE void shift_rows(const Rows& rows, const float* __restrict__ scale,
                                const float* __restrict__ shift, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_stride;
    T* out = static_cast<T*>(rows.out) + row * rows.out_stride;
    CVK_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < rows.width; ++i)
      out[i] = Number<T>::narrow(Number<T>::widen(x[i]) * scale[i] + shift[i]);
  }
}

}  // namespace cvkernels::squeeze_excite
