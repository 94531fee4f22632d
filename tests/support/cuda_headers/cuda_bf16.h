// See cuda_runtime.h.
#pragma once

#include "cuda_fp16.h"

struct __nv_bfloat162 {
  cvkernels::bfloat16 x, y;
};

inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {larger_or_nan(a.x, b.x), larger_or_nan(a.y, b.y)};
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {cvkernels::Number<cvkernels::bfloat16>::narrow(x),
          cvkernels::Number<cvkernels::bfloat16>::narrow(y)};
}
