// batch_norm_act's passes on the CPU.
#include <algorithm>
#include <vector>

#include "batch_norm_act_ops.h"
#include "batch_norm_act_rows.h"

namespace cvkernels::batch_norm_act {
namespace {

using torch::stable::parallel_for;

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

struct Cpu {
  static void check(const char* op, const Tensor& x) { CVK_CHECK_CPU(op, x); }

  static void statistics(const char* op, const Tensor& x, const Start& start) {
    const Matrix map = matrix_of(op, "x", x);
    CVK_CHECK(op, map.pixels > 0, "x must have pixels, got ", shape_of(x));
    dispatch_floating(op, x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      using Wide = typename Number<T>::Wide;
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
      for (int64_t c = 0; c < C; ++c) start.put<T>(c, total[c] / n, squared[c] / n, n);
    });
  }

  static void apply(const char* op, const Tensor& x, const BatchNorm& bn, Act act,
                    const Maybe& residual, const Tensor& out) {
    const Matrix map = matrix_of(op, "x", x), to = matrix_like(op, "out", out, x, false);
    const int64_t residual_stride =
        residual ? matrix_like(op, "residual", *residual, x, false).stride : 0;
    dispatch_floating(op, x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const auto norms = Norms<typename Number<T>::Wide>::template of<T>(bn, map.C);
      Operands operands = Operands::of(x.const_data_ptr(), map, norms, act);
      operands.other = residual ? residual->const_data_ptr() : nullptr;
      operands.other_stride = residual_stride;
      operands.out = out.mutable_data_ptr();
      operands.out_stride = to.stride;
      parallel_for(0, map.pixels, grain_of(map.C),
                   [&](int64_t first, int64_t last) { apply_pass(type, operands, first, last); });
    });
  }

  static void reduce(const char* op, const Tensor& grad, const Tensor& x, const BatchNorm& bn,
                     Act act, const Beside& beside, const Results& results) {
    const Matrix map = matrix_of(op, "x", x), from = matrix_like(op, "grad", grad, x, false);
    CVK_CHECK(op, map.pixels > 0, "x must have pixels, got ", shape_of(x));
    dispatch_floating(op, x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      using Wide = typename Number<T>::Wide;
      const auto norms = Norms<Wide>::template of<T>(bn, map.C);
      Operands operands = Operands::of(x.const_data_ptr(), map, norms, act);
      operands.grad = grad.const_data_ptr();
      operands.grad_stride = from.stride;
      operands.other = beside.joined;
      operands.other_stride = beside.joined_stride;
      operands.out = beside.joined == nullptr ? beside.total : beside.masked;
      operands.out_stride = beside.joined == nullptr ? beside.total_stride : beside.masked_stride;
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
        results.put(c,
                    Reduced<T>::of(bn, c, sums[c], sums[C + c], static_cast<double>(map.pixels)));
    });
  }

  static void input_gradient(const char* op, const Tensor& grad, const Tensor& x,
                             const BatchNorm& bn, Act act, const void* slope, const void* offset,
                             const Tensor& out) {
    const bool wide = grad.scalar_type() != x.scalar_type();
    const Matrix map = matrix_of(op, "x", x), from = matrix_like(op, "grad", grad, x, wide),
                 to = matrix_like(op, "out", out, x, false);
    dispatch_floating(op, x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const auto norms = Norms<typename Number<T>::Wide>::template of<T>(bn, map.C);
      Operands operands = Operands::of(x.const_data_ptr(), map, norms, act);
      operands.grad = grad.const_data_ptr();
      operands.grad_stride = from.stride;
      operands.out = out.mutable_data_ptr();
      operands.out_stride = to.stride;
      operands.slope = slope;
      operands.offset = offset;
      parallel_for(0, map.pixels, grain_of(map.C), [&](int64_t first, int64_t last) {
        wide ? wide_gradient_pass(type, operands, first, last)
             : gradient_pass(type, operands, first, last);
      });
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) { CVK_BATCH_NORM_ACT_OPS(library, Cpu); }

}  // namespace
}  // namespace cvkernels::batch_norm_act
