// From a call's tensors to checked operands.
#pragma once

#include "affine.h"
#include "check.h"

namespace cvkernels {

inline const void* address_of(const Maybe& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// The address of `size` float32 numbers, null where there are none.
inline const void* floats_of(const char* op, const char* name, const Tensor& tensor, int64_t size) {
  CVK_CHECK(op, tensor.is_cpu() && tensor.is_contiguous(), name, " must be a dense CPU tensor");
  CVK_CHECK(op, tensor.scalar_type() == ScalarType::Float && tensor.numel() == size, name,
            " must hold ", size, " float32 numbers, got shape ", shape_of(tensor), " of ",
            torch::headeronly::toString(tensor.scalar_type()));
  return tensor.const_data_ptr();
}

inline const void* floats_of(const char* op, const char* name, const Maybe& tensor, int64_t size) {
  return tensor ? floats_of(op, name, *tensor, size) : nullptr;
}

struct BatchNormTensors {
  const Maybe& weight;
  const Maybe& bias;
  const Maybe& mean;
  const Maybe& var;
  double eps;

  bool empty() const { return !weight && !bias && !mean && !var; }
};

inline Vector vector_of(const char* op, const char* name, const Maybe& tensor, const Tensor& x,
                        int64_t channels) {
  if (!tensor) return {nullptr, false};
  const ScalarType dtype = tensor->scalar_type();
  CVK_CHECK(op, tensor->dim() == 1 && tensor->size(0) == channels, name, " must have shape [",
            channels, "], got ", shape_of(*tensor));
  CVK_CHECK(op, tensor->is_contiguous(), name, " must be contiguous");
  CVK_CHECK(op, tensor->device() == x.device(), name, " must be on x's device");
  const bool wide = x.scalar_type() != ScalarType::Double && dtype == ScalarType::Float;
  CVK_CHECK(op, wide || dtype == x.scalar_type(), name, " must be float32 or have x's dtype, ",
            torch::headeronly::toString(x.scalar_type()), ", got ",
            torch::headeronly::toString(dtype));
  return {tensor->const_data_ptr(), wide};
}

inline BatchNorm batch_norm_of(const char* op, const BatchNormTensors& bn, const Tensor& x,
                               int64_t channels) {
  return {vector_of(op, "weight", bn.weight, x, channels),
          vector_of(op, "bias", bn.bias, x, channels), vector_of(op, "mean", bn.mean, x, channels),
          vector_of(op, "var", bn.var, x, channels), bn.eps};
}

}  // namespace cvkernels
