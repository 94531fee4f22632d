// conv_bn_act of bytes on the CPU. Schema: cvkernels/ops/quantised/convolution.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/cpu.h"
#include "common/instruction_sets.h"
#include "common/large_output.h"
#include "common/number.h"
#include "common/sigmoid_table.h"
#include "conv_bn_act/ops.h"
#include "conv_bn_act/tasks.h"

namespace cvkernels::conv_bn_act {
namespace {

constexpr const char* OP = "conv_bn_act_quantised";

#define CVK_BYTE_DOTS
#define CVK_SOURCE "conv_bn_act/products.h"
#include "common/isa.h"

void run(const Problem& problem, const Data<uint8_t>& data) {
#define CVK_DIRECT(isa)                                        \
  return run_direct<Quad>(problem, [&](auto... arguments) {    \
    isa::convolve<uint8_t, Quad>(problem, data, arguments...); \
  })
  CVK_BEST_BYTE_DOTS(CVK_DIRECT);
#undef CVK_DIRECT
}

void conv_bn_act_quantised(const Tensor& x, const Tensor& weight, const Tensor& vectors,
                           const Tensor& out, const Maybe& residual, const Maybe& input_affine,
                           const Maybe& input_gate, const Maybe& output_gate, int64_t kernel_h,
                           int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                           int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t act,
                           int64_t zero, double x_zero, double gate_scale, double offset,
                           double residual_scale, double low, double high, double out_scale,
                           double out_zero) {
  CVK_CHECK(OP, x.scalar_type() == ScalarType::Byte, "x must be uint8, got ",
            torch::headeronly::toString(x.scalar_type()));
  const bool wide = out.scalar_type() == ScalarType::Float;
  CVK_CHECK(OP, out.is_cpu() && (wide || out.scalar_type() == ScalarType::Byte),
            "out must be uint8 or float32 on the CPU, got ",
            torch::headeronly::toString(out.scalar_type()));
  CVK_CHECK(OP, zero >= 0 && zero <= 255, "zero must be a byte, got ", zero);
  CVK_CHECK(OP, low <= high && (wide || (low >= 0 && high <= 255)),
            "low and high must be in order, and bytes where out is, got ", low, " and ", high);
  Problem problem = problem_of(OP, x, out, {kernel_h, kernel_w}, {stride_h, stride_w},
                               {padding_h, padding_w}, {dilation_h, dilation_w}, act);
  problem.has_prologue = input_affine.has_value() || input_gate.has_value();
  problem.quads = true;
  problem.zero = static_cast<uint8_t>(zero);
  // 255 times -128 or 127 for each of them fits a sum of 32 bits.
  CVK_CHECK(OP, problem.taps() * problem.C <= (int64_t{1} << 16),
            "a filter must have at most 65536 weights, got ", problem.taps() * problem.C);
  const int64_t columns = problem.panels() * PANEL;
  const void* weights = floats_of(OP, "weight", weight, problem.panels() * problem.panel_size());
  const void* of_channels = floats_of(OP, "vectors", vectors, 3 * columns);
  const void* affine = floats_of(OP, "input_affine", input_affine, 2 * problem.C);
  const ScalarType real = ScalarType::Float;
  const void* gate = gates_of(OP, "input_gate", input_gate, problem.N, problem.C, real);
  const void* output_gates = gates_of(OP, "output_gate", output_gate, problem.N, problem.K, real);
  set_residual(OP, problem, residual, x);
  if (problem.pixels() == 0 || problem.K == 0) return;
  const int64_t out_bytes =
      ((problem.pixels() - 1) * problem.out_stride + problem.K) * out.element_size();
  Quantised quantised{};
  const auto narrow = [](double number) { return static_cast<float>(number); };
  quantised.offset = narrow(offset);
  quantised.residual_scale = narrow(residual_scale);
  quantised.low = narrow(low);
  quantised.high = narrow(high);
  quantised.out_scale = narrow(out_scale);
  quantised.out_zero = narrow(out_zero);
  quantised.gate_shifts = problem.N * problem.C;
  const float middle = narrow(x_zero), factor = narrow(gate_scale);
  perform({x.const_data_ptr(), weights, of_channels, out.mutable_data_ptr(), address_of(residual),
           affine, gate, output_gates},
          [=](void* const* at) mutable {
            prefer_huge_pages(at[3], out_bytes);
            const auto floats = [at](int i) { return static_cast<const float*>(at[i]); };
            const auto bytes = [at](int i) { return static_cast<uint8_t*>(at[i]); };
            const float* scale = floats(2);
            quantised.scale = scale;
            quantised.surplus = reinterpret_cast<const int32_t*>(scale + 2 * columns);
            quantised.wide_out = wide ? static_cast<float*>(at[3]) : nullptr;
            const float* before = floats(5);
            // Of (x - x_zero) * gate * gate_scale + zero.
            std::vector<float> gates(at[6] == nullptr ? 0 : 2 * quantised.gate_shifts);
            for (size_t i = 0; i < gates.size() / 2; ++i) {
              gates[i] = floats(6)[i] * factor;
              gates[gates.size() / 2 + i] = static_cast<float>(zero) - middle * gates[i];
            }
            run(problem, {bytes(0), floats(1), scale + columns, bytes(4), before,
                          before == nullptr ? nullptr : before + problem.C,
                          gates.empty() ? nullptr : gates.data(), floats(7),
                          wide ? nullptr : bytes(3), quantised});
          });
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("conv_bn_act_quantised", TORCH_BOX(&conv_bn_act_quantised));
}

}  // namespace
}  // namespace cvkernels::conv_bn_act
