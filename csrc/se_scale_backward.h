// The gradient of se_scale on the CPU, of channels_last maps: with z = x * s + residual and dz the
// gradient behind a ReLU where there is one, sums[c] of dz * x over an image's pixels, and
// dx = dz * s + shift. No torch header.
#pragma once

#include <cstdint>

#include "element.h"
#include "se_scale.h"

namespace cvkernels::se_scale {

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
  using Bits = typename Element<T>::Bits;
  const Bits *grad[COUNT], *x[COUNT], *out[COUNT];
  Bits* masked[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    grad[i] = static_cast<const Bits*>(maps.grad) + (first + i) * maps.grad_stride;
    x[i] = static_cast<const Bits*>(maps.x) + (first + i) * maps.x_stride;
    if constexpr (MASKS) {
      out[i] = static_cast<const Bits*>(maps.out) + (first + i) * maps.out_stride;
      masked[i] = static_cast<Bits*>(maps.masked) + (first + i) * maps.masked_stride;
    }
  }
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < maps.C; ++c) {
    float sum = 0.0f;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      float dz = Element<T>::load(grad[i][c]);
      if constexpr (MASKS) {
        dz = Element<T>::load(out[i][c]) <= 0.0f ? 0.0f : dz;  // NaN passes, as in PyTorch
        masked[i][c] = Element<T>::store(dz);
      }
      sum += dz * Element<T>::load(x[i][c]);
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
  using Bits = typename Element<T>::Bits;
  for (int64_t row = first; row < last; ++row) {
    const Bits* x = static_cast<const Bits*>(rows.x) + row * rows.x_stride;
    Bits* out = static_cast<Bits*>(rows.out) + row * rows.out_stride;
    CVK_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < rows.width; ++i)
      out[i] = Element<T>::store(Element<T>::load(x[i]) * scale[i] + shift[i]);
  }
}

}  // namespace cvkernels::se_scale
