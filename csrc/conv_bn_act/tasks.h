// How the work of a direct convolution is handed to threads, each with memory of its own.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "common/cpu.h"
#include "conv_bn_act/problem.h"

namespace cvkernels::conv_bn_act {

// A thread's scratch memory: kept between calls, since fresh pages cost more than the arithmetic.
inline float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<float[], Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    memory.reset(
        static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
    size = floats;
  }
  return memory.get();
}

// Factors of a task's operand that stay in the second cache beside the weights in use.
constexpr int64_t CACHED = 48 << 10;

constexpr int64_t whole_lines(int64_t floats) { return divide_up(floats, 16) * 16; }

template <typename U, typename Convolve>
void run_direct(const Problem& problem, Convolve convolve) {
  static_assert(sizeof(U) == sizeof(float));
  const int64_t factors = problem.parts() * problem.depth();
  const int64_t pixel = problem.gathers() ? factors : factors / problem.taps();
  const bool by_panels = !problem.gathers() && problem.K * problem.taps() > problem.pixels();
  const Cut cut(problem.pixels(), std::clamp<int64_t>(CACHED / pixel, 56, 240), problem.panels(),
                torch::stable::get_num_threads(), by_panels);
  int64_t gathered = problem.gathers() ? cut.block() * factors : 0;
  if (problem.has_bands()) {  // of a row of pixels at a time, the first and the last of them short
    const int64_t pixels = cut.block();
    const int64_t rows_of_pixels = cut.block() / problem.Q + 2;
    const int64_t width = pixels * problem.stride_w + rows_of_pixels * problem.S;
    gathered = problem.R * width * problem.band_channels() / problem.together();
  }
  const int64_t pointers =
      whole_lines(divide_up(sizeof(U*), sizeof(float)) * cut.block() * problem.parts());
  parallel_for(0, cut.tasks(), 1, [&](int64_t first, int64_t last) {
    const int64_t zero = whole_lines(problem.depth());
    float* zeros = scratch(zero + pointers + gathered);
    std::memset(zeros, problem.zero, zero * sizeof(float));
    float* indirect = zeros + zero;
    float* operand = indirect + pointers;
    for (int64_t task = first; task < last; ++task)
      convolve(cut.rows_of(task), cut.panels_of(task), reinterpret_cast<const U*>(zeros),
               reinterpret_cast<U*>(operand), reinterpret_cast<const U**>(indirect));
  });
}

}  // namespace cvkernels::conv_bn_act
