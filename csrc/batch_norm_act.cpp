// batch_norm_act's passes on the CPU. Schemas: cvkernels/ops/batch_norm_act/passes.py.
#include <algorithm>
#include <vector>

#include "batch_norm_act_call.h"

namespace cvkernels::batch_norm_act {
namespace {

using torch::stable::parallel_for;

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
  void* out;  // or the total that a gradient is added to
  int64_t x_stride, grad_stride, out_stride, C;
  const void *mean, *scale, *bias, *slope, *offset;
  bool relu;

  // What every pass over x with its norm reads; the rest is empty.
  template <typename Wide>
  static Operands of(const Tensor& x, const Matrix& map, const Norms<Wide>& norms, bool relu) {
    Operands operands{};
    operands.x = x.const_data_ptr();
    operands.x_stride = map.stride;
    operands.C = map.C;
    operands.mean = norms.mean.data();
    operands.scale = norms.scale.data();
    operands.bias = norms.bias.data();
    operands.relu = relu;
    return operands;
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

template <typename T, int COUNT>
CVK_HOST_DEVICE void apply_rows(const Operands& op, int64_t first) {
  using Wide = typename Number<T>::Wide;
  const Wide *mean = static_cast<const Wide*>(op.mean), *scale = static_cast<const Wide*>(op.scale),
             *bias = static_cast<const Wide*>(op.bias);
  const Wide lowest = Affine<Wide>::lowest(op.relu);
  const T* x[COUNT];
  T* out[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    x[i] = row_of<T>(op.x, op.x_stride, first + i);
    out[i] = static_cast<T*>(op.out) + (first + i) * op.out_stride;
  }
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < op.C; ++c) {
    const Norm<Wide> norm{mean[c], scale[c], bias[c]};
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i)
      out[i][c] = Number<T>::narrow(at_least(norm(Number<T>::widen(x[i][c])), lowest));
  }
}

template <typename T, int COUNT, bool ACCUMULATES>
CVK_HOST_DEVICE void reduce_rows(const Operands& op, int64_t first, typename Number<T>::Wide* sums,
                                 typename Number<T>::Wide* products) {
  using Wide = typename Number<T>::Wide;
  const Wide *mean = static_cast<const Wide*>(op.mean), *scale = static_cast<const Wide*>(op.scale),
             *bias = static_cast<const Wide*>(op.bias);
  const Wide lowest = Affine<Wide>::lowest(op.relu);
  const T *x[COUNT], *grad[COUNT];
  Wide* total[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    x[i] = row_of<T>(op.x, op.x_stride, first + i);
    grad[i] = row_of<T>(op.grad, op.grad_stride, first + i);
    if constexpr (ACCUMULATES) total[i] = static_cast<Wide*>(op.out) + (first + i) * op.out_stride;
  }
  CVK_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < op.C; ++c) {
    const Norm<Wide> norm{mean[c], scale[c], bias[c]};
    Wide sum = 0, product = 0;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      const Wide value = Number<T>::widen(x[i][c]);
      const Wide dy = relu_gradient(Number<T>::widen(grad[i][c]), norm(value), lowest);
      sum += dy;
      product += dy * (value - norm.mean);
      if constexpr (ACCUMULATES) total[i][c] += dy * norm.scale;
    }
    sums[c] += sum;
    products[c] += product;
  }
}

// `sums` is memory for 2 * C.
template <typename T, bool ACCUMULATES>
CVK_HOST_DEVICE void reduce_pixels(const Operands& op, int64_t first, int64_t last, double* totals,
                                   double* products, void* sum_data) {
  using Wide = typename Number<T>::Wide;
  Wide* sums = static_cast<Wide*>(sum_data);
  for (int64_t p = first; p < last;) {
    const int64_t stop = p + BLOCK < last ? p + BLOCK : last;
    for (; p + ROWS <= stop; p += ROWS) reduce_rows<T, ROWS, ACCUMULATES>(op, p, sums, sums + op.C);
    for (; p < stop; ++p) reduce_rows<T, 1, ACCUMULATES>(op, p, sums, sums + op.C);
    add_and_clear(sums, totals, op.C);
    add_and_clear(sums + op.C, products, op.C);
  }
}

// G is the gradient's type: T, or what T is computed in.
template <typename T, typename G, int COUNT>
CVK_HOST_DEVICE void gradient_rows(const Operands& op, int64_t first) {
  using Wide = typename Number<T>::Wide;
  const Wide *mean = static_cast<const Wide*>(op.mean), *scale = static_cast<const Wide*>(op.scale),
             *bias = static_cast<const Wide*>(op.bias), *slope = static_cast<const Wide*>(op.slope),
             *offset = static_cast<const Wide*>(op.offset);
  const Wide lowest = Affine<Wide>::lowest(op.relu);
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
      const Wide dy = relu_gradient(Number<G>::widen(grad[i][c]), norm(value), lowest);
      out[i][c] = Number<T>::narrow(dy * norm.scale + ((value - norm.mean) * slope[c] + offset[c]));
    }
  }
}

// Functions and not templates: compilers clone only those for each instruction set.
#define CVK_PASSES(T)                                                                          \
  CVK_SIMD void statistics_pass(Type<T>, const Operands& op, int64_t first, int64_t last,      \
                                void* pivot, double* off, double* squares, void* sums) {       \
    statistics_of<T>(op, first, last, pivot, off, squares, sums);                              \
  }                                                                                            \
  CVK_SIMD void apply_pass(Type<T>, const Operands& op, int64_t first, int64_t last) {         \
    for (; first + ROWS <= last; first += ROWS) apply_rows<T, ROWS>(op, first);                \
    for (; first < last; ++first) apply_rows<T, 1>(op, first);                                 \
  }                                                                                            \
  CVK_SIMD void reduce_pass(Type<T>, const Operands& op, int64_t first, int64_t last,          \
                            double* totals, double* products, void* sums) {                    \
    op.out == nullptr ? reduce_pixels<T, false>(op, first, last, totals, products, sums)       \
                      : reduce_pixels<T, true>(op, first, last, totals, products, sums);       \
  }                                                                                            \
  CVK_SIMD void gradient_pass(Type<T>, const Operands& op, int64_t first, int64_t last) {      \
    for (; first + ROWS <= last; first += ROWS) gradient_rows<T, T, ROWS>(op, first);          \
    for (; first < last; ++first) gradient_rows<T, T, 1>(op, first);                           \
  }                                                                                            \
  CVK_SIMD void wide_gradient_pass(Type<T>, const Operands& op, int64_t first, int64_t last) { \
    using Wide = Number<T>::Wide;                                                              \
    for (; first + ROWS <= last; first += ROWS) gradient_rows<T, Wide, ROWS>(op, first);       \
    for (; first < last; ++first) gradient_rows<T, Wide, 1>(op, first);                        \
  }
CVK_PASSES(float)
CVK_PASSES(double)
CVK_PASSES(float16)
CVK_PASSES(bfloat16)
#undef CVK_PASSES

// Pixels of a task that sums; no function of the number of threads, so that the sums are not
// either.
int64_t chunk_of(int64_t pixels) { return std::max<int64_t>(128, (pixels + 127) / 128); }

int64_t grain_of(int64_t C) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, C)); }

// Calls pass(chunk, first, last) for each chunk of pixels.
template <typename Pass>
void in_chunks(const Matrix& x, Pass&& pass) {
  const int64_t chunk = chunk_of(x.pixels), chunks = (x.pixels + chunk - 1) / chunk;
  parallel_for(0, chunks, std::max<int64_t>(1, grain_of(x.C) / chunk),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   pass(i, i * chunk, std::min(x.pixels, (i + 1) * chunk));
               });
}

void statistics(const Tensor& x, const Tensor& mean, const Tensor& var) {
  const char* op = "batch_norm_act_statistics";
  CVK_CHECK_CPU(op, x);
  const Matrix map = matrix_of(op, "x", x);
  void *mean_data = result_of(op, "mean", mean, x), *var_data = result_of(op, "var", var, x);
  CVK_CHECK(op, map.pixels > 0, "x must have pixels, got ", shape_of(x));
  dispatch_floating(op, x.scalar_type(), [&](auto type) {
    using Wide = typename Number<typename decltype(type)::type>::Wide;
    const int64_t C = map.C, chunk = chunk_of(map.pixels);
    const int64_t chunks = (map.pixels + chunk - 1) / chunk;
    Operands operands{};
    operands.x = x.const_data_ptr();
    operands.x_stride = map.stride;
    operands.C = C;
    std::vector<Wide> pivots(chunks * C);
    std::vector<double> partial(2 * chunks * C), total(C), squared(C);
    in_chunks(map, [&](int64_t i, int64_t first, int64_t last) {
      std::vector<Wide> sums(2 * C);
      statistics_pass(type, operands, first, last, &pivots[i * C], &partial[2 * i * C],
                      &partial[(2 * i + 1) * C], sums.data());
    });
    const double n = static_cast<double>(map.pixels);
    const auto count = [&](int64_t i) {
      return static_cast<double>(std::min(chunk, map.pixels - i * chunk));
    };
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t c = 0; c < C; ++c)
        total[c] += count(i) * pivots[i * C + c] + partial[2 * i * C + c];
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t c = 0; c < C; ++c) {
        const double move = pivots[i * C + c] - total[c] / n;
        squared[c] +=
            partial[(2 * i + 1) * C + c] + move * (2 * partial[2 * i * C + c] + move * count(i));
      }
    for (int64_t c = 0; c < C; ++c) {
      static_cast<Wide*>(mean_data)[c] = static_cast<Wide>(total[c] / n);
      static_cast<Wide*>(var_data)[c] = static_cast<Wide>(squared[c] / n);
    }
  });
}

void apply(const Tensor& x, const Maybe& weight, const Maybe& bias, const Tensor& mean,
           const Tensor& var, double eps, bool relu, const Tensor& out) {
  const char* op = "batch_norm_act_apply";
  CVK_CHECK_CPU(op, x);
  const Matrix map = matrix_of(op, "x", x), to = matrix_like(op, "out", out, x, false);
  const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, map.C);
  dispatch_floating(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto norms = Norms<typename Number<T>::Wide>::template of<T>(bn, map.C);
    Operands operands = Operands::of(x, map, norms, relu);
    operands.out = out.mutable_data_ptr();
    operands.out_stride = to.stride;
    parallel_for(0, map.pixels, grain_of(map.C),
                 [&](int64_t first, int64_t last) { apply_pass(type, operands, first, last); });
  });
}

void reduce(const Tensor& grad, const Tensor& x, const Maybe& weight, const Maybe& bias,
            const Tensor& mean, const Tensor& var, double eps, bool relu, const Maybe& total,
            const Tensor& d_weight, const Tensor& d_bias, const Tensor& slope,
            const Tensor& offset) {
  const char* op = "batch_norm_act_reduce";
  CVK_CHECK_CPU(op, x);
  const Matrix map = matrix_of(op, "x", x), from = matrix_like(op, "grad", grad, x, false);
  const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, map.C);
  const Results results{result_of(op, "d_weight", d_weight, x), result_of(op, "d_bias", d_bias, x),
                        result_of(op, "slope", slope, x), result_of(op, "offset", offset, x)};
  const int64_t total_stride = total ? matrix_like(op, "total", *total, x, true).stride : 0;
  CVK_CHECK(op, map.pixels > 0, "x must have pixels, got ", shape_of(x));
  dispatch_floating(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Wide = typename Number<T>::Wide;
    const auto norms = Norms<Wide>::template of<T>(bn, map.C);
    Operands operands = Operands::of(x, map, norms, relu);
    operands.grad = grad.const_data_ptr();
    operands.grad_stride = from.stride;
    operands.out = total ? total->mutable_data_ptr() : nullptr;
    operands.out_stride = total_stride;
    const int64_t C = map.C, chunk = chunk_of(map.pixels);
    const int64_t chunks = (map.pixels + chunk - 1) / chunk;
    std::vector<double> partial(2 * chunks * C), sums(2 * C);
    in_chunks(map, [&](int64_t i, int64_t first, int64_t last) {
      std::vector<Wide> block(2 * C);
      reduce_pass(type, operands, first, last, &partial[2 * i * C], &partial[(2 * i + 1) * C],
                  block.data());
    });
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t c = 0; c < 2 * C; ++c) sums[c] += partial[2 * i * C + c];
    for (int64_t c = 0; c < C; ++c)
      results.put(c, Reduced<T>::of(bn, c, sums[c], sums[C + c], static_cast<double>(map.pixels)));
  });
}

void input_gradient(const Tensor& grad, const Tensor& x, const Maybe& weight, const Maybe& bias,
                    const Tensor& mean, const Maybe& var, double eps, bool relu,
                    const Tensor& slope, const Tensor& offset, const Tensor& out) {
  const char* op = "batch_norm_act_input_gradient";
  CVK_CHECK_CPU(op, x);
  const bool wide = grad.scalar_type() != x.scalar_type();
  const Matrix map = matrix_of(op, "x", x), from = matrix_like(op, "grad", grad, x, wide),
               to = matrix_like(op, "out", out, x, false);
  const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, map.C);
  const void *slope_data = result_of(op, "slope", slope, x),
             *offset_data = result_of(op, "offset", offset, x);
  dispatch_floating(op, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto norms = Norms<typename Number<T>::Wide>::template of<T>(bn, map.C);
    Operands operands = Operands::of(x, map, norms, relu);
    operands.grad = grad.const_data_ptr();
    operands.grad_stride = from.stride;
    operands.out = out.mutable_data_ptr();
    operands.out_stride = to.stride;
    operands.slope = slope_data;
    operands.offset = offset_data;
    parallel_for(0, map.pixels, grain_of(map.C), [&](int64_t first, int64_t last) {
      wide ? wide_gradient_pass(type, operands, first, last)
           : gradient_pass(type, operands, first, last);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("batch_norm_act_statistics", TORCH_BOX(&statistics));
  library.impl("batch_norm_act_apply", TORCH_BOX(&apply));
  library.impl("batch_norm_act_reduce", TORCH_BOX(&reduce));
  library.impl("batch_norm_act_input_gradient", TORCH_BOX(&input_gradient));
}

}  // namespace
}  // namespace cvkernels::batch_norm_act
