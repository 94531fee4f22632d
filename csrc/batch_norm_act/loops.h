// The loops of batch_norm_act's passes on the CPU: over the channels of a few pixels at a time.
#pragma once

#include <vector>

#include "batch_norm_act/problem.h"

namespace cvkernels::batch_norm_act {

// Pixels that share one load of a channel's numbers.
constexpr int ROWS = 4;
// Pixels that are summed in Wide; these sums are summed in double.
constexpr int64_t BLOCK = 32;

// A channel's numbers side by side with its neighbours'.
template <typename Wide>
struct Norms {
  std::vector<Wide> mean, scale, bias;

  template <typename T>
  static Norms of(const BatchNorm& bn, int64_t C) {
    Norms norms{std::vector<Wide>(C), std::vector<Wide>(C), std::vector<Wide>(C)};
    for (int64_t c = 0; c < C; ++c) {
      const Norm<Wide> norm = norm_of<T>(bn, c);
      norms.mean[c] = norm.mean;
      norms.scale[c] = norm.scale;
      norms.bias[c] = norm.bias;
    }
    return norms;
  }
};

// The operands of one call; a pass reads those that it needs.
struct Operands {
  const void* x;
  const void* grad;
  const void* other;  // the residual, or what the ReLU behind the sum with it gave
  void* out;          // also the total that a gradient is added to, or the residual's gradient
  int64_t x_stride, grad_stride, other_stride, out_stride, C;
  const void *mean, *scale, *bias, *slope, *offset;
  Act act;

  // What every pass over x with its norm reads; the rest is empty.
  template <typename Wide>
  static Operands of(const void* x, const Matrix& map, const Norms<Wide>& norms, Act act) {
    Operands operands{};
    operands.x = x;
    operands.x_stride = map.stride;
    operands.C = map.C;
    operands.mean = norms.mean.data();
    operands.scale = norms.scale.data();
    operands.bias = norms.bias.data();
    operands.act = act;
    return operands;
  }

  template <typename Wide>
  CVK_HOST_DEVICE Bounded<Wide> bounded() const {
    return Bounded<Wide>::of(act == Act::RELU);
  }
};

template <typename T>
CVK_HOST_DEVICE const T* row_of(const void* data, int64_t stride, int64_t row) {
  return static_cast<const T*>(data) + row * stride;
}

// sums[c] += x[p, c] - mean[c] over COUNT rows, squares[c] += the squares.
template <typename T, int COUNT, bool SQUARES>
CVK_HOST_DEVICE void add_rows(const T* x, int64_t stride, int64_t C,
                              const typename Number<T>::Wide* mean, typename Number<T>::Wide* sums,
                              typename Number<T>::Wide* squares) {
  using Wide = typename Number<T>::Wide;
  const T* rows[COUNT];
  for (int i = 0; i < COUNT; ++i) rows[i] = x + i * stride;
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < C; ++c) {
    Wide sum = 0, square = 0;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      Wide value = Number<T>::widen(rows[i][c]);
      if constexpr (SQUARES) {
        value -= mean[c];
        square += value * value;
      }
      sum += value;
    }
    sums[c] += sum;
    if constexpr (SQUARES) squares[c] += square;
  }
}

template <typename T, bool SQUARES>
CVK_HOST_DEVICE void add_pixels(const Operands& op, int64_t first, int64_t last,
                                const typename Number<T>::Wide* mean,
                                typename Number<T>::Wide* sums, typename Number<T>::Wide* squares) {
  const auto x = [&](int64_t p) { return row_of<T>(op.x, op.x_stride, p); };
  int64_t p = first;
  for (; p + ROWS <= last; p += ROWS)
    add_rows<T, ROWS, SQUARES>(x(p), op.x_stride, op.C, mean, sums, squares);
  for (; p < last; ++p) add_rows<T, 1, SQUARES>(x(p), op.x_stride, op.C, mean, sums, squares);
}

// totals[c] += sums[c], which become zero.
template <typename Wide>
CVK_HOST_DEVICE void add_and_clear(Wide* __restrict__ sums, double* __restrict__ totals,
                                   int64_t C) {
  for (int64_t c = 0; c < C; ++c) {
    totals[c] += sums[c];
    sums[c] = 0;
  }
}

// Sums of x - pivot and of its square over the pixels [first, last); the pivot is the mean of
// these pixels, but for rounding. Two readings, the second of what the cache still holds.
// `sums` is memory for 2 * C.
template <typename T>
CVK_HOST_DEVICE void statistics_of(const Operands& op, int64_t first, int64_t last,
                                   void* pivot_data, double* off, double* squares, void* sum_data) {
  using Wide = typename Number<T>::Wide;
  Wide *pivot = static_cast<Wide*>(pivot_data), *sums = static_cast<Wide*>(sum_data);
  for (int64_t c = 0; c < op.C; ++c) pivot[c] = 0;
  add_pixels<T, false>(op, first, last, nullptr, pivot, nullptr);
  for (int64_t c = 0; c < op.C; ++c) pivot[c] /= static_cast<Wide>(last - first);
  for (int64_t p = first; p < last; p += BLOCK) {
    const int64_t stop = p + BLOCK < last ? p + BLOCK : last;
    add_pixels<T, true>(op, p, stop, pivot, sums, sums + op.C);
    add_and_clear(sums, off, op.C);
    add_and_clear(sums + op.C, squares, op.C);
  }
}

template <typename T, int COUNT, bool ADDS, typename Activation>
CVK_HOST_DEVICE void apply_rows(const Operands& op, int64_t first, Activation activation) {
  using Wide = typename Number<T>::Wide;
  const Wide *mean = static_cast<const Wide*>(op.mean), *scale = static_cast<const Wide*>(op.scale),
             *bias = static_cast<const Wide*>(op.bias);
  const T *x[COUNT], *residual[COUNT];
  T* out[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    x[i] = row_of<T>(op.x, op.x_stride, first + i);
    if constexpr (ADDS) residual[i] = row_of<T>(op.other, op.other_stride, first + i);
    out[i] = static_cast<T*>(op.out) + (first + i) * op.out_stride;
  }
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < op.C; ++c) {
    const Norm<Wide> norm{mean[c], scale[c], bias[c]};
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      Wide z = norm(Number<T>::widen(x[i][c]));
      if constexpr (ADDS) z += Number<T>::widen(residual[i][c]);
      out[i][c] = Number<T>::narrow(activation(z));
    }
  }
}

template <typename T, bool ADDS, typename Activation>
CVK_HOST_DEVICE void apply_pixels(const Operands& op, int64_t first, int64_t last,
                                  Activation activation) {
  for (; first + ROWS <= last; first += ROWS) apply_rows<T, ROWS, ADDS>(op, first, activation);
  for (; first < last; ++first) apply_rows<T, 1, ADDS>(op, first, activation);
}

// What a pass that sums dy also does with it.
enum class Reduces { ALONE, INTO_TOTAL, OF_OUTPUT };

// INTO_TOTAL: total += dy * scale. OF_OUTPUT: dy goes by what the ReLU behind the sum with the
// residual gave, and is written.
template <typename T, int COUNT, Reduces REDUCES, typename Activation>
CVK_HOST_DEVICE void reduce_rows(const Operands& op, int64_t first, typename Number<T>::Wide* sums,
                                 typename Number<T>::Wide* products, Activation activation) {
  using Wide = typename Number<T>::Wide;
  const Wide *mean = static_cast<const Wide*>(op.mean), *scale = static_cast<const Wide*>(op.scale),
             *bias = static_cast<const Wide*>(op.bias);
  const T *x[COUNT], *grad[COUNT], *output[COUNT];
  Wide* total[COUNT];
  T* grad_residual[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    x[i] = row_of<T>(op.x, op.x_stride, first + i);
    grad[i] = row_of<T>(op.grad, op.grad_stride, first + i);
    const int64_t written = (first + i) * op.out_stride;
    if constexpr (REDUCES == Reduces::INTO_TOTAL) total[i] = static_cast<Wide*>(op.out) + written;
    if constexpr (REDUCES == Reduces::OF_OUTPUT) {
      output[i] = row_of<T>(op.other, op.other_stride, first + i);
      grad_residual[i] = static_cast<T*>(op.out) + written;
    }
  }
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < op.C; ++c) {
    const Norm<Wide> norm{mean[c], scale[c], bias[c]};
    Wide sum = 0, product = 0;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      const Wide value = Number<T>::widen(x[i][c]);
      Wide z;
      if constexpr (REDUCES == Reduces::OF_OUTPUT)
        z = Number<T>::widen(output[i][c]);
      else
        z = norm(value);
      const Wide dy = activation.gradient(Number<T>::widen(grad[i][c]), z);
      sum += dy;
      product += dy * (value - norm.mean);
      if constexpr (REDUCES == Reduces::INTO_TOTAL) total[i][c] += dy * norm.scale;
      if constexpr (REDUCES == Reduces::OF_OUTPUT) grad_residual[i][c] = Number<T>::narrow(dy);
    }
    sums[c] += sum;
    products[c] += product;
  }
}

// `sums` is memory for 2 * C.
template <typename T, Reduces REDUCES, typename Activation>
CVK_HOST_DEVICE void reduce_pixels(const Operands& op, int64_t first, int64_t last, double* totals,
                                   double* products, void* sum_data, Activation activation) {
  using Wide = typename Number<T>::Wide;
  Wide* sums = static_cast<Wide*>(sum_data);
  for (int64_t p = first; p < last;) {
    const int64_t stop = p + BLOCK < last ? p + BLOCK : last;
    for (; p + ROWS <= stop; p += ROWS)
      reduce_rows<T, ROWS, REDUCES>(op, p, sums, sums + op.C, activation);
    for (; p < stop; ++p) reduce_rows<T, 1, REDUCES>(op, p, sums, sums + op.C, activation);
    add_and_clear(sums, totals, op.C);
    add_and_clear(sums + op.C, products, op.C);
  }
}

// G is the gradient's type: T, or what T is computed in.
template <typename T, typename G, int COUNT, typename Activation>
CVK_HOST_DEVICE void gradient_rows(const Operands& op, int64_t first, Activation activation) {
  using Wide = typename Number<T>::Wide;
  const Wide *mean = static_cast<const Wide*>(op.mean), *scale = static_cast<const Wide*>(op.scale),
             *bias = static_cast<const Wide*>(op.bias), *slope = static_cast<const Wide*>(op.slope),
             *offset = static_cast<const Wide*>(op.offset);
  const T* x[COUNT];
  const G* grad[COUNT];
  T* out[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    x[i] = row_of<T>(op.x, op.x_stride, first + i);
    grad[i] = row_of<G>(op.grad, op.grad_stride, first + i);
    out[i] = static_cast<T*>(op.out) + (first + i) * op.out_stride;
  }
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < op.C; ++c) {
    const Norm<Wide> norm{mean[c], scale[c], bias[c]};
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      const Wide value = Number<T>::widen(x[i][c]);
      const Wide dy = activation.gradient(Number<G>::widen(grad[i][c]), norm(value));
      out[i][c] = Number<T>::narrow(dy * norm.scale + ((value - norm.mean) * slope[c] + offset[c]));
    }
  }
}

template <typename T, typename G, typename Activation>
CVK_HOST_DEVICE void gradient_pixels(const Operands& op, int64_t first, int64_t last,
                                     Activation activation) {
  for (; first + ROWS <= last; first += ROWS) gradient_rows<T, G, ROWS>(op, first, activation);
  for (; first < last; ++first) gradient_rows<T, G, 1>(op, first, activation);
}

// Functions and not templates: compilers clone only those for each instruction set.
#define CVK_PASSES(SIMD, T)                                                                       \
  SIMD static void statistics_pass(Type<T>, const Operands& op, int64_t first, int64_t last,      \
                                   void* pivot, double* off, double* squares, void* sums) {       \
    statistics_of<T>(op, first, last, pivot, off, squares, sums);                                 \
  }                                                                                               \
  SIMD static void apply_pass(Type<T>, const Operands& op, int64_t first, int64_t last) {         \
    using Wide = Number<T>::Wide;                                                                 \
    if (op.act == Act::SILU)                                                                      \
      apply_pixels<T, false>(op, first, last, Silu<Wide>{});                                      \
    else if (op.other == nullptr)                                                                 \
      apply_pixels<T, false>(op, first, last, op.bounded<Wide>());                                \
    else                                                                                          \
      apply_pixels<T, true>(op, first, last, op.bounded<Wide>());                                 \
  }                                                                                               \
  SIMD static void reduce_pass(Type<T>, const Operands& op, int64_t first, int64_t last,          \
                               double* totals, double* products, void* sums) {                    \
    using Wide = Number<T>::Wide;                                                                 \
    if (op.act == Act::SILU)                                                                      \
      reduce_pixels<T, Reduces::ALONE>(op, first, last, totals, products, sums, Silu<Wide>{});    \
    else if (op.out == nullptr)                                                                   \
      reduce_pixels<T, Reduces::ALONE>(op, first, last, totals, products, sums,                   \
                                       op.bounded<Wide>());                                       \
    else if (op.other == nullptr)                                                                 \
      reduce_pixels<T, Reduces::INTO_TOTAL>(op, first, last, totals, products, sums,              \
                                            op.bounded<Wide>());                                  \
    else                                                                                          \
      reduce_pixels<T, Reduces::OF_OUTPUT>(op, first, last, totals, products, sums,               \
                                           op.bounded<Wide>());                                   \
  }                                                                                               \
  SIMD static void gradient_pass(Type<T>, const Operands& op, int64_t first, int64_t last) {      \
    using Wide = Number<T>::Wide;                                                                 \
    if (op.act == Act::SILU)                                                                      \
      gradient_pixels<T, T>(op, first, last, Silu<Wide>{});                                       \
    else                                                                                          \
      gradient_pixels<T, T>(op, first, last, op.bounded<Wide>());                                 \
  }                                                                                               \
  SIMD static void wide_gradient_pass(Type<T>, const Operands& op, int64_t first, int64_t last) { \
    using Wide = Number<T>::Wide;                                                                 \
    gradient_pixels<T, Wide>(op, first, last, op.bounded<Wide>());                                \
  }
CVK_PASSES(CVK_SIMD, float)
CVK_PASSES(, double)  // gradients are checked in it, and little else
CVK_PASSES(CVK_SIMD_FEW, float16)
CVK_PASSES(CVK_SIMD, bfloat16)
#undef CVK_PASSES

}  // namespace cvkernels::batch_norm_act
