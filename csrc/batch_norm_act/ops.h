// The ops of batch_norm_act, one definition for CPU and CUDA: from tensors to a device's passes.
// Schemas: cvkernels/ops/batch_norm_act/passes.py.
//
// A `Device` has four passes, of which the ops are made, on data of elements T:
//   statistics(device, Type<T>{}, x, map, out)
//   apply(device, Type<T>{}, x, map, bn, act, residual, out)
//   reduce(device, Type<T>{}, grad, x, map, bn, act, maps, results)
//   input_gradient(device, Type<T>{}, grad, wide, x, map, bn, act, slope, offset, out)
#pragma once

#include "batch_norm_act/problem.h"
#include "common/arguments.h"
#include "common/layout.h"

namespace cvkernels::batch_norm_act {

inline Matrix matrix_of(const char* op, const char* name, const Tensor& tensor) {
  const int64_t stride = pixel_stride(op, name, tensor);
  return {tensor.size(0) * tensor.size(2) * tensor.size(3), tensor.size(1), stride};
}

inline Matrix matrix_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                          bool wide) {
  CVK_CHECK(op, shape_of(tensor) == shape_of(x), name, " must have x's shape, ", shape_of(x),
            ", got ", shape_of(tensor));
  CVK_CHECK(op, tensor.device() == x.device(), name, " must be on x's device");
  const ScalarType dtype = tensor.scalar_type();
  const bool is_wide =
      dtype == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  CVK_CHECK(op, wide ? is_wide : dtype == x.scalar_type(), name, " has the wrong dtype, ",
            torch::headeronly::toString(dtype), ", for x of ",
            torch::headeronly::toString(x.scalar_type()));
  return matrix_of(op, name, tensor);
}

inline int64_t stride_like(const char* op, const char* name, const Maybe& tensor, const Tensor& x,
                           bool wide = false) {
  return tensor ? matrix_like(op, name, *tensor, x, wide).stride : 0;
}

// The activation by its number. Beside another map, `what`, only ReLU and none are computed.
inline Act act_of(const char* op, int64_t act, const char* what = nullptr) {
  const bool silu = act == static_cast<int64_t>(Act::SILU);
  CVK_CHECK(op, act == 0 || act == 1 || silu, "act must be 0, 1 or 3, got ", act);
  CVK_CHECK(op, !silu || what == nullptr, "SiLU does not go with ", what);
  return static_cast<Act>(act);
}

// A vector that is written, of the dtype that x is computed in.
inline void* result_of(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  const ScalarType wide =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  CVK_CHECK(op, tensor.dim() == 1 && tensor.size(0) == x.size(1) && tensor.is_contiguous(), name,
            " must be contiguous and have shape [", x.size(1), "], got ", shape_of(tensor));
  CVK_CHECK(op, tensor.scalar_type() == wide && tensor.device() == x.device(), name,
            " must be on x's device and of the dtype that x is computed in");
  return tensor.mutable_data_ptr();
}

// The rows of a matrix [4, C] of the dtype that x is computed in. As `vectors` of a norm they are
// batch mean and variance, weight and bias.
struct Rows {
  void* data;
  int64_t step;  // in bytes

  static Rows of(const char* op, const char* name, const Tensor& matrix, const Tensor& x) {
    const bool is_double = x.scalar_type() == ScalarType::Double;
    CVK_CHECK(op, matrix.dim() == 2 && matrix.size(0) == 4 && matrix.size(1) == x.size(1), name,
              " must have shape [4, ", x.size(1), "], got ", shape_of(matrix));
    CVK_CHECK(op, matrix.stride(1) == 1 || matrix.size(1) == 1, name, " must have dense rows");
    CVK_CHECK(op,
              matrix.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float) &&
                  matrix.device() == x.device(),
              name, " must be on x's device and of the dtype that x is computed in");
    return {matrix.mutable_data_ptr(),
            matrix.stride(0) * static_cast<int64_t>(is_double ? sizeof(double) : sizeof(float))};
  }

  Rows moved(void* to) const { return {to, step}; }
  void* at(int row) const { return static_cast<char*>(data) + row * step; }

  BatchNorm batch_norm(double eps) const {
    return {{at(2), true}, {at(3), true}, {at(0), true}, {at(1), true}, eps};
  }
};

inline void* written(const Maybe& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

template <typename Device>
struct Ops {
  // The map of x after the checks that every op begins with.
  static Matrix start(const char* op, const Tensor& x, bool needs_pixels = false) {
    Device::check(op, x);
    const Matrix map = matrix_of(op, "x", x);
    CVK_CHECK(op, !needs_pixels || map.pixels > 0, "x must have pixels, got ", shape_of(x));
    return map;
  }

  // Has work(type, at, device) done on the memory at the addresses.
  template <typename Function>
  static void perform(const char* op, const Tensor& x, std::initializer_list<const void*> addresses,
                      Function&& work) {
    dispatch_floating(op, x.scalar_type(), [&](auto type) {
      Device::perform(op, x, addresses,
                      [=](void* const* at, const auto& device) { work(type, at, device); });
    });
  }

  static void statistics(const Tensor& x, const Tensor& mean, const Tensor& var) {
    const char* op = "batch_norm_act_statistics";
    const Matrix map = start(op, x, true);
    perform(
        op, x, {x.const_data_ptr(), result_of(op, "mean", mean, x), result_of(op, "var", var, x)},
        [=](auto type, void* const* at, const auto& device) {
          Device::statistics(device, type, at[0], map, StatisticsOut::of_statistics(at[1], at[2]));
        });
  }

  static void apply(const Tensor& x, const Maybe& weight, const Maybe& bias, const Tensor& mean,
                    const Tensor& var, double eps, int64_t act, const Tensor& out) {
    const char* op = "batch_norm_act_apply";
    const Matrix map = start(op, x);
    const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, x.size(1));
    const Act kind = act_of(op, act);
    const int64_t out_stride = stride_like(op, "out", out, x);
    perform(op, x,
            {x.const_data_ptr(), bn.weight.data, bn.bias.data, bn.mean.data, bn.var.data,
             out.mutable_data_ptr()},
            [=](auto type, void* const* at, const auto& device) {
              Device::apply(device, type, at[0], map, bn.at(at + 1), kind, Map{},
                            Map{at[5], out_stride});
            });
  }

  static void reduce(const Tensor& grad, const Tensor& x, const Maybe& weight, const Maybe& bias,
                     const Tensor& mean, const Tensor& var, double eps, int64_t act,
                     const Tensor& total, const Tensor& d_weight, const Tensor& d_bias,
                     const Tensor& slope, const Tensor& offset) {
    const char* op = "batch_norm_act_reduce";
    const Matrix map = start(op, x, true);
    const Act kind = act_of(op, act, "a total");
    const BatchNorm bn = batch_norm_of(op, {weight, bias, mean, var, eps}, x, x.size(1));
    const int64_t grad_stride = stride_like(op, "grad", grad, x),
                  total_stride = stride_like(op, "total", total, x, true);
    perform(op, x,
            {grad.const_data_ptr(), x.const_data_ptr(), bn.weight.data, bn.bias.data, bn.mean.data,
             bn.var.data, total.mutable_data_ptr(), result_of(op, "d_weight", d_weight, x),
             result_of(op, "d_bias", d_bias, x), result_of(op, "slope", slope, x),
             result_of(op, "offset", offset, x)},
            [=](auto type, void* const* at, const auto& device) {
              ReduceMaps maps;
              maps.total = {at[6], total_stride};
              Device::reduce(device, type, Map{at[0], grad_stride}, at[1], map, bn.at(at + 2), kind,
                             maps, Results{at[7], at[8], at[9], at[10], true});
            });
  }

  static void input_gradient(const Tensor& grad, const Tensor& x, const Tensor& mean,
                             const Tensor& slope, const Tensor& offset, const Tensor& out) {
    const char* op = "batch_norm_act_input_gradient";
    const Matrix map = start(op, x);
    const BatchNorm bn =
        batch_norm_of(op, {std::nullopt, std::nullopt, mean, std::nullopt, 0.0}, x, x.size(1));
    const bool wide = grad.scalar_type() != x.scalar_type();
    const int64_t grad_stride = stride_like(op, "grad", grad, x, wide),
                  out_stride = stride_like(op, "out", out, x);
    perform(
        op, x,
        {grad.const_data_ptr(), x.const_data_ptr(), bn.mean.data, result_of(op, "slope", slope, x),
         result_of(op, "offset", offset, x), out.mutable_data_ptr()},
        [=](auto type, void* const* at, const auto& device) {
          BatchNorm moved = bn;
          moved.mean.data = at[2];
          Device::input_gradient(device, type, Map{at[0], grad_stride}, wide, at[1], map, moved,
                                 Act::NONE, at[3], at[4], Map{at[5], out_stride});
        });
  }

  static void forward(const Tensor& x, const Maybe& weight, const Maybe& bias,
                      const Maybe& running_mean, const Maybe& running_var, double factor,
                      double eps, int64_t act, const Maybe& residual, const Tensor& vectors,
                      const Tensor& out) {
    const char* op = "batch_norm_act_forward";
    const Matrix map = start(op, x, true);
    const Act kind = act_of(op, act, residual ? "a residual" : nullptr);
    const Rows rows = Rows::of(op, "vectors", vectors, x);
    CVK_CHECK(op, running_mean.has_value() == running_var.has_value(),
              "running_mean and running_var belong together");
    const BatchNorm bn =
        batch_norm_of(op, {weight, bias, running_mean, running_var, 0.0}, x, x.size(1));
    const int64_t residual_stride = stride_like(op, "residual", residual, x),
                  out_stride = stride_like(op, "out", out, x);
    perform(op, x,
            {x.const_data_ptr(), bn.weight.data, bn.bias.data, bn.mean.data, bn.var.data,
             address_of(residual), rows.data, out.mutable_data_ptr()},
            [=](auto type, void* const* at, const auto& device) {
              const Rows to = rows.moved(at[6]);
              const BatchNorm from = bn.at(at + 1);
              const StatisticsOut statistics{to.at(0),     to.at(1),    to.at(2), to.at(3),
                                             from.weight,  from.bias,   at[3],    at[4],
                                             bn.mean.wide, bn.var.wide, factor};
              Device::statistics(device, type, at[0], map, statistics);
              Device::apply(device, type, at[0], map, to.batch_norm(eps), kind,
                            Map{at[5], residual_stride}, Map{at[7], out_stride});
            });
  }

  static void recompute(const Tensor& x, const Tensor& vectors, double eps, int64_t act,
                        const Maybe& residual, const Tensor& out) {
    const char* op = "batch_norm_act_recompute";
    const Matrix map = start(op, x);
    const Act kind = act_of(op, act, residual ? "a residual" : nullptr);
    const Rows rows = Rows::of(op, "vectors", vectors, x);
    const int64_t residual_stride = stride_like(op, "residual", residual, x),
                  out_stride = stride_like(op, "out", out, x);
    perform(op, x, {x.const_data_ptr(), rows.data, address_of(residual), out.mutable_data_ptr()},
            [=](auto type, void* const* at, const auto& device) {
              Device::apply(device, type, at[0], map, rows.moved(at[1]).batch_norm(eps), kind,
                            Map{at[2], residual_stride}, Map{at[3], out_stride});
            });
  }

  static void backward(const Tensor& grad, const Tensor& x, const Tensor& vectors, double eps,
                       int64_t act, const Maybe& output, const Maybe& grad_residual,
                       const Tensor& results, const Maybe& out) {
    const char* op = "batch_norm_act_backward";
    const Matrix map = start(op, x, true);
    const Act kind = act_of(op, act);
    const Rows rows = Rows::of(op, "vectors", vectors, x),
               sums = Rows::of(op, "results", results, x);
    CVK_CHECK(op, output.has_value() == grad_residual.has_value(),
              "output and grad_residual belong together");
    CVK_CHECK(op, !output || kind == Act::RELU, "output goes with ReLU");
    const int64_t grad_stride = stride_like(op, "grad", grad, x),
                  output_stride = stride_like(op, "output", output, x),
                  grad_residual_stride = stride_like(op, "grad_residual", grad_residual, x),
                  out_stride = stride_like(op, "out", out, x);
    perform(op, x,
            {grad.const_data_ptr(), x.const_data_ptr(), rows.data, address_of(output),
             written(grad_residual), sums.data, written(out)},
            [=](auto type, void* const* at, const auto& device) {
              const BatchNorm bn = rows.moved(at[2]).batch_norm(eps);
              const Rows to = sums.moved(at[5]);
              const Map from{at[0], grad_stride}, dy{at[4], grad_residual_stride};
              ReduceMaps maps;
              maps.output = {at[3], output_stride}, maps.grad_residual = dy;
              Device::reduce(device, type, from, at[1], map, bn, kind, maps,
                             Results{to.at(0), to.at(1), to.at(2), to.at(3), false});
              if (at[6] == nullptr) return;
              const bool masked = dy.data != nullptr;
              Device::input_gradient(device, type, masked ? dy : from, false, at[1], map, bn,
                                     masked ? Act::NONE : kind, to.at(2), to.at(3),
                                     Map{at[6], out_stride});
            });
  }

  // The last part of backward, for results whose slope and offset came from elsewhere.
  static void finish(const Tensor& grad, const Tensor& x, const Tensor& vectors, double eps,
                     int64_t act, const Tensor& results, const Tensor& out) {
    const char* op = "batch_norm_act_finish";
    const Matrix map = start(op, x);
    const Act kind = act_of(op, act);
    const Rows rows = Rows::of(op, "vectors", vectors, x),
               sums = Rows::of(op, "results", results, x);
    const int64_t grad_stride = stride_like(op, "grad", grad, x),
                  out_stride = stride_like(op, "out", out, x);
    perform(
        op, x,
        {grad.const_data_ptr(), x.const_data_ptr(), rows.data, sums.data, out.mutable_data_ptr()},
        [=](auto type, void* const* at, const auto& device) {
          const Rows from = sums.moved(at[3]);
          Device::input_gradient(device, type, Map{at[0], grad_stride}, false, at[1], map,
                                 rows.moved(at[2]).batch_norm(eps), kind, from.at(2), from.at(3),
                                 Map{at[4], out_stride});
        });
  }

  static void add_to(auto& library) {
    library.impl("batch_norm_act_statistics", TORCH_BOX(&Ops::statistics));
    library.impl("batch_norm_act_apply", TORCH_BOX(&Ops::apply));
    library.impl("batch_norm_act_reduce", TORCH_BOX(&Ops::reduce));
    library.impl("batch_norm_act_input_gradient", TORCH_BOX(&Ops::input_gradient));
    library.impl("batch_norm_act_forward", TORCH_BOX(&Ops::forward));
    library.impl("batch_norm_act_recompute", TORCH_BOX(&Ops::recompute));
    library.impl("batch_norm_act_backward", TORCH_BOX(&Ops::backward));
    library.impl("batch_norm_act_finish", TORCH_BOX(&Ops::finish));
  }
};

}  // namespace cvkernels::batch_norm_act
