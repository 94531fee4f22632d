// The sizes of one depthwise_conv_bn_act on the CPU, and how its work is cut. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/act.h"

namespace cvkernels::depthwise_conv_bn_act {

// Channels of a block: a cache line of floats. Weights, affine and scratch hold whole blocks.
constexpr int64_t BLOCK = 16;

// One call. x[N, C, H, W], any strides, in elements; out[N, P, Q, C], dense. The weights are
// weight[C / BLOCK, K, K, BLOCK], bias and batch norm affine[2, C / BLOCK, BLOCK]: scale, then
// shift. With a spread of 2, x lies in every other row and column of H x W, and the rest is zero:
// what a gradient of stride 2 is convolved with.
struct Problem {
  int64_t N, C, H, W, P, Q;
  int64_t kernel, stride, padding_h, padding_w, spread;
  Act act;
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w;
  // Of bytes: a byte q of x stands for q - x_zero, and y becomes y * out_scale + out_zero, rounded.
  float x_zero, out_scale, out_zero;

  int64_t blocks() const { return (C + BLOCK - 1) / BLOCK; }

  // Rows of the output that one task makes, for large maps; sums have one part per band. Neither
  // depends on the number of threads or images, so that results do not.
  static constexpr int64_t BAND = 28;
  int64_t bands() const { return (P + BAND - 1) / BAND; }

  // Output columns that are computed at once: the width that pads Q least.
  int64_t columns() const {
    int64_t best = 8;
    for (const int64_t width : {7, 6})
      if (padded(width) < padded(best)) best = width;
    return best;
  }
  int64_t padded(int64_t width) const { return (Q + width - 1) / width * width; }

  // Gradients in neighbouring columns that are multiplied at once, at most.
  static constexpr int64_t GRADIENTS = 8;

  // A row of x in scratch: with its padding, and with what the last columns read past it.
  int64_t scratch_width() const {
    const int64_t most = std::max(padded(columns()), padded(GRADIENTS));
    return std::max(W + padding_w, (most - 1) * stride + kernel);
  }

  // Blocks that one task takes: enough that it reads whole stretches of a pixel's channels, few
  // enough that the rows it holds stay in the second cache, and that there are tasks for all
  // threads. No result depends on it.
  int64_t group() const {
    constexpr int64_t CACHE = 256 << 10, TASKS = 16;
    const int64_t bytes = kernel * scratch_width() * BLOCK * static_cast<int64_t>(sizeof(float));
    const int64_t most =
        std::clamp<int64_t>(N * bands() * blocks() / TASKS, 2, std::max<int64_t>(2, CACHE / bytes));
    const int64_t count = (blocks() + most - 1) / most;
    return (blocks() + count - 1) / count;
  }
  int64_t groups() const { return (blocks() + group() - 1) / group(); }
};

// What one task works on.
struct Task {
  int64_t n, band, block_begin, block_end;
};

}  // namespace cvkernels::depthwise_conv_bn_act
