// The ops of batch_norm_act, one definition for CPU and CUDA: from tensors to a device's passes.
// Schemas: cvkernels/ops/batch_norm_act/passes.py.
//
// `Passes` is what the device has:
//   check(op, x)                                         x is there
//   statistics(op, x, start)
//   apply(op, x, bn, act, residual, out)
//   reduce(op, grad, x, bn, act, beside, results)
//   input_gradient(op, grad, x, bn, act, slope, offset, out)
#pragma once

#include "batch_norm_act_call.h"

namespace cvkernels::batch_norm_act {

template <typename Passes>
struct Ops {
  static void statistics(const Tensor& x, const Tensor& mean, const Tensor& var) {
    const char* op = "batch_norm_act_statistics";
    Passes::check(op, x);
    Passes::statistics(
        op, x, Start::of_statistics(result_of(op, "mean", mean, x), result_of(op, "var", var, x)));
  }

  static void apply(const Tensor& x, const Maybe& weight, const Maybe& bias, const Tensor& mean,
                    const Tensor& var, double eps, int64_t act, const Tensor& out) {
    const char* op = "batch_norm_act_apply";
    Passes::check(op, x);
    const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, x.size(1));
    Passes::apply(op, x, bn, act_of(op, act), std::nullopt, out);
  }

  static void reduce(const Tensor& grad, const Tensor& x, const Maybe& weight, const Maybe& bias,
                     const Tensor& mean, const Tensor& var, double eps, int64_t act,
                     const Tensor& total, const Tensor& d_weight, const Tensor& d_bias,
                     const Tensor& slope, const Tensor& offset) {
    const char* op = "batch_norm_act_reduce";
    Passes::check(op, x);
    const Act kind = act_of(op, act, "a total");
    const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, x.size(1));
    const Results results{result_of(op, "d_weight", d_weight, x),
                          result_of(op, "d_bias", d_bias, x), result_of(op, "slope", slope, x),
                          result_of(op, "offset", offset, x), true};
    Passes::reduce(op, grad, x, bn, kind, Beside::of_total(op, x, total), results);
  }

  static void input_gradient(const Tensor& grad, const Tensor& x, const Tensor& mean,
                             const Tensor& slope, const Tensor& offset, const Tensor& out) {
    const char* op = "batch_norm_act_input_gradient";
    Passes::check(op, x);
    const BatchNorm bn =
        batch_norm_of(op, {std::nullopt, std::nullopt, mean, std::nullopt, 0.0}, x, x.size(1));
    Passes::input_gradient(op, grad, x, bn, Act::NONE, result_of(op, "slope", slope, x),
                           result_of(op, "offset", offset, x), out);
  }

  static void forward(const Tensor& x, const Maybe& weight, const Maybe& bias,
                      const Maybe& running_mean, const Maybe& running_var, double factor,
                      double eps, int64_t act, const Maybe& residual, const Tensor& vectors,
                      const Tensor& out) {
    const char* op = "batch_norm_act_forward";
    Passes::check(op, x);
    const Act kind = act_of(op, act, residual ? "a residual" : nullptr);
    const Rows rows = Rows::of(op, "vectors", vectors, x);
    Passes::statistics(op, x,
                       start_of(op, x, weight, bias, running_mean, running_var, factor, rows));
    Passes::apply(op, x, rows.batch_norm(eps), kind, residual, out);
  }

  static void again(const Tensor& x, const Tensor& vectors, double eps, int64_t act,
                    const Maybe& residual, const Tensor& out) {
    const char* op = "batch_norm_act_again";
    Passes::check(op, x);
    const Act kind = act_of(op, act, residual ? "a residual" : nullptr);
    Passes::apply(op, x, Rows::of(op, "vectors", vectors, x).batch_norm(eps), kind, residual, out);
  }

  static void backward(const Tensor& grad, const Tensor& x, const Tensor& vectors, double eps,
                       int64_t act, const Maybe& joined, const Maybe& masked, const Tensor& results,
                       const Maybe& out) {
    const char* op = "batch_norm_act_backward";
    Passes::check(op, x);
    const Act kind = act_of(op, act);
    const BatchNorm bn = Rows::of(op, "vectors", vectors, x).batch_norm(eps);
    const Rows sums = Rows::of(op, "results", results, x);
    Passes::reduce(op, grad, x, bn, kind, Beside::of_join(op, x, kind, joined, masked),
                   {sums.at[0], sums.at[1], sums.at[2], sums.at[3], false});
    if (!out) return;
    Passes::input_gradient(op, masked ? *masked : grad, x, bn, masked ? Act::NONE : kind,
                           sums.at[2], sums.at[3], *out);
  }
};

#define CVK_BATCH_NORM_ACT_OPS(library, Passes)                                           \
  library.impl("batch_norm_act_statistics", TORCH_BOX(&Ops<Passes>::statistics));         \
  library.impl("batch_norm_act_apply", TORCH_BOX(&Ops<Passes>::apply));                   \
  library.impl("batch_norm_act_reduce", TORCH_BOX(&Ops<Passes>::reduce));                 \
  library.impl("batch_norm_act_input_gradient", TORCH_BOX(&Ops<Passes>::input_gradient)); \
  library.impl("batch_norm_act_forward", TORCH_BOX(&Ops<Passes>::forward));               \
  library.impl("batch_norm_act_again", TORCH_BOX(&Ops<Passes>::again));                   \
  library.impl("batch_norm_act_backward", TORCH_BOX(&Ops<Passes>::backward))

}  // namespace cvkernels::batch_norm_act
