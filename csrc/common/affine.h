// Inference batch norm with an optional ReLU, as one multiply-add per element: what several ops
// apply to their input. One definition for CPU and CUDA, no torch header.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "number.h"

namespace cvkernels {

// One of the norm's vectors, of elements T or Number<T>::Wide; without data it is absent.
struct Vector {
  const void* data;
  bool wide;

  template <typename T>
  CVK_HOST_DEVICE typename Number<T>::Wide at(int64_t c, typename Number<T>::Wide absent) const {
    if (data == nullptr) return absent;
    if (wide) return static_cast<const typename Number<T>::Wide*>(data)[c];
    return Number<T>::widen(static_cast<const T*>(data)[c]);
  }
};

struct BatchNorm {
  Vector weight, bias, mean, var;
  double eps;

  // The same with its vectors at these addresses.
  BatchNorm at(void* const* vectors) const {
    return {{vectors[0], weight.wide},
            {vectors[1], bias.wide},
            {vectors[2], mean.wide},
            {vectors[3], var.wide},
            eps};
  }
};

template <typename Wide>
struct Affine {
  static constexpr Wide UNBOUNDED = -std::numeric_limits<Wide>::infinity();

  Wide scale;
  Wide shift;

  static CVK_HOST_DEVICE Wide lowest(bool relu) { return relu ? Wide(0) : UNBOUNDED; }

  // NaN stays NaN.
  CVK_HOST_DEVICE Wide operator()(Wide x, Wide lowest) const {
    const Wide y = x * scale + shift;
    return y < lowest ? lowest : y;
  }
};

template <typename T>
CVK_HOST_DEVICE Affine<typename Number<T>::Wide> affine_of(const BatchNorm& bn, int64_t c) {
  using Wide = typename Number<T>::Wide;
  Wide scale = bn.weight.at<T>(c, Wide(1));
  if (bn.var.data != nullptr) scale /= std::sqrt(bn.var.at<T>(c, Wide(1)) + Wide(bn.eps));
  return {scale, bn.bias.at<T>(c, Wide(0)) - bn.mean.at<T>(c, Wide(0)) * scale};
}

}  // namespace cvkernels
