// The first lines of every launcher: argument checks and dtype dispatch. Uses LibTorch's stable ABI
// alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "portable.h"

namespace cvkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

// Calls launch(Type<T>{}) with the element type of `dtype`.
template <typename Launch>
void dispatch_floating(const char* op, ScalarType dtype, Launch&& launch) {
  switch (dtype) {
    case ScalarType::Float:
      return launch(Type<float>{});
    case ScalarType::Half:
      return launch(Type<float16>{});
    case ScalarType::BFloat16:
      return launch(Type<bfloat16>{});
#if !defined(__CUDACC__)
    case ScalarType::Double:
      return launch(Type<double>{});
#endif
    default:
      fail(op, ": dtype must be float32, float16 or bfloat16 (on CPU also float64), got ",
           torch::headeronly::toString(dtype));
  }
}

// The same without float64.
template <typename Launch>
void dispatch(const char* op, ScalarType dtype, Launch&& launch) {
  dispatch_floating(op, dtype, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), Type<double>>)
      fail(op, ": dtype must be float32, float16 or bfloat16, got Double");
    else
      launch(type);
  });
}

}  // namespace cvkernels

#define CVK_CHECK(op, condition, ...)           \
  do {                                          \
    if (!(condition)) [[unlikely]]              \
      ::cvkernels::fail(op, ": ", __VA_ARGS__); \
  } while (false)

#define CVK_CHECK_DIM(op, tensor, expected)                                      \
  CVK_CHECK(op, (tensor).dim() == (expected), #tensor " must have ", (expected), \
            " dimensions, got shape ", ::cvkernels::shape_of(tensor))

#define CVK_CHECK_CPU(op, tensor) CVK_CHECK(op, (tensor).is_cpu(), #tensor " must be a CPU tensor")

#define CVK_CHECK_CUDA(op, tensor) \
  CVK_CHECK(op, (tensor).is_cuda(), #tensor " must be a CUDA tensor")

// Same device and dtype.
#define CVK_CHECK_SAME(op, tensor, other)                                           \
  do {                                                                              \
    CVK_CHECK(op, (tensor).scalar_type() == (other).scalar_type(),                  \
              #tensor " and " #other " must have one dtype, got ",                  \
              torch::headeronly::toString((tensor).scalar_type()), " and ",         \
              torch::headeronly::toString((other).scalar_type()));                  \
    CVK_CHECK(op, (tensor).device() == (other).device(),                            \
              #tensor " and " #other " must be on one device, got device indices ", \
              (tensor).get_device_index(), " and ", (other).get_device_index());    \
  } while (false)
