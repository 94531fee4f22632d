// depthwise_conv_bn_act on the CPU. Schema: cvkernels/ops/depthwise_conv_bn_act/native.py.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/arguments.h"
#include "common/cpu.h"
#include "common/instruction_sets.h"
#include "common/large_output.h"
#include "common/number.h"
#include "depthwise_conv_bn_act/problem.h"

namespace cvkernels::depthwise_conv_bn_act {
namespace {

constexpr const char* OP = "depthwise_conv_bn_act";

#define CVK_SOURCE "depthwise_conv_bn_act/rows.h"
#include "common/isa.h"

template <typename T>
auto best_band(const Problem& problem) {
#define CVK_SELECT(isa) return isa::select<T>(problem)
  CVK_BEST_ISA(CVK_SELECT);
#undef CVK_SELECT
}

// Tasks for a thread, so that it makes at least some ten thousand products.
int64_t grain_of(const Problem& problem) {
  const int64_t rows = std::min(problem.P, Problem::BAND);
  const int64_t products =
      rows * problem.Q * problem.group() * BLOCK * problem.kernel * problem.kernel;
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, products));
}

// Calls run(task, number of the band) for each task of [first, last).
template <typename Run>
void for_tasks(const Problem& problem, int64_t first, int64_t last, Run run) {
  const int64_t group = problem.group(), groups = problem.groups(), bands = problem.bands();
  for (int64_t index = first; index < last; ++index) {
    const int64_t begin = index % groups * group, end = std::min(begin + group, problem.blocks());
    const Task task{index / groups / bands, index / groups % bands, begin, end};
    run(task, task.n * bands + task.band);
  }
}

// parts[N, bands, C]: the sums of each band of rows.
template <typename T>
void launch(const Problem& problem, const void* x, const float* weight, const float* affine,
            void* out, float* parts) {
  const auto make_band = best_band<T>(problem);
  const int64_t group = problem.group();
  const int64_t scratch_size = (problem.kernel + 1) * group * problem.scratch_width() * BLOCK;
  const int64_t tasks = problem.N * problem.bands() * problem.groups();
  parallel_for(0, tasks, grain_of(problem), [&](int64_t first, int64_t last) {
    std::vector<float> scratch(scratch_size), sums(group * BLOCK);
    std::vector<float> unfinished(problem.padded(problem.columns()) * BLOCK);
    for_tasks(problem, first, last, [&](const Task& task, int64_t band) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      make_band(problem, task, x, weight, affine, out, scratch.data(), unfinished.data(),
                sums.data());
      if (parts == nullptr) return;
      const int64_t c = task.block_begin * BLOCK;
      const int64_t count = std::min(task.block_end * BLOCK, problem.C) - c;
      std::copy_n(sums.data(), count, parts + band * problem.C + c);
    });
  });
}

void add_bands(const Problem& problem, const float* parts, float* sums) {
  const int64_t bands = problem.bands(), C = problem.C;
  for (int64_t n = 0; n < problem.N; ++n) {
    const float* part = parts + n * bands * C;
    for (int64_t c = 0; c < C; ++c) {
      float sum = part[c];
      for (int64_t band = 1; band < bands; ++band) sum += part[band * C + c];
      sums[n * C + c] = sum;
    }
  }
}

template <typename T>
auto best_gradient(const Problem& problem) {
#define CVK_SELECT(isa) return isa::select_gradient<T>(problem)
  CVK_BEST_ISA(CVK_SELECT);
#undef CVK_SELECT
}

// out[C, K, K]. Each band of rows is summed alone, and these sums in double.
template <typename T>
void weight_gradient(const Problem& problem, const void* x, const void* grad, float* out) {
  const auto add_band = best_gradient<T>(problem);
  const int64_t taps = problem.kernel * problem.kernel, bands = problem.N * problem.bands();
  const int64_t size = problem.blocks() * taps * BLOCK;
  const int64_t scratch_size =
      (problem.kernel + 1) * problem.group() * problem.scratch_width() * BLOCK;
  std::vector<float> parts(bands * size);
  parallel_for(0, bands * problem.groups(), grain_of(problem), [&](int64_t first, int64_t last) {
    std::vector<float> scratch(scratch_size);
    for_tasks(problem, first, last, [&](const Task& task, int64_t band) {
      add_band(problem, task, x, grad, scratch.data(),
               &parts[band * size + task.block_begin * taps * BLOCK]);
    });
  });
  for (int64_t c = 0; c < problem.C; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t at = (c / BLOCK * taps + tap) * BLOCK + c % BLOCK;
      double total = 0;
      for (int64_t band = 0; band < bands; ++band) total += parts[band * size + at];
      out[c * taps + tap] = static_cast<float>(total);
    }
}

// The sizes of a convolution of x, which is spread out first.
Problem problem_of(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding_h,
                   int64_t padding_w, int64_t spread) {
  CVK_CHECK_CPU(OP, x);
  CVK_CHECK_DIM(OP, x, 4);
  CVK_CHECK(OP, kernel == 3 || kernel == 5, "kernel must be 3 or 5, got ", kernel);
  CVK_CHECK(OP, stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  CVK_CHECK(OP, spread == 1 || spread == 2, "spread must be 1 or 2, got ", spread);
  CVK_CHECK(OP, padding_h >= 0 && padding_w >= 0, "padding must not be negative");
  Problem problem{x.size(0), x.size(1)};
  problem.H = std::max<int64_t>(0, (x.size(2) - 1) * spread + 1);
  problem.W = std::max<int64_t>(0, (x.size(3) - 1) * spread + 1);
  problem.P = (problem.H + 2 * padding_h - kernel) / stride + 1;
  problem.Q = (problem.W + 2 * padding_w - kernel) / stride + 1;
  problem.kernel = kernel;
  problem.stride = stride;
  problem.padding_h = padding_h;
  problem.padding_w = padding_w;
  problem.spread = spread;
  problem.x_stride_n = x.stride(0);
  problem.x_stride_c = x.stride(1);
  problem.x_stride_h = x.stride(2);
  problem.x_stride_w = x.stride(3);
  CVK_CHECK(OP, problem.H + 2 * padding_h >= kernel && problem.W + 2 * padding_w >= kernel,
            "no window fits x of shape ", shape_of(x));
  return problem;
}

void depthwise_conv_bn_act_native(const Tensor& x, const Tensor& weight, const Tensor& affine,
                                  int64_t kernel, int64_t stride, int64_t padding_h,
                                  int64_t padding_w, int64_t spread, int64_t act, const Tensor& out,
                                  const Maybe& sums) {
  Problem problem = problem_of(x, kernel, stride, padding_h, padding_w, spread);
  CVK_CHECK(OP, act >= 0 && act <= 3, "act must be between 0 and 3, got ", act);
  problem.act = static_cast<Act>(act);
  const void* weights = floats_of(OP, "weight", weight, problem.blocks() * kernel * kernel * BLOCK);
  const void* affines = floats_of(OP, "affine", affine, 2 * problem.blocks() * BLOCK);
  CVK_CHECK_SAME(OP, out, x);
  // Past the last gradient there may be one row and column more that no window began in.
  const auto fits = [&](int64_t size, int64_t expected) {
    return size == expected || (spread == 2 && size == expected + 1);
  };
  CVK_CHECK(OP,
            out.dim() == 4 && out.size(0) == problem.N && fits(out.size(1), problem.P) &&
                fits(out.size(2), problem.Q) && out.size(3) == problem.C && out.is_contiguous(),
            "out must be dense with shape [", problem.N, ", ", problem.P, ", ", problem.Q, ", ",
            problem.C, "], got ", shape_of(out));
  problem.P = out.size(1);
  problem.Q = out.size(2);
  const void* sums_data = floats_of(OP, "sums", sums, problem.N * problem.C);
  if (problem.N == 0 || problem.C == 0) return;
  const int64_t out_bytes = out.numel() * out.element_size();
  dispatch(OP, x.scalar_type(), [&]<typename T>(Type<T>) {
    perform({x.const_data_ptr(), weights, affines, out.mutable_data_ptr(), sums_data},
            [=](void* const* at) {
              prefer_huge_pages(at[3], out_bytes);
              auto* total = static_cast<float*>(at[4]);
              const bool adds = total != nullptr && problem.bands() > 1;
              std::vector<float> bands(adds ? problem.N * problem.bands() * problem.C : 0);
              float* parts = adds ? bands.data() : total;
              launch<T>(problem, at[0], static_cast<const float*>(at[1]),
                        static_cast<const float*>(at[2]), at[3], parts);
              if (adds) add_bands(problem, parts, total);
            });
  });
}

void depthwise_conv_bn_act_native_weight_gradient(const Tensor& grad, const Tensor& x,
                                                  int64_t kernel, int64_t stride, int64_t padding_h,
                                                  int64_t padding_w, const Tensor& out) {
  const Problem problem = problem_of(x, kernel, stride, padding_h, padding_w, 1);
  CVK_CHECK_SAME(OP, grad, x);
  CVK_CHECK(OP,
            grad.dim() == 4 && grad.size(0) == problem.N && grad.size(1) == problem.P &&
                grad.size(2) == problem.Q && grad.size(3) == problem.C && grad.is_contiguous(),
            "grad must be dense with shape [", problem.N, ", ", problem.P, ", ", problem.Q, ", ",
            problem.C, "], got ", shape_of(grad));
  const void* to = floats_of(OP, "out", out, problem.C * kernel * kernel);
  dispatch(OP, x.scalar_type(), [&]<typename T>(Type<T>) {
    perform({grad.const_data_ptr(), x.const_data_ptr(), to}, [=](void* const* at) {
      weight_gradient<T>(problem, at[1], at[0], static_cast<float*>(at[2]));
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("depthwise_conv_bn_act_native", TORCH_BOX(&depthwise_conv_bn_act_native));
  library.impl("depthwise_conv_bn_act_native_weight_gradient",
               TORCH_BOX(&depthwise_conv_bn_act_native_weight_gradient));
}

}  // namespace
}  // namespace cvkernels::depthwise_conv_bn_act
