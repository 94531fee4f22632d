// See cuda_runtime.h.
#pragma once

#include "common/number.h"

struct __half2 {
  cvkernels::float16 x, y;
};

// The larger of each pair; NaN if either is one.
template <typename T>
T larger_or_nan(T a, T b) {
  const float wide_a = cvkernels::Number<T>::widen(a), wide_b = cvkernels::Number<T>::widen(b);
  return wide_a != wide_a || wide_b < wide_a ? a : b;
}

inline __half2 __hmax2_nan(__half2 a, __half2 b) {
  return {larger_or_nan(a.x, b.x), larger_or_nan(a.y, b.y)};
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {cvkernels::Number<cvkernels::float16>::narrow(x),
          cvkernels::Number<cvkernels::float16>::narrow(y)};
}
inline float __low2float(__half2 a) { return cvkernels::Number<cvkernels::float16>::widen(a.x); }
inline float __high2float(__half2 a) { return cvkernels::Number<cvkernels::float16>::widen(a.y); }
