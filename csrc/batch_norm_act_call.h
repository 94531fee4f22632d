// What the CPU and the CUDA launchers of batch_norm_act share: from tensors to checked matrices.
#pragma once

#include <optional>

#include "act.h"
#include "affine_call.h"
#include "batch_norm_act.h"
#include "check.h"

namespace cvkernels::batch_norm_act {

using Maybe = std::optional<Tensor>;

// The pixels of a map and the elements from one to the next.
struct Matrix {
  int64_t pixels, C, stride;
};

// A channels_last map, or a channel slice of one.
inline Matrix matrix_of(const char* op, const char* name, const Tensor& tensor) {
  CVK_CHECK(op, tensor.dim() == 4, name, " must have shape [N, C, H, W], got ", shape_of(tensor));
  const int64_t N = tensor.size(0), C = tensor.size(1), H = tensor.size(2), W = tensor.size(3);
  int64_t stride = C, length = 1;
  bool even = C == 1 || tensor.stride(1) == 1;
  for (const int64_t d : {3, 2, 0}) {
    const int64_t size = tensor.size(d);
    if (size == 1) continue;
    if (length == 1) stride = tensor.stride(d);
    even = even && tensor.stride(d) == stride * length;
    length *= size;
  }
  CVK_CHECK(op, even && (stride >= C || length == 1), name,
            " must be channels_last or a channel slice of such a tensor, got shape ",
            shape_of(tensor));
  return {N * H * W, C, stride};
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

// The activation by its number. Beside another map, `what`, only ReLU and none are computed.
inline Act act_of(const char* op, int64_t act, const char* what = nullptr) {
  const bool silu = act == static_cast<int64_t>(Act::SILU);
  CVK_CHECK(op, act == 0 || act == 1 || silu, "act must be 0, 1 or 3, got ", act);
  CVK_CHECK(op, !silu || what == nullptr, "SiLU does not go with ", what);
  return static_cast<Act>(act);
}

// The maps that reduce reads or writes beside grad and x: none, a total, or the two of a sum with a
// shortcut.
struct Beside {
  const void* joined = nullptr;
  void *masked = nullptr, *total = nullptr;
  int64_t joined_stride = 0, masked_stride = 0, total_stride = 0;

  static Beside of(const char* op, const Tensor& x, Act act, const Maybe& joined,
                   const Maybe& masked, const Maybe& total) {
    CVK_CHECK(op, joined.has_value() == masked.has_value(), "joined and masked belong together");
    CVK_CHECK(op, !joined || (!total && act == Act::RELU),
              "joined goes with ReLU and without a total");
    Beside beside;
    if (joined) {
      beside.joined = joined->const_data_ptr();
      beside.joined_stride = matrix_like(op, "joined", *joined, x, false).stride;
      beside.masked = masked->mutable_data_ptr();
      beside.masked_stride = matrix_like(op, "masked", *masked, x, false).stride;
    }
    if (total) {
      beside.total = total->mutable_data_ptr();
      beside.total_stride = matrix_like(op, "total", *total, x, true).stride;
    }
    return beside;
  }
};

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

// Where reduce leaves its results; slope and offset are added to.
struct Results {
  void *d_weight, *d_bias, *slope, *offset;

  template <typename T>
  CVK_HOST_DEVICE void put(int64_t c, const Reduced<T>& reduced) const {
    using Wide = typename Number<T>::Wide;
    static_cast<Wide*>(d_weight)[c] = reduced.d_weight;
    static_cast<Wide*>(d_bias)[c] = reduced.d_bias;
    static_cast<Wide*>(slope)[c] += reduced.slope;
    static_cast<Wide*>(offset)[c] += reduced.offset;
  }
};

}  // namespace cvkernels::batch_norm_act
