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

  static Beside of_total(const char* op, const Tensor& x, const Tensor& total) {
    Beside beside;
    beside.total = total.mutable_data_ptr();
    beside.total_stride = matrix_like(op, "total", total, x, true).stride;
    return beside;
  }

  static Beside of_join(const char* op, const Tensor& x, Act act, const Maybe& joined,
                        const Maybe& masked) {
    CVK_CHECK(op, joined.has_value() == masked.has_value(), "joined and masked belong together");
    CVK_CHECK(op, !joined || act == Act::RELU, "joined goes with ReLU");
    Beside beside;
    if (!joined) return beside;
    beside.joined = joined->const_data_ptr();
    beside.joined_stride = matrix_like(op, "joined", *joined, x, false).stride;
    beside.masked = masked->mutable_data_ptr();
    beside.masked_stride = matrix_like(op, "masked", *masked, x, false).stride;
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

// The rows of a matrix [4, C] of the dtype that x is computed in. As `vectors` of a norm they are
// batch mean and variance, weight and bias.
struct Rows {
  void* at[4];

  static Rows of(const char* op, const char* name, const Tensor& matrix, const Tensor& x) {
    const bool is_double = x.scalar_type() == ScalarType::Double;
    CVK_CHECK(op, matrix.dim() == 2 && matrix.size(0) == 4 && matrix.size(1) == x.size(1), name,
              " must have shape [4, ", x.size(1), "], got ", shape_of(matrix));
    CVK_CHECK(op, matrix.stride(1) == 1 || matrix.size(1) == 1, name, " must have dense rows");
    CVK_CHECK(op,
              matrix.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float) &&
                  matrix.device() == x.device(),
              name, " must be on x's device and of the dtype that x is computed in");
    char* data = static_cast<char*>(matrix.mutable_data_ptr());
    const int64_t step = matrix.stride(0) * (is_double ? sizeof(double) : sizeof(float));
    return {{data, data + step, data + 2 * step, data + 3 * step}};
  }

  BatchNorm batch_norm(double eps) const {
    return {{at[2], true}, {at[3], true}, {at[0], true}, {at[1], true}, eps};
  }
};

inline Start start_of(const char* op, const Tensor& x, const Maybe& weight, const Maybe& bias,
                      const Maybe& running_mean, const Maybe& running_var, double factor,
                      const Rows& rows) {
  CVK_CHECK(op, running_mean.has_value() == running_var.has_value(),
            "running_mean and running_var belong together");
  const BatchNorm bn =
      batch_norm_of(op, {weight, bias, running_mean, running_var, 0.0}, x, x.size(1));
  return {rows.at[0],
          rows.at[1],
          rows.at[2],
          rows.at[3],
          bn.weight,
          bn.bias,
          const_cast<void*>(bn.mean.data),
          const_cast<void*>(bn.var.data),
          bn.mean.wide,
          bn.var.wide,
          factor};
}

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
