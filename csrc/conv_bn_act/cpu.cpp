// conv_bn_act on the CPU. Schema: cvkernels/ops/conv_bn_act/native.py.
#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "common/arguments.h"
#include "common/cpu.h"
#include "common/instruction_sets.h"
#include "common/large_output.h"
#include "common/layout.h"
#include "common/number.h"
#include "conv_bn_act/problem.h"
#include "conv_bn_act/tiled.h"

namespace cvkernels::conv_bn_act {
namespace {

constexpr const char* OP = "conv_bn_act";

#define CVK_SOURCE "conv_bn_act/winograd.h"
#include "common/isa.h"

namespace of_pairs {
#define CVK_DOTS
#define CVK_SOURCE "conv_bn_act/tiles.h"
#include "common/isa.h"
}  // namespace of_pairs

// A thread's scratch memory: kept between calls, since fresh pages cost more than the arithmetic.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<float[], Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    memory.reset(
        static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
    size = floats;
  }
  return memory.get();
}

// Factors of a task's operand that stay in the second cache beside the weights in use.
constexpr int64_t CACHED = 48 << 10;

constexpr int64_t whole_lines(int64_t floats) { return divide_up(floats, 16) * 16; }

template <typename U, typename Convolve>
void run_direct(const Problem& problem, Convolve convolve) {
  static_assert(sizeof(U) == sizeof(float));
  const int64_t factors = problem.parts() * problem.depth();
  const int64_t pixel = problem.gathers() ? factors : factors / problem.taps();
  const bool by_panels = !problem.gathers() && problem.K * problem.taps() > problem.pixels();
  const Cut cut(problem.pixels(), std::clamp<int64_t>(CACHED / pixel, 56, 240), problem.panels(),
                torch::stable::get_num_threads(), by_panels);
  int64_t gathered = problem.gathers() ? cut.block() * factors : 0;
  if (problem.has_bands()) {  // of a row of pixels at a time, the first and the last of them short
    const int64_t pixels = cut.block();
    const int64_t rows_of_pixels = cut.block() / problem.Q + 2;
    const int64_t width = pixels * problem.stride_w + rows_of_pixels * problem.S;
    gathered = problem.R * width * problem.band_channels() / (problem.pairs ? 2 : 1);
  }
  const int64_t pointers =
      whole_lines(divide_up(sizeof(U*), sizeof(float)) * cut.block() * problem.parts());
  parallel_for(0, cut.tasks(), 1, [&](int64_t first, int64_t last) {
    const int64_t zero = whole_lines(problem.depth());
    float* zeros = scratch(zero + pointers + gathered);
    std::fill_n(zeros, zero, 0.0f);
    float* indirect = zeros + zero;
    float* operand = indirect + pointers;
    for (int64_t task = first; task < last; ++task)
      convolve(cut.rows_of(task), cut.panels_of(task), reinterpret_cast<const U*>(zeros),
               reinterpret_cast<U*>(operand), reinterpret_cast<const U**>(indirect));
  });
}

template <int MH, int MW, typename Points, typename T, typename Convolve>
void run_winograd(const Problem& problem, const Data<T>& data, Convolve convolve) {
  constexpr int64_t POINTS = (MH + 2) * (MW + 2);
  const Tiling tiling(problem, MH, MW);
  const int64_t most = std::clamp<int64_t>(2 * CACHED / (POINTS * problem.C), 48, 96);
  // With the panels split, every thread transforms the input.
  const bool by_panels = problem.K > 8 * tiling.tiles;
  const Cut cut(tiling.tiles, most, problem.panels(), torch::stable::get_num_threads(), by_panels);
  const Points points(problem, cut.block(), cut.split());
  const int64_t zero = whole_lines(problem.C);
  parallel_for(0, cut.tasks(), 1, [&](int64_t first, int64_t last) {
    float* zeros = scratch(zero + POINTS * (points.operand_stride + points.product_stride));
    std::fill_n(zeros, zero, 0.0f);
    float* operand = zeros + zero;
    float* products = operand + POINTS * points.operand_stride;
    for (int64_t task = first; task < last; ++task)
      convolve(problem, data, tiling, cut.rows_of(task), cut.panels_of(task),
               reinterpret_cast<const T*>(zeros), points, operand, products);
  });
}

template <typename Convolve>
void run_tiled(const Problem& problem, const Data<bfloat16>& data, Convolve convolve) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool by_panels = problem.K * problem.taps() > problem.pixels();
  const Tiled tiled(problem, threads, by_panels);
  const int64_t most = TILED_BYTES / int64_t{sizeof(bfloat16)} / tiled.unit_size();
  const Cut cut(tiled.units, std::max<int64_t>(1, most), problem.panels(), threads, by_panels, 1);
  const int64_t offsets = divide_up(tiled.parts * sizeof(int64_t), 64) * 16;
  const int64_t pointers = STRIP * sizeof(Pair*) / sizeof(float), sums = STRIP * COLUMNS;
  const int64_t numbers = cut.block() * tiled.unit_size() + STRIP * tiled.channels;
  parallel_for(0, cut.tasks(), 1, [&](int64_t first, int64_t last) {
    float* memory = scratch(offsets + pointers + sums + numbers / 2);
    auto* offset = reinterpret_cast<int64_t*>(memory);
    for (int64_t part = 0; part < tiled.parts; ++part)
      offset[part] = tiled.offset(problem, part / problem.S, part % problem.S);
    auto* indirect = reinterpret_cast<const Pair**>(memory + offsets);
    float* to = memory + offsets + pointers;
    auto* operand = reinterpret_cast<bfloat16*>(to + sums);
    for (int64_t task = first; task < last; ++task)
      convolve(problem, data, tiled, cut.rows_of(task), cut.panels_of(task), offset, to, operand,
               indirect);
  });
}

// How a convolution is computed; cvkernels/ops/conv_bn_act/native.py counts them so, too.
enum Algorithm : int64_t { DIRECT = 0, PAIRS = 1, WINOGRAD_2X2 = 2, TILES = 3, WINOGRAD_2X4 = 4 };

#define CVK_DIRECT(isa) \
  return run_direct<U>( \
      problem, [&](auto... arguments) { isa::convolve<T, U>(problem, data, arguments...); })
#define CVK_WINOGRAD(isa) \
  return run_winograd<2, MW, isa::Points>(problem, data, &isa::convolve_tiles<2, MW, T>)

template <typename T>
void run(const Problem& problem, const Data<T>& data, int64_t algorithm) {
  if (algorithm == WINOGRAD_2X4) {
    constexpr int MW = 4;
    CVK_BEST_ISA(CVK_WINOGRAD);
  }
  if (algorithm == WINOGRAD_2X2) {
    constexpr int MW = 2;
    CVK_BEST_ISA(CVK_WINOGRAD);
  }
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (algorithm == PAIRS) {
      using U = Pair;
#define CVK_PAIRS(isa) CVK_DIRECT(of_pairs::isa)
      CVK_BEST_DOTS(CVK_PAIRS);
#undef CVK_PAIRS
    }
    if (algorithm == TILES) {
#if defined(CVK_HAS_AMX)
      if (takes(InstructionSet::AMX))
        return run_tiled(problem, data, &of_pairs::avx512bf16::convolve_by_tiles<AmxTiles>);
#endif
#define CVK_TILES(isa) \
  return run_tiled(problem, data, &of_pairs::isa::convolve_by_tiles<PlainTiles>)
      CVK_BEST_DOTS(CVK_TILES);
#undef CVK_TILES
    }
  }
  using U = float;
  CVK_BEST_ISA(CVK_DIRECT);
}
#undef CVK_DIRECT
#undef CVK_WINOGRAD

void conv_bn_act_native(const Tensor& x, const Tensor& weight, const Tensor& shift,
                        const Tensor& out, const Maybe& residual, const Maybe& input_affine,
                        const Maybe& input_gate, const Maybe& output_gate, int64_t kernel_h,
                        int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                        int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t act,
                        int64_t algorithm) {
  CVK_CHECK_CPU(OP, x);
  CVK_CHECK_DIM(OP, x, 4);
  CVK_CHECK_DIM(OP, out, 4);
  const ScalarType dtype = x.scalar_type();
  CVK_CHECK(
      OP, dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "x must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  CVK_CHECK_SAME(OP, out, x);
  CVK_CHECK(OP,
            kernel_h > 0 && kernel_w > 0 && stride_h > 0 && stride_w > 0 && dilation_h > 0 &&
                dilation_w > 0 && padding_h >= 0 && padding_w >= 0,
            "kernel, stride and dilation must be positive, and padding not negative");
  CVK_CHECK(OP, act >= 0 && act <= 3, "act must be between 0 and 3, got ", act);
  CVK_CHECK(OP, algorithm >= DIRECT && algorithm <= WINOGRAD_2X4,
            "algorithm must be between 0 and 4, got ", algorithm);
  const bool is_winograd = algorithm == WINOGRAD_2X2 || algorithm == WINOGRAD_2X4;
  const bool pairs = algorithm == PAIRS || algorithm == TILES;
  CVK_CHECK(OP, !pairs || dtype == ScalarType::BFloat16, "pairs are of bfloat16, got ",
            torch::headeronly::toString(dtype));
  CVK_CHECK(OP, x.size(1) > 0, "x must have channels, got shape ", shape_of(x));
  Problem problem{x.size(0), x.size(1), x.size(2), x.size(3), out.size(1)};
  problem.R = kernel_h;
  problem.S = kernel_w;
  problem.stride_h = stride_h;
  problem.stride_w = stride_w;
  problem.padding_h = padding_h;
  problem.padding_w = padding_w;
  problem.dilation_h = dilation_h;
  problem.dilation_w = dilation_w;
  const int64_t room_h = problem.H + 2 * padding_h - dilation_h * (kernel_h - 1) - 1;
  const int64_t room_w = problem.W + 2 * padding_w - dilation_w * (kernel_w - 1) - 1;
  CVK_CHECK(OP, room_h >= 0 && room_w >= 0, "no window fits x of shape ", shape_of(x));
  problem.P = room_h / stride_h + 1;
  problem.Q = room_w / stride_w + 1;
  problem.act = static_cast<Act>(act);
  problem.x_stride_n = x.stride(0);
  problem.x_stride_c = problem.C > 1 ? x.stride(1) : 1;
  problem.x_stride_h = x.stride(2);
  problem.x_stride_w = x.stride(3);
  problem.has_prologue = input_affine.has_value() || input_gate.has_value();
  problem.pairs = pairs;
  problem.tiles = algorithm == TILES;
  problem.pairs_weights = dtype == ScalarType::BFloat16 && !is_winograd;
  problem.widens = !problem.pairs && dtype != ScalarType::Float;
  const auto fits = [&](const Tensor& tensor) {
    return tensor.dim() == 4 && tensor.size(0) == problem.N && tensor.size(1) == problem.K &&
           tensor.size(2) == problem.P && tensor.size(3) == problem.Q;
  };
  CVK_CHECK(OP, fits(out), "out must have shape [", problem.N, ", ", problem.K, ", ", problem.P,
            ", ", problem.Q, "], got ", shape_of(out));
  CVK_CHECK(OP,
            !is_winograd || (kernel_h == 3 && kernel_w == 3 && stride_h == 1 && stride_w == 1 &&
                             dilation_h == 1 && dilation_w == 1 && !problem.has_prologue &&
                             problem.x_stride_c == 1),
            "Winograd's tiles need a 3x3 kernel of stride 1, and x with its channels together");
  const int64_t panel =
      is_winograd ? 4 * (algorithm + 2) * problem.C * PANEL : problem.panel_size();
  const void* weights = floats_of(OP, "weight", weight, problem.panels() * panel);
  const void* shifts = floats_of(OP, "shift", shift, problem.panels() * PANEL);
  const void* affine = floats_of(OP, "input_affine", input_affine, 2 * problem.C);
  const auto gates_of = [&](const char* name, const Maybe& gate, int64_t channels) -> const void* {
    if (!gate) return nullptr;
    CVK_CHECK_SAME(OP, *gate, x);
    CVK_CHECK(OP, gate->is_contiguous() && gate->numel() == problem.N * channels, name,
              " must hold ", problem.N * channels, " numbers, got shape ", shape_of(*gate));
    return gate->const_data_ptr();
  };
  const void* gate = gates_of("input_gate", input_gate, problem.C);
  const void* output_gates = gates_of("output_gate", output_gate, problem.K);
  problem.out_stride = pixel_stride(OP, "out", out);
  if (residual) {
    CVK_CHECK_SAME(OP, *residual, x);
    CVK_CHECK(OP, fits(*residual), "residual must have out's shape, got ", shape_of(*residual));
    problem.residual_stride = pixel_stride(OP, "residual", *residual);
  }
  if (problem.pixels() == 0 || problem.K == 0) return;
  const int64_t out_bytes =
      ((problem.pixels() - 1) * problem.out_stride + problem.K) * out.element_size();
  const auto run_of = [&]<typename T>(Type<T>) {
    perform({x.const_data_ptr(), weights, shifts, out.mutable_data_ptr(), address_of(residual),
             affine, gate, output_gates},
            [=](void* const* at) {
              prefer_huge_pages(at[3], out_bytes);
              const auto floats = [at](int i) { return static_cast<float*>(at[i]); };
              const auto numbers = [at](int i) { return static_cast<T*>(at[i]); };
              const float* scale = floats(5);
              const Data<T> data{
                  numbers(0), floats(1),  floats(2),
                  numbers(4), scale,      scale == nullptr ? nullptr : scale + problem.C,
                  numbers(6), numbers(7), numbers(3)};
              run(problem, data, algorithm);
            });
  };
  if (dtype == ScalarType::Float) return run_of(Type<float>{});
  return dtype == ScalarType::Half ? run_of(Type<float16>{}) : run_of(Type<bfloat16>{});
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("conv_bn_act_native", TORCH_BOX(&conv_bn_act_native));
}

}  // namespace
}  // namespace cvkernels::conv_bn_act
