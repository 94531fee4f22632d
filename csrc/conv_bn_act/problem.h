// The sizes of one conv_bn_act on the CPU, its data, and how its work is cut. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/act.h"
#include "common/amx.h"

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
  // Whether the products are of floats, and x is not; whether they are of pairs of bfloat16;
  // whether tiles take many of those at once; and whether weights are such pairs in any case.
  bool widens, pairs, tiles, pairs_weights;
  // Whether the products are of four bytes each, and what stands for 0 in those of x.
  bool quads;
  uint8_t zero;

  int64_t taps() const { return R * S; }
  // Numbers of a factor, whose products with as many of a weight are summed by one instruction.
  int64_t together() const { return quads ? 4 : pairs ? 2 : 1; }
  int64_t pixels() const { return N * P * Q; }
  int64_t panels() const { return divide_up(K, PANEL); }

  // Whether the operand of a block of pixels is gathered before it is multiplied: where it is
  // computed or converted, and where a tap has too few channels next to each other to be worth a
  // loop, or not whole factors.
  bool gathers() const {
    if (tiles) return parts() == 1;
    return has_prologue || widens || x_stride_c != 1 || C < 16 || C % together() != 0;
  }

  // Whether the channels of a row of the kernel lie together in x, as they are multiplied.
  bool rows_together() const {
    return !has_prologue && x_stride_c == 1 && x_stride_w == C && dilation_w == 1;
  }

  // Whether such a row is multiplied as one tap of S * C channels; only those at the edges of x are
  // gathered then.
  bool rows_as_taps() const {
    return gathers() && rows_together() && !widens && !tiles && S * C % together() == 0;
  }

  // Whether the rows of x that a row of pixels reads are copied, with few channels, as of an image:
  // as floats, or with more channels for whole factors.
  bool has_bands() const {
    const bool copies = together() > 1 ? C % together() != 0 : widens;
    return copies && !tiles && C < 16 && !has_prologue && dilation_w == 1;
  }
  int64_t band_channels() const { return divide_up(C, together()) * together(); }

  // Of a pixel's operand, the parts that lie apart, and the factors of each: floats, pairs, quads.
  // Tiles take whole rows of themselves.
  int64_t parts() const {
    if (tiles) return C < 16 ? 1 : taps();  // few channels: all taps of a pixel together
    return rows_as_taps() || has_bands() ? R : gathers() ? 1 : taps();
  }
  int64_t depth() const {
    if (tiles) return divide_up(taps() * C / parts(), TILE_NUMBERS) * TILE_NUMBERS / 2;
    const int64_t numbers = has_bands() ? S * band_channels() : taps() * C / parts();
    return divide_up(numbers, together());
  }

  // A panel of weights, of 32 bits: rows of PANEL, one for each factor of a part.
  int64_t panel_size() const {
    return parts() * (pairs_weights && !pairs ? divide_up(depth(), 2) : depth()) * PANEL;
  }
};

// How sums of products of bytes become numbers: y = sum * scale + shift with a scale for each
// output channel; with gates y * gate + offset; + residual * residual_scale; with SiLU silu(y) *
// out_scale + out_zero; clamped to low and high. A byte is that rounded, so low and high are bytes
// then.
struct Quantised {
  const float* scale;      // [panels * PANEL]
  const int32_t* surplus;  // likewise: what sums of products with x - 128 lack
  float offset, residual_scale, low, high, out_scale, out_zero;
  int64_t gate_shifts;  // from input gates to what is added: x becomes x * gate + gate[gate_shifts]
  float* wide_out;      // in place of out

  // Of the elements of out from `element` on, and the output channels from `channel` on.
  Quantised at(int64_t element, int64_t channel) const {
    Quantised there = *this;
    there.scale += channel;
    there.surplus += channel;
    if (wide_out != nullptr) there.wide_out += element + channel;
    return there;
  }
};

// The gates of a map of T.
template <typename T>
using Gate = std::conditional_t<std::is_same_v<T, uint8_t>, float, T>;

// x, out and residual start at their first element. Direct: weight[panels, R, S, C, PANEL], in
// pairs weight[panels, rows, PANEL] of the same, with bands' channels. Winograd:
// weight[points, panels, C, PANEL]. shift[panels * PANEL]. Without an affine map before the
// convolution, input_scale and input_shift are null; gate[N, C] and output_gate[N, K] likewise.
template <typename T>
struct Data {
  const T* x;
  const float* weight;
  const float* shift;
  const T* residual;
  const float* input_scale;
  const float* input_shift;
  const Gate<T>* gate;
  const Gate<T>* output_gate;
  T* out;
  Quantised quantised{};  // where T is a byte
};

// Two neighbouring bfloat16, the first in the lower half: a factor as wide as a float.
struct [[gnu::may_alias]] Pair {
  uint32_t bits;
};

// Four neighbouring bytes, the first the lowest.
struct [[gnu::may_alias]] Quad {
  uint32_t bits;
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
  // first, since it saves reading all weights in every thread. Fewer rows than `least` are not
  // worth a block.
  Cut(int64_t rows, int64_t most, int64_t panels, int64_t threads, bool by_panels,
      int64_t least = 6)
      : rows(rows), panels(panels), blocks(divide_up(std::max<int64_t>(rows, 1), most)) {
    by_panels = by_panels && threads % blocks == 0 && panels >= 4 * (threads / blocks);
    if (blocks > threads) {
      blocks = divide_up(blocks, threads) * threads;
    } else if (!by_panels) {
      blocks = std::max(blocks, std::min(threads, divide_up(rows, least)));
    }
    splits = std::max<int64_t>(1, std::min(panels, divide_up(threads, blocks)));
  }
  int64_t block() const { return divide_up(rows, blocks); }
  int64_t split() const { return divide_up(panels, splits); }
  int64_t tasks() const { return blocks * splits; }
  Range rows_of(int64_t task) const { return part_of(rows, blocks, task / splits); }
  Range panels_of(int64_t task) const { return part_of(panels, splits, task % splits); }
};

// The 3x3 filters [K, C, 3, 3] of a convolution, any strides, in elements. They are transformed in
// blocks: of a panel of output channels, and of as many input channels.
struct FilterMap {
  float* data;
  int64_t K, C, stride_k, stride_c, stride_r, stride_s;

  int64_t panels() const { return divide_up(K, PANEL); }
  int64_t blocks() const { return panels() * divide_up(C, PANEL); }
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
