// depthwise_conv_bn_act on the CPU. Schema: cvkernels/ops/depthwise_conv_bn_act/native.py.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/arguments.h"
#include "common/cpu.h"
#include "common/instruction_sets.h"
#include "common/large_output.h"
#include "common/number.h"
#include "common/sigmoid_table.h"
#include "depthwise_conv_bn_act/problem.h"

namespace cvkernels::depthwise_conv_bn_act {
namespace {

constexpr const char* OP = "depthwise_conv_bn_act";

#define CVK_SOURCE "depthwise_conv_bn_act/rows.h"
#include "common/isa.h"

namespace of_quads {
#define CVK_BYTE_DOTS
#define CVK_SOURCE "depthwise_conv_bn_act/quads.h"
#include "common/isa.h"
}  // namespace of_quads

template <typename T>
auto best_band(const Problem& problem) {
#define CVK_SELECT(isa) return isa::select<T>(problem)
#if defined(__x86_64__) && defined(__GLIBC__)
  // Processors with AVX-512 mostly have AVX512-VNNI, too: see launch_quads.
  if constexpr (std::is_same_v<T, uint8_t>) {
    if (takes(InstructionSet::AVX2)) CVK_SELECT(avx2);
    CVK_SELECT(baseline);
  } else
#endif
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

// Bytes of a group of 16 channels in the weights that AVX512-VNNI takes.
int64_t quads_of_group(const Problem& problem) {
  return problem.kernel * (problem.kernel == 5 ? 2 : 1) * 4 * BLOCK;
}

#if defined(__x86_64__) && defined(__GLIBC__)
// launch() of bytes by AVX512-VNNI, where the processor has that and the weights are there for it;
// whether it did it.
bool launch_quads(const Problem& problem, const void* x_data, const float* weights,
                  const float* affine, void* out_data, float* parts) {
  using namespace of_quads::avx512vnni;
  if (weights == nullptr || problem.x_stride_c != 1 || !takes(InstructionSet::AVX512_VNNI))
    return false;
  const auto* x = static_cast<const uint8_t*>(x_data);
  auto* out = static_cast<uint8_t*>(out_data);
  const auto* quads = reinterpret_cast<const int8_t*>(weights);
  const auto* surplus =
      reinterpret_cast<const int32_t*>(quads + problem.blocks() * quads_of_group(problem));
  struct Channels {
    int64_t begin;
    int groups;
  };
  std::vector<Channels> channels;
  for (int64_t c = 0; c < problem.C;) {
    const int64_t left = problem.C - c;
    const int groups = left >= 4 * BLOCK ? 4 : left >= 2 * BLOCK ? 2 : 1;
    channels.push_back({c, groups});
    c += groups * BLOCK;
  }
  const int64_t count = static_cast<int64_t>(channels.size()), bands = problem.bands();
  const int64_t products = std::min(problem.P, Problem::BAND) * problem.Q * BLOCK;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  parallel_for(0, problem.N * bands * count, cvkernels::grain_of(products),
               [&](int64_t first, int64_t last) {
                 alignas(64) static thread_local uint8_t ring[5 * QUADS * 64 * 4];
                 std::vector<float> row_sums(parts == nullptr ? 0 : Problem::BAND * 4 * BLOCK);
                 for (int64_t index = first; index < last; ++index) {
                   const auto [c, groups] = channels[index % count];
                   const int64_t band = index / count % bands, n = index / count / bands;
                   QuadTask task{};
                   task.first = band * Problem::BAND;
                   task.last = std::min(problem.P, task.first + Problem::BAND);
                   task.kept = std::min<int64_t>(groups * BLOCK, problem.C - c);
                   task.x = x + n * problem.x_stride_n + c;
                   task.out = out + n * problem.P * problem.Q * problem.C + c;
                   task.weight = quads + c / BLOCK * quads_of_group(problem);
                   task.scale = affine + c;
                   task.shift = affine + problem.blocks() * BLOCK + c;
                   task.surplus = surplus + c;
                   task.ring = ring;
                   task.row_sums = parts == nullptr ? nullptr : row_sums.data();
                   task.low = problem.act == Act::NONE ? -infinity : 0.0f;
                   task.high = problem.act == Act::RELU6 ? 6.0f : infinity;
                   const MakeQuads make = groups == 4   ? select_quads<4>(problem)
                                          : groups == 2 ? select_quads<2>(problem)
                                                        : select_quads<1>(problem);
                   make(problem, task);
                   if (parts == nullptr) continue;
                   float* to = parts + (n * bands + band) * problem.C + c;
                   for (int64_t i = 0; i < task.kept; ++i) {
                     float sum = 0.0f;
                     for (int64_t p = 0; p < task.last - task.first; ++p)
                       sum += row_sums[p * groups * BLOCK + i];
                     to[i] = sum;
                   }
                 }
               });
  return true;
}
#else
bool launch_quads(const Problem&, const void*, const float*, const float*, void*, float*) {
  return false;
}
#endif

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

// The tensors of one call; of bytes the weights as AVX512-VNNI takes them, too.
struct Call {
  const Tensor& x;
  const Tensor& weight;
  const Tensor& affine;
  const Tensor& out;
  const Maybe& sums;
  const Maybe& quads;
};

// Checks them, and has the convolution done for elements of T.
template <typename T>
void perform_call(Problem problem, const Call& call, int64_t act) {
  const auto& [x, weight, affine, out, sums, quads] = call;
  CVK_CHECK(OP, act >= 0 && act <= 3, "act must be between 0 and 3, got ", act);
  problem.act = static_cast<Act>(act);
  const int64_t taps = problem.kernel * problem.kernel;
  const void* weights = floats_of(OP, "weight", weight, problem.blocks() * taps * BLOCK);
  const void* affines = floats_of(OP, "affine", affine, 2 * problem.blocks() * BLOCK);
  CVK_CHECK_SAME(OP, out, x);
  // Past the last gradient there may be one row and column more that no window began in.
  const auto fits = [&](int64_t size, int64_t expected) {
    return size == expected || (problem.spread == 2 && size == expected + 1);
  };
  CVK_CHECK(OP,
            out.dim() == 4 && out.size(0) == problem.N && fits(out.size(1), problem.P) &&
                fits(out.size(2), problem.Q) && out.size(3) == problem.C && out.is_contiguous(),
            "out must be dense with shape [", problem.N, ", ", problem.P, ", ", problem.Q, ", ",
            problem.C, "], got ", shape_of(out));
  problem.P = out.size(1);
  problem.Q = out.size(2);
  const void* sums_data = floats_of(OP, "sums", sums, problem.N * problem.C);
  // Their bytes, then what is added to the sums of each channel.
  const int64_t of_quads = problem.blocks() * quads_of_group(problem) / int64_t{sizeof(float)};
  const void* quads_data = floats_of(OP, "quads", quads, of_quads + problem.blocks() * BLOCK);
  if (problem.N == 0 || problem.C == 0) return;
  const int64_t out_bytes = out.numel() * out.element_size();
  const auto work = [=](void* const* at) {
    prefer_huge_pages(at[3], out_bytes);
    const auto floats = [at](int i) { return static_cast<float*>(at[i]); };
    float* total = floats(4);
    const bool adds = total != nullptr && problem.bands() > 1;
    std::vector<float> bands(adds ? problem.N * problem.bands() * problem.C : 0);
    float* parts = adds ? bands.data() : total;
    bool done = false;
    if constexpr (std::is_same_v<T, uint8_t>)
      done = launch_quads(problem, at[0], floats(5), floats(2), at[3], parts);
    if (!done) launch<T>(problem, at[0], floats(1), floats(2), at[3], parts);
    if (adds) add_bands(problem, parts, total);
  };
  const void* const data[] = {x.const_data_ptr(), out.mutable_data_ptr()};
  if constexpr (std::is_same_v<T, uint8_t>)
    perform({data[0], weights, affines, data[1], sums_data, quads_data}, work);
  else
    perform({data[0], weights, affines, data[1], sums_data}, work);
}

void depthwise_conv_bn_act_native(const Tensor& x, const Tensor& weight, const Tensor& affine,
                                  int64_t kernel, int64_t stride, int64_t padding_h,
                                  int64_t padding_w, int64_t spread, int64_t act, const Tensor& out,
                                  const Maybe& sums) {
  const Problem problem = problem_of(x, kernel, stride, padding_h, padding_w, spread);
  dispatch(OP, x.scalar_type(), [&]<typename T>(Type<T>) {
    perform_call<T>(problem, {x, weight, affine, out, sums, std::nullopt}, act);
  });
}

void depthwise_conv_bn_act_quantised(const Tensor& x, const Tensor& weight, const Tensor& affine,
                                     int64_t kernel, int64_t stride, int64_t padding_h,
                                     int64_t padding_w, int64_t act, int64_t x_zero,
                                     double out_scale, int64_t out_zero, const Tensor& out,
                                     const Maybe& sums, const Maybe& quads) {
  CVK_CHECK(OP, x.scalar_type() == ScalarType::Byte, "x must be uint8, got ",
            torch::headeronly::toString(x.scalar_type()));
  Problem problem = problem_of(x, kernel, stride, padding_h, padding_w, 1);
  problem.x_zero = static_cast<float>(x_zero);
  problem.out_scale = static_cast<float>(out_scale);
  problem.out_zero = static_cast<float>(out_zero);
  perform_call<uint8_t>(problem, {x, weight, affine, out, sums, quads}, act);
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
  library.impl("depthwise_conv_bn_act_quantised", TORCH_BOX(&depthwise_conv_bn_act_quantised));
  library.impl("depthwise_conv_bn_act_native_weight_gradient",
               TORCH_BOX(&depthwise_conv_bn_act_native_weight_gradient));
}

}  // namespace
}  // namespace cvkernels::depthwise_conv_bn_act
