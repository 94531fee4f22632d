// Arithmetic of batch_norm_act: batch norm with batch statistics and an activation, and its
// gradient. One definition for CPU and CUDA, no torch header.
//
// A map is a matrix: one row per pixel, its channels side by side. With n pixels and, per channel,
// scale = weight / sqrt(var + eps):
//
//   z = (x - mean) * scale + bias            y = act(z)            dy = grad * act'(z)
//   y = act(z + residual), act being ReLU or nothing: dy = grad where y > 0
//   d_bias = sum dy                          d_weight = sum dy * (x - mean) / sqrt(var + eps)
//   dx = dy * scale + (x - mean) * slope + offset
//   slope = -scale / sqrt(var + eps) * d_weight / n      offset = -scale * d_bias / n
#pragma once

#include <cmath>
#include <cstdint>

#include "common/act.h"
#include "common/affine.h"
#include "common/number.h"

namespace cvkernels::batch_norm_act {

// The pixels of a map and the elements from one to the next.
struct Matrix {
  int64_t pixels, C, stride;
};

// A map that a pass reads beside x, or writes, with x's pixels and channels; null if it is absent.
struct Map {
  void* data = nullptr;
  int64_t stride = 0;
};

// What a channel's elements are normalised with.
template <typename Wide>
struct Norm {
  Wide mean, scale, bias;

  CVK_HOST_DEVICE Wide operator()(Wide x) const { return (x - mean) * scale + bias; }
};

template <typename Wide>
CVK_HOST_DEVICE Wide inverse_std(Wide var, double eps) {
  return Wide(1) / std::sqrt(var + Wide(eps));
}

// Without a variance the scale is 1.
template <typename T>
CVK_HOST_DEVICE Norm<typename Number<T>::Wide> norm_of(const BatchNorm& bn, int64_t c) {
  using Wide = typename Number<T>::Wide;
  Wide scale = bn.weight.at<T>(c, Wide(1));
  if (bn.var.data != nullptr) scale *= inverse_std(bn.var.at<T>(c, Wide(1)), bn.eps);
  return {bn.mean.at<T>(c, Wide(0)), scale, bn.bias.at<T>(c, Wide(0))};
}

// What may stand behind the norm: the activation of z, and the gradient in z from that in y. NaN
// stays NaN, and passes the gradient, as in PyTorch.
//
// ReLU, with lowest = 0, or nothing.
template <typename Wide>
struct Bounded {
  Wide lowest;

  static CVK_HOST_DEVICE Bounded of(bool relu) { return {Affine<Wide>::lowest(relu)}; }
  CVK_HOST_DEVICE Wide operator()(Wide z) const { return z < lowest ? lowest : z; }
  CVK_HOST_DEVICE Wide gradient(Wide grad, Wide z) const { return z <= lowest ? Wide(0) : grad; }
};

template <typename Wide>
struct Silu {
  CVK_HOST_DEVICE Wide operator()(Wide z) const { return z / (Wide(1) + exponential(-z)); }
  CVK_HOST_DEVICE Wide gradient(Wide grad, Wide z) const {
    const Wide sigmoid = Wide(1) / (Wide(1) + exponential(-z));
    return grad * (sigmoid * (Wide(1) + z * (Wide(1) - sigmoid)));
  }
};

// What a training step keeps of a channel: its statistics and, where there are rows for them,
// copies of the norm's weight and bias, whose running statistics move by `factor` towards these.
struct StatisticsOut {
  void *mean, *var, *weight_copy, *bias_copy;
  Vector weight, bias;
  void *running_mean, *running_var;
  bool running_mean_wide, running_var_wide;
  double factor;

  static StatisticsOut of_statistics(void* mean, void* var) {
    StatisticsOut out{};
    out.mean = mean;
    out.var = var;
    return out;
  }

  template <typename T>
  CVK_HOST_DEVICE void put(int64_t c, double mean_of_c, double var_of_c, double pixels) const {
    using Wide = typename Number<T>::Wide;
    static_cast<Wide*>(mean)[c] = static_cast<Wide>(mean_of_c);
    static_cast<Wide*>(var)[c] = static_cast<Wide>(var_of_c);
    if (weight_copy != nullptr) {
      static_cast<Wide*>(weight_copy)[c] = weight.at<T>(c, Wide(1));
      static_cast<Wide*>(bias_copy)[c] = bias.at<T>(c, Wide(0));
    }
    if (running_mean == nullptr) return;
    move<T>(running_mean, running_mean_wide, c, mean_of_c);
    move<T>(running_var, running_var_wide, c, var_of_c * (pixels / (pixels - 1)));
  }

  template <typename T>
  CVK_HOST_DEVICE void move(void* running, bool wide, int64_t c, double value) const {
    using Wide = typename Number<T>::Wide;
    const Wide old = Vector{running, wide}.at<T>(c, Wide(0));
    const Wide moved = static_cast<Wide>(old * (1 - factor) + value * factor);
    if (wide)
      static_cast<Wide*>(running)[c] = moved;
    else
      static_cast<T*>(running)[c] = Number<T>::narrow(moved);
  }
};

// The sums of dy and of dy * (x - mean) as a call's four results.
template <typename T>
struct Reduced {
  using Wide = typename Number<T>::Wide;
  Wide d_weight, d_bias, slope, offset;

  static CVK_HOST_DEVICE Reduced of(const BatchNorm& bn, int64_t c, double sum, double product,
                                    double pixels) {
    const double inverse = inverse_std(bn.var.at<T>(c, Wide(1)), bn.eps);
    const double scale = norm_of<T>(bn, c).scale;
    return {Wide(product * inverse), Wide(sum), Wide(-scale * inverse * inverse * product / pixels),
            Wide(-scale * sum / pixels)};
  }
};

// The maps that reduce reads or writes beside grad and x: none; a total that dy * scale is added
// to; or what a ReLU behind the sum with a residual gave, and where dy goes, the residual's
// gradient.
struct ReduceMaps {
  Map total, output, grad_residual;
};

// Where reduce leaves its results; where it accumulates, slope and offset are added to.
struct Results {
  void *d_weight, *d_bias, *slope, *offset;
  bool accumulates;

  template <typename T>
  CVK_HOST_DEVICE void put(int64_t c, const Reduced<T>& reduced) const {
    using Wide = typename Number<T>::Wide;
    static_cast<Wide*>(d_weight)[c] = reduced.d_weight;
    static_cast<Wide*>(d_bias)[c] = reduced.d_bias;
    Wide *slopes = static_cast<Wide*>(slope), *offsets = static_cast<Wide*>(offset);
    slopes[c] = accumulates ? slopes[c] + reduced.slope : reduced.slope;
    offsets[c] = accumulates ? offsets[c] + reduced.offset : reduced.offset;
  }
};

}  // namespace cvkernels::batch_norm_act
