// What the CUDA kernels of the pooling ops share: which outputs a thread pools, and which kernel a
// call takes.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda_launch.cuh"
#include "pool.h"

namespace cvkernels::pool {

constexpr int THREADS = 128;

// Pools of packs of channels: one block has THREADS packs of an output row, in rows gridDim.x
// apart, each thread one pack of one pixel.
template <typename T>
struct PackPlace {
  static constexpr int LANES = sizeof(Pack) / sizeof(T);
  // Most output rows, and elements of an image: 32 bits count them and step through them.
  static constexpr int64_t MOST = std::numeric_limits<int32_t>::max();

  int q, c;
  bool inside;

  static __device__ PackPlace of(const Problem& problem) {
    const int packs = static_cast<int>(problem.C / LANES);
    const int item = blockIdx.y * THREADS + threadIdx.x;  // q * packs + c
    const int q = item / packs;
    return {q, (item - q * packs) * LANES, item < problem.Q * packs};
  }

  // Blocks along an output row.
  static int64_t columns(const Problem& problem) {
    return (problem.Q * (problem.C / LANES) + THREADS - 1) / THREADS;
  }

  static bool takes(const Problem& problem, const void* x, const void* out) {
    return packable(x, problem.C, sizeof(T), problem.x_stride_n, problem.x_stride_c,
                    problem.x_stride_h, problem.x_stride_w) &&
           packable(out, problem.C, sizeof(T), problem.out_stride_n, problem.out_stride_c,
                    problem.out_stride_h, problem.out_stride_w) &&
           columns(problem) <= GRID_Y_MAX && problem.N * problem.P <= MOST &&
           extent(problem.h.size, problem.x_stride_h, problem.w.size, problem.x_stride_w) <=
               MOST - problem.C &&
           extent(problem.P, problem.out_stride_h, problem.Q, problem.out_stride_w) <=
               MOST - problem.C;
  }

  // Elements from an image's first pixel to its last.
  static int64_t extent(int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride) {
    return (rows - 1) * row_stride + (columns - 1) * column_stride;
  }

  // Calls body(n, p) for the rows of this block.
  template <typename Body>
  __device__ void over_rows(const Problem& problem, Body&& body) const {
    const uint32_t P = problem.P, rows = problem.N * problem.P;
    for (uint32_t row = blockIdx.x; row < rows; row += gridDim.x)
      body(int64_t(row / P), static_cast<int>(row % P));
  }
};

// Calls body(n, c, p, q) for this thread's outputs; see over_elements.
template <typename Index, bool CHANNELS_INNER, typename Body>
__device__ void over_outputs(const Problem& problem, Body&& body) {
  over_elements<THREADS, Index, CHANNELS_INNER>(problem.N, problem.C, problem.P, problem.Q, body);
}

template <typename Launch>
void launch_over_outputs(const Problem& problem, Launch&& launch) {
  launch_over_elements<THREADS>(problem.N * problem.C * problem.P * problem.Q,
                                problem.x_stride_c == 1, launch);
}

}  // namespace cvkernels::pool
