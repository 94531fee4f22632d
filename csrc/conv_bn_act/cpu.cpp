// conv_bn_act on the CPU. Schema: cvkernels/ops/conv_bn_act/native.py.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/arguments.h"
#include "common/cpu.h"
#include "common/instruction_sets.h"
#include "common/large_output.h"
#include "common/number.h"
#include "common/recycled.h"
#include "common/sigmoid_table.h"
#include "conv_bn_act/ops.h"
#include "conv_bn_act/tasks.h"
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

// Bytes of transformed tiles that are summed at all points before the next are transformed.
constexpr int64_t TRANSFORMED = 2 << 20;

// Input channels of a task that sums products of tiles.
constexpr int64_t CHANNELS = 48;

template <int MH, int MW, typename Points, typename Transform, typename Multiply, typename Finish>
void run_winograd_gradient(const Problem& problem, const Data<float>& data, const float* grad,
                           const FilterMap& map, Transform transform, Multiply multiply,
                           Finish finish) {
  constexpr int64_t POINTS = (MH + 2) * (MW + 2), FLOATS = TRANSFORMED / sizeof(float);
  const Tiling tiling(problem, MH, MW);
  const int64_t C = problem.C, columns = problem.panels() * PANEL;
  const int64_t most = std::max<int64_t>(128, FLOATS / (POINTS * (C + columns)));
  const int64_t chunks = std::max<int64_t>(1, divide_up(tiling.tiles, most));
  const Points points(problem, divide_up(tiling.tiles, chunks), problem.panels());
  const int64_t zero = whole_lines(std::max(C, problem.K));
  const int64_t operands = POINTS * points.operand_stride;
  const int64_t size = C * columns, parts = divide_up(C, CHANNELS);
  const int64_t before = zero + operands + POINTS * points.product_stride;
  const Scratch memory((before + POINTS * size) * sizeof(float));
  std::fill_n(memory.floats(), zero, 0.0f);
  const float* zeros = memory.floats();
  float *operand = memory.floats() + zero, *products = operand + operands;
  float* const sums = memory.floats() + before;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Range tiles = part_of(tiling.tiles, chunks, chunk);
    parallel_for(tiles.begin, tiles.end, 8, [&](int64_t begin, int64_t end) {
      transform(problem, data, grad, tiling, {begin, end}, tiles.begin, zeros, points, operand,
                products);
    });
    parallel_for(0, POINTS * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t point = task / parts;
        const Range channels = part_of(C, parts, task % parts);
        float* to = sums + point * size;
        if (chunk == 0) std::fill_n(to + channels.begin * columns, channels.size() * columns, 0.0f);
        multiply(channels, columns, tiles.size(), operand + point * points.operand_stride,
                 Points::channels(problem), products + point * points.product_stride, columns, to);
      }
    });
  }
  parallel_for(0, map.blocks(), 4,
               [&](int64_t begin, int64_t end) { finish(map, Range{begin, end}, sums, columns); });
}

// Pixels, and rows of a task, whose products with all columns are summed before the next pixels':
// they stay in the second cache meanwhile.
constexpr int64_t PIXELS_TOGETHER = 256, ROWS_TOGETHER = 192;

// out[K, C] of a 1x1 convolution, C being a multiple of PANEL.
template <typename Multiply>
void run_pointwise_gradient(const Problem& problem, const float* x, const float* grad, float* out,
                            Multiply multiply) {
  const int64_t C = problem.C, pixels = problem.pixels();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t even = divide_up(divide_up(problem.K, ROWS_TOGETHER), threads) * threads;
  const int64_t parts = std::min(even, divide_up(problem.K, PANEL));
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Range rows = part_of(problem.K, parts, part);
      std::fill_n(out + rows.begin * C, rows.size() * C, 0.0f);
      for (int64_t pixel = 0; pixel < pixels; pixel += PIXELS_TOGETHER)
        multiply(rows, C, std::min(PIXELS_TOGETHER, pixels - pixel),
                 grad + pixel * problem.out_stride, problem.out_stride,
                 x + pixel * problem.x_stride_w, problem.x_stride_w, out);
    }
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

// Points that a tile of Winograd's is known at.
constexpr int64_t points_of(int64_t algorithm) { return 4 * (algorithm + 2); }

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
  const ScalarType dtype = x.scalar_type();
  CVK_CHECK(
      OP, dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "x must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  CVK_CHECK_SAME(OP, out, x);
  CVK_CHECK(OP, algorithm >= DIRECT && algorithm <= WINOGRAD_2X4,
            "algorithm must be between 0 and 4, got ", algorithm);
  const bool is_winograd = algorithm == WINOGRAD_2X2 || algorithm == WINOGRAD_2X4;
  const bool pairs = algorithm == PAIRS || algorithm == TILES;
  CVK_CHECK(OP, !pairs || dtype == ScalarType::BFloat16, "pairs are of bfloat16, got ",
            torch::headeronly::toString(dtype));
  Problem problem = problem_of(OP, x, out, {kernel_h, kernel_w}, {stride_h, stride_w},
                               {padding_h, padding_w}, {dilation_h, dilation_w}, act);
  problem.has_prologue = input_affine.has_value() || input_gate.has_value();
  problem.pairs = pairs;
  problem.tiles = algorithm == TILES;
  problem.pairs_weights = dtype == ScalarType::BFloat16 && !is_winograd;
  problem.widens = !problem.pairs && dtype != ScalarType::Float;
  CVK_CHECK(OP,
            !is_winograd || (kernel_h == 3 && kernel_w == 3 && stride_h == 1 && stride_w == 1 &&
                             dilation_h == 1 && dilation_w == 1 && !problem.has_prologue &&
                             problem.x_stride_c == 1),
            "Winograd's tiles need a 3x3 kernel of stride 1, and x with its channels together");
  const int64_t panel =
      is_winograd ? points_of(algorithm) * problem.C * PANEL : problem.panel_size();
  const void* weights = floats_of(OP, "weight", weight, problem.panels() * panel);
  const void* shifts = floats_of(OP, "shift", shift, problem.panels() * PANEL);
  const void* affine = floats_of(OP, "input_affine", input_affine, 2 * problem.C);
  const void* gate = gates_of(OP, "input_gate", input_gate, problem.N, problem.C, dtype);
  const void* output_gates = gates_of(OP, "output_gate", output_gate, problem.N, problem.K, dtype);
  set_residual(OP, problem, residual, x);
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

template <int MW>
void transform_filters(const FilterMap& map, bool reversed, float* points) {
#define CVK_TRANSFORM(isa)                                                  \
  return parallel_for(0, map.blocks(), 4, [&](int64_t begin, int64_t end) { \
    isa::transform_filters<2, MW>(map, {begin, end}, reversed, points);     \
  })
  CVK_BEST_ISA(CVK_TRANSFORM);
#undef CVK_TRANSFORM
}

void check_winograd(int64_t algorithm) {
  CVK_CHECK(OP, algorithm == WINOGRAD_2X2 || algorithm == WINOGRAD_2X4,
            "algorithm must be 2 or 4, got ", algorithm);
}

void conv_bn_act_native_filters(const Tensor& weight, bool reversed, int64_t algorithm,
                                const Tensor& points) {
  check_winograd(algorithm);
  CVK_CHECK_CPU(OP, weight);
  CVK_CHECK(OP,
            weight.scalar_type() == ScalarType::Float && weight.dim() == 4 && weight.size(2) == 3 &&
                weight.size(3) == 3,
            "weight must be float32 of shape [K, C, 3, 3], got ", shape_of(weight), " of ",
            torch::headeronly::toString(weight.scalar_type()));
  const FilterMap filters{nullptr,          weight.size(0),   weight.size(1),  weight.stride(0),
                          weight.stride(1), weight.stride(2), weight.stride(3)};
  const int64_t size = points_of(algorithm) * filters.panels() * filters.C * PANEL;
  const void* to = floats_of(OP, "points", points, size);
  perform({weight.const_data_ptr(), to}, [=](void* const* at) {
    FilterMap map = filters;
    map.data = static_cast<float*>(at[0]);
    prefer_huge_pages(at[1], size * int64_t{sizeof(float)});
    const auto transform =
        algorithm == WINOGRAD_2X4 ? &transform_filters<4> : &transform_filters<2>;
    transform(map, reversed, static_cast<float*>(at[1]));
  });
}

template <int MW>
void winograd_gradient(const Problem& problem, const Data<float>& data, const float* grad,
                       const FilterMap& map) {
#define CVK_GRADIENT(isa)                                                                  \
  return run_winograd_gradient<2, MW, isa::Points>(                                        \
      problem, data, grad, map, &isa::transform_both<2, MW, float>, &isa::multiply_pixels, \
      &isa::finish_filters<2, MW>)
  CVK_BEST_ISA(CVK_GRADIENT);
#undef CVK_GRADIENT
}

void pointwise_gradient(const Problem& problem, const float* x, const float* grad, float* out) {
#define CVK_GRADIENT(isa) \
  return run_pointwise_gradient(problem, x, grad, out, &isa::multiply_pixels)
  CVK_BEST_ISA(CVK_GRADIENT);
#undef CVK_GRADIENT
}

void conv_bn_act_native_weight_gradient(const Tensor& grad, const Tensor& x, int64_t padding_h,
                                        int64_t padding_w, int64_t algorithm, const Tensor& out) {
  CVK_CHECK_CPU(OP, x);
  CVK_CHECK_DIM(OP, x, 4);
  CVK_CHECK_DIM(OP, grad, 4);
  CVK_CHECK_DIM(OP, out, 4);
  CVK_CHECK(OP, x.scalar_type() == ScalarType::Float, "x must be float32, got ",
            torch::headeronly::toString(x.scalar_type()));
  CVK_CHECK_SAME(OP, grad, x);
  CVK_CHECK_SAME(OP, out, x);
  const bool is_winograd = algorithm != DIRECT;
  if (is_winograd) check_winograd(algorithm);
  const int64_t kernel = is_winograd ? 3 : 1;
  Problem problem{x.size(0), x.size(1), x.size(2), x.size(3), grad.size(1)};
  problem.padding_h = padding_h;
  problem.padding_w = padding_w;
  problem.P = problem.H + 2 * padding_h - kernel + 1;
  problem.Q = problem.W + 2 * padding_w - kernel + 1;
  problem.x_stride_n = x.stride(0);
  problem.x_stride_h = x.stride(2);
  problem.x_stride_w = is_winograd ? x.stride(3) : pixel_stride(OP, "x", x);
  problem.out_stride = pixel_stride(OP, "grad", grad);
  CVK_CHECK(OP, problem.C == 1 || x.stride(1) == 1, "x must have its channels together");
  CVK_CHECK(OP,
            out.size(0) == problem.K && out.size(1) == problem.C && out.size(2) == kernel &&
                out.size(3) == kernel,
            "out must have shape [", problem.K, ", ", problem.C, ", ", kernel, ", ", kernel,
            "], got ", shape_of(out));
  CVK_CHECK(OP, is_winograd || (out.is_contiguous() && problem.C % PANEL == 0),
            "a 1x1 weight must be dense, with a multiple of ", PANEL, " input channels");
  CVK_CHECK(OP,
            padding_h >= 0 && padding_w >= 0 && grad.size(0) == problem.N &&
                grad.size(2) == problem.P && grad.size(3) == problem.Q,
            "grad must have shape [", problem.N, ", ", problem.K, ", ", problem.P, ", ", problem.Q,
            "], got ", shape_of(grad));
  if (problem.K == 0 || problem.C == 0) return;
  FilterMap map{nullptr,       problem.K,     problem.C,    out.stride(0),
                out.stride(1), out.stride(2), out.stride(3)};
  perform({grad.const_data_ptr(), x.const_data_ptr(), out.mutable_data_ptr()},
          [=](void* const* at) mutable {
            const auto* grad = static_cast<const float*>(at[0]);
            Data<float> data{};
            data.x = static_cast<const float*>(at[1]);
            map.data = static_cast<float*>(at[2]);
            if (!is_winograd) return pointwise_gradient(problem, data.x, grad, map.data);
            const auto run =
                algorithm == WINOGRAD_2X4 ? &winograd_gradient<4> : &winograd_gradient<2>;
            run(problem, data, grad, map);
          });
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("conv_bn_act_native", TORCH_BOX(&conv_bn_act_native));
  library.impl("conv_bn_act_native_filters", TORCH_BOX(&conv_bn_act_native_filters));
  library.impl("conv_bn_act_native_weight_gradient",
               TORCH_BOX(&conv_bn_act_native_weight_gradient));
}

}  // namespace
}  // namespace cvkernels::conv_bn_act
