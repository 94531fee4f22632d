// The sizes of one conv_bn_act on the CPU, its data, and how its work is cut. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/act.h"

namespace cvkernels::conv_bn_act {

// Output channels of a panel of weights: a cache line of floats.
constexpr int64_t PANEL = 16;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One call. x[N, C, H, W], any strides, in elements; pixel (n, p, q) of out[N, K, P, Q] and of the
// residual is number (n * P + p) * Q + q, `out_stride` and `residual_stride` elements apart.
struct Problem {
  int64_t N, C, H, W, K, P, Q;
  int64_t R, S, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  Act act;
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w;
  int64_t out_stride, residual_stride;
  bool has_prologue;

  int64_t taps() const { return R * S; }
  int64_t pixels() const { return N * P * Q; }
  int64_t panels() const { return divide_up(K, PANEL); }

  // Whether the operand of a block of pixels is gathered before it is multiplied: where it is
  // computed, and where a tap has too few channels next to each other to be worth a loop.
  bool gathers() const { return has_prologue || x_stride_c != 1 || C < 16; }

  // Whether a row of the kernel is multiplied as one tap of S * C channels: where its few channels
  // lie together in x, as they are multiplied, and only those at the edges of x are gathered.
  bool rows_as_taps() const {
    return gathers() && !has_prologue && x_stride_c == 1 && x_stride_w == C && dilation_w == 1;
  }
};

// x, out and residual start at their first element. Direct: weight[panels, R, S, C, PANEL].
// Winograd: weight[points, panels, C, PANEL]. shift[panels * PANEL]. Without an affine map before
// the convolution, input_scale and input_shift are null; gate[N, C] and output_gate[N, K] likewise.
struct Data {
  const float* x;
  const float* weight;
  const float* shift;
  const float* residual;
  const float* input_scale;
  const float* input_shift;
  const float* gate;
  const float* output_gate;
  float* out;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `number` of [0, count) cut into `parts` of nearly equal size, the larger ones first.
constexpr Range part_of(int64_t count, int64_t parts, int64_t number) {
  const int64_t size = count / parts, larger = count % parts;
  const int64_t begin = number * size + std::min(number, larger);
  return {begin, begin + size + (number < larger)};
}

// How `rows` of the product and its panels are cut into tasks: as many for each thread. No result
// depends on it.
struct Cut {
  int64_t rows, panels, blocks, splits;

  // Blocks have at most `most` rows, whose operand stays in the second cache. Where these are fewer
  // than threads, they are made smaller, or the panels are split: `by_panels` says that this comes
  // first, since it saves reading all weights in every thread.
  Cut(int64_t rows, int64_t most, int64_t panels, int64_t threads, bool by_panels)
      : rows(rows), panels(panels), blocks(divide_up(std::max<int64_t>(rows, 1), most)) {
    by_panels = by_panels && threads % blocks == 0 && panels >= 4 * (threads / blocks);
    if (blocks > threads) {
      blocks = divide_up(blocks, threads) * threads;
    } else if (!by_panels) {
      blocks = std::max(blocks, std::min(threads, divide_up(rows, 6)));
    }
    splits = std::max<int64_t>(1, std::min(panels, divide_up(threads, blocks)));
  }
  int64_t block() const { return divide_up(rows, blocks); }
  int64_t split() const { return divide_up(panels, splits); }
  int64_t tasks() const { return blocks * splits; }
  Range rows_of(int64_t task) const { return part_of(rows, blocks, task / splits); }
  Range panels_of(int64_t task) const { return part_of(panels, splits, task % splits); }
};

// F(height x width, 3 x 3): tiles of outputs, each from (height + 2) x (width + 2) inputs.
struct Tiling {
  int64_t rows, columns, tiles;

  Tiling(const Problem& problem, int64_t height, int64_t width)
      : rows(divide_up(problem.P, height)),
        columns(divide_up(problem.Q, width)),
        tiles(problem.N * rows * columns) {}
};

}  // namespace cvkernels::conv_bn_act
