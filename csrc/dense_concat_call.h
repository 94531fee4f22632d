// What the CPU and the CUDA launcher of dense_concat share: from its tensors to a checked Problem.
#pragma once

#include "affine_call.h"
#include "check.h"
#include "dense_concat.h"

namespace cvkernels::dense_concat {

// Makes one axis of W and one outside of it, where both tensors step through the two evenly.
inline void merge_into_w(Problem& problem, int64_t Problem::* axis, int64_t Strides::* stride) {
  int64_t& outer = problem.*axis;
  if (outer == 1) return;
  if (problem.W == 1) {
    problem.src.w = problem.src.*stride;
    problem.out.w = problem.out.*stride;
  } else if (problem.src.*stride != problem.W * problem.src.w ||
             problem.out.*stride != problem.W * problem.out.w) {
    return;
  }
  problem.W *= outer;
  outer = 1;
}

inline Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

inline Problem problem_of(const Tensor& buffer, const Tensor& src, int64_t start,
                          const BatchNormTensors& bn, bool relu) {
  const char* op = "dense_concat";
  CVK_CHECK_DIM(op, buffer, 4);
  CVK_CHECK_DIM(op, src, 4);
  CVK_CHECK_SAME(op, src, buffer);
  CVK_CHECK(op,
            src.size(0) == buffer.size(0) && src.size(2) == buffer.size(2) &&
                src.size(3) == buffer.size(3),
            "src must have the buffer's N, H and W, got shapes ", shape_of(src), " and ",
            shape_of(buffer));
  CVK_CHECK(op, start >= 0 && start <= buffer.size(1) - src.size(1), "channels [", start, ", ",
            start + src.size(1), ") are not within the buffer's ", buffer.size(1));
  for (int64_t d = 0; d < 4; ++d)
    CVK_CHECK(op, buffer.stride(d) != 0 || buffer.size(d) <= 1,
              "buffer must not overlap itself along dimension ", d);
  Problem problem{src.size(0),
                  src.size(1),
                  src.size(2),
                  src.size(3),
                  strides_of(src),
                  strides_of(buffer),
                  batch_norm_of(op, bn, src, src.size(1)),
                  bn.empty() && !relu,
                  relu};
  merge_into_w(problem, &Problem::H, &Strides::h);
  if (problem.H == 1) merge_into_w(problem, &Problem::N, &Strides::n);
  return problem;
}

}  // namespace cvkernels::dense_concat
