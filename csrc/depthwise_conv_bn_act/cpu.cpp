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

// parts[N, bands, C]: the sums of each band of rows.
template <typename T>
void launch(const Problem& problem, const void* x, const float* weight, const float* affine,
            void* out, float* parts) {
  const auto make_band = best_band<T>(problem);
  const int64_t group = problem.group(), groups = problem.groups(), bands = problem.bands();
  const int64_t scratch_size = (problem.kernel + 1) * group * problem.scratch_width() * BLOCK;
  parallel_for(0, problem.N * bands * groups, grain_of(problem), [&](int64_t first, int64_t last) {
    std::vector<float> scratch(scratch_size), sums(group * BLOCK);
    std::vector<float> unfinished(problem.padded(problem.columns()) * BLOCK);
    for (int64_t index = first; index < last; ++index) {
      const int64_t begin = index % groups * group;
      const Task task{index / groups / bands, index / groups % bands, begin,
                      std::min(begin + group, problem.blocks())};
      std::fill(sums.begin(), sums.end(), 0.0f);
      make_band(problem, task, x, weight, affine, out, scratch.data(), unfinished.data(),
                sums.data());
      if (parts == nullptr) continue;
      const int64_t c = begin * BLOCK;
      const int64_t count = std::min(task.block_end * BLOCK, problem.C) - c;
      std::copy_n(sums.data(), count, parts + (task.n * bands + task.band) * problem.C + c);
    }
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

void depthwise_conv_bn_act_native(const Tensor& x, const Tensor& weight, const Tensor& affine,
                                  int64_t kernel, int64_t stride, int64_t padding_h,
                                  int64_t padding_w, int64_t act, const Tensor& out,
                                  const Maybe& sums) {
  CVK_CHECK_CPU(OP, x);
  CVK_CHECK_DIM(OP, x, 4);
  CVK_CHECK(OP, kernel == 3 || kernel == 5, "kernel must be 3 or 5, got ", kernel);
  CVK_CHECK(OP, stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  CVK_CHECK(OP, padding_h >= 0 && padding_w >= 0, "padding must not be negative");
  CVK_CHECK(OP, act >= 0 && act <= 3, "act must be between 0 and 3, got ", act);
  Problem problem{x.size(0), x.size(1), x.size(2), x.size(3)};
  problem.P = (problem.H + 2 * padding_h - kernel) / stride + 1;
  problem.Q = (problem.W + 2 * padding_w - kernel) / stride + 1;
  problem.kernel = kernel;
  problem.stride = stride;
  problem.padding_h = padding_h;
  problem.padding_w = padding_w;
  problem.act = static_cast<Act>(act);
  problem.x_stride_n = x.stride(0);
  problem.x_stride_c = x.stride(1);
  problem.x_stride_h = x.stride(2);
  problem.x_stride_w = x.stride(3);
  CVK_CHECK(OP, problem.H + 2 * padding_h >= kernel && problem.W + 2 * padding_w >= kernel,
            "no window fits x of shape ", shape_of(x));
  const void* weights = floats_of(OP, "weight", weight, problem.blocks() * kernel * kernel * BLOCK);
  const void* affines = floats_of(OP, "affine", affine, 2 * problem.blocks() * BLOCK);
  CVK_CHECK_SAME(OP, out, x);
  CVK_CHECK(OP,
            out.dim() == 4 && out.size(0) == problem.N && out.size(1) == problem.P &&
                out.size(2) == problem.Q && out.size(3) == problem.C && out.is_contiguous(),
            "out must be dense with shape [", problem.N, ", ", problem.P, ", ", problem.Q, ", ",
            problem.C, "], got ", shape_of(out));
  const void* sums_data = floats_of(OP, "sums", sums, problem.N * problem.C);
  if (problem.N == 0 || problem.C == 0) return;
  const int64_t out_bytes = out.numel() * out.element_size();
  const auto run = [&](auto type) {
    perform({x.const_data_ptr(), weights, affines, out.mutable_data_ptr(), sums_data},
            [=](void* const* at) {
              prefer_huge_pages(at[3], out_bytes);
              auto* total = static_cast<float*>(at[4]);
              const bool adds = total != nullptr && problem.bands() > 1;
              std::vector<float> bands(adds ? problem.N * problem.bands() * problem.C : 0);
              float* parts = adds ? bands.data() : total;
              launch<typename decltype(type)::type>(problem, at[0],
                                                    static_cast<const float*>(at[1]),
                                                    static_cast<const float*>(at[2]), at[3], parts);
              if (adds) add_bands(problem, parts, total);
            });
  };
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run(Type<float>{});
      break;
    case ScalarType::Half:
      run(Type<float16>{});
      break;
    case ScalarType::BFloat16:
      run(Type<bfloat16>{});
      break;
    default:
      fail(OP, ": dtype must be float32, float16 or bfloat16, got ",
           torch::headeronly::toString(x.scalar_type()));
  }
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("depthwise_conv_bn_act_native", TORCH_BOX(&depthwise_conv_bn_act_native));
}

}  // namespace
}  // namespace cvkernels::depthwise_conv_bn_act
