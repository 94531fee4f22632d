// What the ops of conv_bn_act on the CPU check alike.
#pragma once

#include "common/arguments.h"
#include "common/layout.h"
#include "conv_bn_act/problem.h"

namespace cvkernels::conv_bn_act {

struct Axes {
  int64_t h, w;
};

// The sizes of a call whose tensors fit each other.
inline Problem problem_of(const char* op, const Tensor& x, const Tensor& out, Axes kernel,
                          Axes stride, Axes padding, Axes dilation, int64_t act) {
  CVK_CHECK_CPU(op, x);
  CVK_CHECK_DIM(op, x, 4);
  CVK_CHECK_DIM(op, out, 4);
  CVK_CHECK(op,
            kernel.h > 0 && kernel.w > 0 && stride.h > 0 && stride.w > 0 && dilation.h > 0 &&
                dilation.w > 0 && padding.h >= 0 && padding.w >= 0,
            "kernel, stride and dilation must be positive, and padding not negative");
  CVK_CHECK(op, act >= 0 && act <= 3, "act must be between 0 and 3, got ", act);
  CVK_CHECK(op, x.size(1) > 0, "x must have channels, got shape ", shape_of(x));
  Problem problem{x.size(0), x.size(1), x.size(2), x.size(3), out.size(1)};
  problem.R = kernel.h;
  problem.S = kernel.w;
  problem.stride_h = stride.h;
  problem.stride_w = stride.w;
  problem.padding_h = padding.h;
  problem.padding_w = padding.w;
  problem.dilation_h = dilation.h;
  problem.dilation_w = dilation.w;
  const int64_t room_h = problem.H + 2 * padding.h - dilation.h * (kernel.h - 1) - 1;
  const int64_t room_w = problem.W + 2 * padding.w - dilation.w * (kernel.w - 1) - 1;
  CVK_CHECK(op, room_h >= 0 && room_w >= 0, "no window fits x of shape ", shape_of(x));
  problem.P = room_h / stride.h + 1;
  problem.Q = room_w / stride.w + 1;
  problem.act = static_cast<Act>(act);
  problem.x_stride_n = x.stride(0);
  problem.x_stride_c = problem.C > 1 ? x.stride(1) : 1;
  problem.x_stride_h = x.stride(2);
  problem.x_stride_w = x.stride(3);
  CVK_CHECK(op, out.size(0) == problem.N && out.size(2) == problem.P && out.size(3) == problem.Q,
            "out must have shape [", problem.N, ", ", problem.K, ", ", problem.P, ", ", problem.Q,
            "], got ", shape_of(out));
  problem.out_stride = pixel_stride(op, "out", out);
  return problem;
}

inline void set_residual(const char* op, Problem& problem, const Maybe& residual, const Tensor& x) {
  if (!residual) return;
  CVK_CHECK_SAME(op, *residual, x);
  CVK_CHECK(op,
            residual->dim() == 4 && residual->size(0) == problem.N &&
                residual->size(1) == problem.K && residual->size(2) == problem.P &&
                residual->size(3) == problem.Q,
            "residual must have out's shape, got ", shape_of(*residual));
  problem.residual_stride = pixel_stride(op, "residual", *residual);
}

inline const void* gates_of(const char* op, const char* name, const Maybe& gate, int64_t images,
                            int64_t channels, ScalarType dtype) {
  if (!gate) return nullptr;
  CVK_CHECK(op, gate->is_cpu() && gate->scalar_type() == dtype, name, " must be ",
            torch::headeronly::toString(dtype), " on the CPU, got ",
            torch::headeronly::toString(gate->scalar_type()));
  CVK_CHECK(op, gate->is_contiguous() && gate->numel() == images * channels, name, " must hold ",
            images * channels, " numbers, got shape ", shape_of(*gate));
  return gate->const_data_ptr();
}

}  // namespace cvkernels::conv_bn_act
