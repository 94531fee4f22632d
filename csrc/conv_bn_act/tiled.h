// How a convolution by AMX tiles lies and how it is cut. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/amx.h"
#include "conv_bn_act/problem.h"

namespace cvkernels::conv_bn_act {

// As many pixels and output channels are multiplied at once: two tiles of each.
constexpr int64_t STRIP = 2 * TILE_ROWS, COLUMNS = 2 * PANEL;

// Bytes of a task's operand that stay in the second cache beside the weights in use.
constexpr int64_t TILED_BYTES = 768 << 10;

// The rows of a tile are evenly spaced in memory. That is so
// - in x, of a 1x1 convolution whose channels are whole tiles;
// - of pixels that are gathered, each with all its taps: of a 1x1 convolution, or of few channels;
// - in a band of x's rows, for other kernels. It has the padding, and as many channels as whole
//   tiles have. With a stride it is cut into planes of every stride-th row and column. Output pixel
//   (p, q) multiplies in each plane, for its tap (r, s), pixel (p, q) + tap * dilation / stride:
//   pixels of out and of a plane run alike, but that a row of a plane is wider, and the outputs
//   between two rows are dropped. Without a stride the padding right of a row is that left of the
//   next.
struct Tiled {
  enum Kind { IN_X, GATHERED, BAND } kind;
  int64_t channels;  // numbers of x that a part has, whole tiles
  int64_t parts;     // of a pixel's operand: taps of a band, or one
  // Of a band: how far taps reach, a plane's columns and pixels, and its planes. A unit is one of
  // `cuts` parts of an image's rows.
  int64_t reach_h = 0, reach_w = 0, width = 0, plane = 0, planes = 0, cuts = 1;
  int64_t units;  // without a band a unit is a strip

  Tiled(const Problem& problem, int64_t threads, bool by_panels) {
    const int64_t taps = problem.taps(), C = problem.C;
    parts = problem.parts();
    channels = 2 * problem.depth();
    if (parts == 1) {
      const bool even = problem.x_stride_h == problem.W * problem.x_stride_w &&
                        problem.x_stride_n == problem.H * problem.x_stride_h;
      const bool whole = taps == 1 && channels == C && !problem.has_prologue &&
                         problem.x_stride_c == 1 && problem.stride_h == 1 &&
                         problem.stride_w == 1 && problem.padding_h == 0 && problem.padding_w == 0;
      kind = even && whole ? IN_X : GATHERED;
      units = divide_up(problem.pixels(), STRIP);
      return;
    }
    kind = BAND;
    reach_h = (problem.R - 1) * problem.dilation_h / problem.stride_h;
    reach_w = (problem.S - 1) * problem.dilation_w / problem.stride_w;
    planes = problem.stride_h * problem.stride_w;
    width = problem.Q + reach_w - shared(problem);
    const int64_t row_bytes = 2 * planes * width * channels;
    const int64_t rows = std::max<int64_t>(1, TILED_BYTES / row_bytes - reach_h);
    cuts = std::min(problem.P, divide_up(problem.P, rows));
    const auto is_fair = [&] {
      const int64_t all = problem.N * cuts;
      return by_panels || all % threads == 0 || all >= 4 * threads;
    };
    while (!is_fair() && cuts < problem.P) ++cuts;
    units = problem.N * cuts;
    plane = (divide_up(problem.P, cuts) + reach_h) * width + shared(problem);
  }

  static int64_t shared(const Problem& problem) {
    return problem.stride_w == 1 ? problem.padding_w : 0;
  }

  // Numbers of a unit's operand in scratch memory.
  int64_t unit_size() const { return kind == BAND ? planes * plane * channels : STRIP * channels; }

  // Numbers from a pixel and tap of a plane to those of another tap.
  int64_t offset(const Problem& problem, int64_t r, int64_t s) const {
    const int64_t down = r * problem.dilation_h, along = s * problem.dilation_w;
    const int64_t of_plane = down % problem.stride_h * problem.stride_w + along % problem.stride_w;
    return (of_plane * plane + down / problem.stride_h * width + along / problem.stride_w) *
           channels;
  }
};

// Pixels whose operand lies evenly.
struct Segment {
  const bfloat16* operand;  // of the first pixel and part
  int64_t stride;           // numbers from a pixel to the next
  int64_t pixels;           // with those that are dropped
  int64_t width, kept;      // of a row, with and without those
  int64_t pixel;            // the first one in out
};

}  // namespace cvkernels::conv_bn_act
