// batch_norm_act's passes on the CPU.
#include <algorithm>
#include <vector>

#include "batch_norm_act/loops.h"
#include "batch_norm_act/ops.h"
#include "common/cpu.h"

namespace cvkernels::batch_norm_act {
namespace {

// Pixels of a task that sums; no function of the number of threads, so that the sums are not
// either.
int64_t chunk_of(int64_t pixels) { return std::max<int64_t>(128, (pixels + 127) / 128); }

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

struct OnCpu : Cpu {
  template <typename T>
  static void statistics(Cpu, Type<T> type, const void* x, const Matrix& map,
                         const StatisticsOut& out) {
    using Wide = typename Number<T>::Wide;
    const int64_t C = map.C, chunk = chunk_of(map.pixels);
    const int64_t chunks = (map.pixels + chunk - 1) / chunk;
    Operands operands{};
    operands.x = x;
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
    for (int64_t c = 0; c < C; ++c) out.put<T>(c, total[c] / n, squared[c] / n, n);
  }

  template <typename T>
  static void apply(Cpu, Type<T> type, const void* x, const Matrix& map, const BatchNorm& bn,
                    Act act, const Map& residual, const Map& out) {
    const auto norms = Norms<typename Number<T>::Wide>::template of<T>(bn, map.C);
    Operands operands = Operands::of(x, map, norms, act);
    operands.other = residual.data;
    operands.other_stride = residual.stride;
    operands.out = out.data;
    operands.out_stride = out.stride;
    parallel_for(0, map.pixels, grain_of(map.C),
                 [&](int64_t first, int64_t last) { apply_pass(type, operands, first, last); });
  }

  template <typename T>
  static void reduce(Cpu, Type<T> type, const Map& grad, const void* x, const Matrix& map,
                     const BatchNorm& bn, Act act, const ReduceMaps& maps, const Results& results) {
    using Wide = typename Number<T>::Wide;
    const auto norms = Norms<Wide>::template of<T>(bn, map.C);
    Operands operands = Operands::of(x, map, norms, act);
    operands.grad = grad.data;
    operands.grad_stride = grad.stride;
    operands.other = maps.output.data;
    operands.other_stride = maps.output.stride;
    const Map& out = maps.output.data == nullptr ? maps.total : maps.grad_residual;
    operands.out = out.data;
    operands.out_stride = out.stride;
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
  }

  template <typename T>
  static void input_gradient(Cpu, Type<T> type, const Map& grad, bool wide, const void* x,
                             const Matrix& map, const BatchNorm& bn, Act act, const void* slope,
                             const void* offset, const Map& out) {
    const auto norms = Norms<typename Number<T>::Wide>::template of<T>(bn, map.C);
    Operands operands = Operands::of(x, map, norms, act);
    operands.grad = grad.data;
    operands.grad_stride = grad.stride;
    operands.out = out.data;
    operands.out_stride = out.stride;
    operands.slope = slope;
    operands.offset = offset;
    parallel_for(0, map.pixels, grain_of(map.C), [&](int64_t first, int64_t last) {
      wide ? wide_gradient_pass(type, operands, first, last)
           : gradient_pass(type, operands, first, last);
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) { Ops<OnCpu>::add_to(library); }

}  // namespace
}  // namespace cvkernels::batch_norm_act
