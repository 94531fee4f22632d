// The products of conv_bn_act by AMX tiles, included once for each instruction set: see isa.h.
// Tiles is AmxTiles, or PlainTiles.

#include "products.h"

// sums[row, column] over parts and numbers of operand[row * stride + offsets[part]][c] *
// weight[part, c, column], for ROWS tiles of pixels and PANELS of output channels; a row of sums
// has COLUMNS floats.
template <int ROWS, int PANELS, typename Tiles>
CVK_TARGET static void multiply_tiles(Tiles& tiles, const bfloat16* operand, int64_t stride,
                                      const int64_t* offsets, int64_t parts, int64_t channels,
                                      const float* weight, int64_t panel_size, float* sums) {
  constexpr int64_t BYTES = PANEL * sizeof(float), SUMS = COLUMNS * sizeof(float);
  const int64_t bytes = stride * int64_t{sizeof(bfloat16)};
  tiles.template clear<0>();
  if constexpr (PANELS == 2) tiles.template clear<1>();
  if constexpr (ROWS == 2) tiles.template clear<2>();
  if constexpr (ROWS == 2 && PANELS == 2) tiles.template clear<3>();
  for (int64_t part = 0; part < parts; ++part) {
    const bfloat16* a = operand + offsets[part];
    for (int64_t c = 0; c < channels; c += TILE_NUMBERS, weight += TILE_ROWS * PANEL) {
      tiles.template load<4>(a + c, bytes);
      tiles.template load<6>(weight, BYTES);
      tiles.template multiply_add<0, 4, 6>();
      if constexpr (PANELS == 2) {
        tiles.template load<7>(weight + panel_size, BYTES);
        tiles.template multiply_add<1, 4, 7>();
      }
      if constexpr (ROWS == 2) {
        tiles.template load<5>(a + c + TILE_ROWS * stride, bytes);
        tiles.template multiply_add<2, 5, 6>();
      }
      if constexpr (ROWS == 2 && PANELS == 2) tiles.template multiply_add<3, 5, 7>();
    }
  }
  tiles.template store<0>(sums, SUMS);
  if constexpr (PANELS == 2) tiles.template store<1>(sums + PANEL, SUMS);
  if constexpr (ROWS == 2) tiles.template store<2>(sums + TILE_ROWS * COLUMNS, SUMS);
  if constexpr (ROWS == 2 && PANELS == 2)
    tiles.template store<3>(sums + TILE_ROWS * COLUMNS + PANEL, SUMS);
}

// One strip of a segment, from its pixel `first` on, times one pair of panels or the last panel.
template <typename Tiles>
CVK_TARGET static void convolve_strip(const Problem& problem, const Data<bfloat16>& data,
                                      const Tiled& tiled, Tiles& tiles, const int64_t* offsets,
                                      const Segment& segment, int64_t first, int64_t column,
                                      int64_t columns, float* sums) {
  const int64_t panel_size = problem.panel_size();
  const int64_t last = std::min(segment.pixels, first + STRIP);
  const bool high = last - first > TILE_ROWS, wide = columns > PANEL;
  const auto multiply = high ? (wide ? &multiply_tiles<2, 2, Tiles> : &multiply_tiles<2, 1, Tiles>)
                             : (wide ? &multiply_tiles<1, 2, Tiles> : &multiply_tiles<1, 1, Tiles>);
  multiply(tiles, segment.operand + first * segment.stride, segment.stride, offsets, tiled.parts,
           tiled.channels, data.weight + column / PANEL * panel_size, panel_size, sums);
  for (int64_t v = first; v < last;) {
    const int64_t row = v / segment.width, q = v % segment.width;
    if (q >= segment.kept) {
      v = (row + 1) * segment.width;
      continue;
    }
    const int64_t count = std::min(segment.kept - q, last - v);
    const int64_t pixel = segment.pixel + row * segment.kept + q;
    const bfloat16* residual = data.residual;
    if (residual != nullptr) residual += pixel * problem.residual_stride + column;
    const bfloat16* of_rows[STRIP];
    const bfloat16* const* gates = find_gates(problem, data, pixel, count, column, of_rows);
    finish_tile(problem, sums + (v - first) * COLUMNS, COLUMNS, count, columns, problem.K - column,
                data.shift + column, gates, residual,
                data.out + pixel * problem.out_stride + column);
    v += count;
  }
}

// A row of a plane: the columns of x's row h from `left` on, a stride apart; zeros in the padding.
CVK_TARGET static void fill_row(const Problem& problem, const Data<bfloat16>& data,
                                int64_t channels, int64_t n, int64_t h, int64_t left,
                                int64_t columns, bfloat16* to) {
  const int64_t C = problem.C, stride = problem.stride_w;
  const bool inside = h >= 0 && h < problem.H;
  const int64_t first = inside ? std::clamp<int64_t>(divide_up(-left, stride), 0, columns) : 0;
  const int64_t last =
      inside ? std::clamp<int64_t>(divide_up(problem.W - left, stride), first, columns) : 0;
  std::fill_n(to, first * channels, bfloat16{});
  std::fill(to + last * channels, to + columns * channels, bfloat16{});
  const bool together = problem.rows_together() && stride == 1 && channels == C;
  if (together && first < last) {
    convert(data.x + offset_of(problem, n, h, left + first), (last - first) * C,
            to + first * channels);
    return;
  }
  for (int64_t column = first; column < last; ++column) {
    bfloat16* pixel = to + column * channels;
    gather_tap(problem, data, n, offset_of(problem, n, h, left + column * stride), pixel);
    std::fill(pixel + C, pixel + channels, bfloat16{});
  }
}

// The planes of a unit's rows of pixels, of image n.
CVK_TARGET static void fill_band(const Problem& problem, const Data<bfloat16>& data,
                                 const Tiled& tiled, int64_t n, Range rows, bfloat16* to) {
  const int64_t more = Tiled::shared(problem);
  for (int64_t plane = 0; plane < tiled.planes; ++plane) {
    const int64_t down = plane / problem.stride_w, along = plane % problem.stride_w;
    bfloat16* of_plane = to + plane * tiled.plane * tiled.channels;
    const int64_t count = rows.size() + tiled.reach_h;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t h = (rows.begin + row) * problem.stride_h + down - problem.padding_h;
      fill_row(problem, data, tiled.channels, n, h, along - problem.padding_w, tiled.width,
               of_plane + row * tiled.width * tiled.channels);
    }
    std::fill_n(of_plane + count * tiled.width * tiled.channels, more * tiled.channels, bfloat16{});
  }
}

// One task: a range of units times a range of panels. `operand` has room for the units' operands
// and a strip more, which may be read and is then dropped; `pointers` for those of a strip.
template <typename Tiles>
CVK_TARGET static void convolve_by_tiles(const Problem& problem, const Data<bfloat16>& data,
                                         const Tiled& tiled, Range units, Range panels,
                                         const int64_t* offsets, float* sums, bfloat16* operand,
                                         const Pair** pointers) {
  const int64_t size = tiled.unit_size();
  const auto range_of = [&](int64_t unit) {
    return Range{unit * STRIP, std::min(problem.pixels(), (unit + 1) * STRIP)};
  };
  // A strip at the end of x is copied: whole tiles would read past it.
  const auto is_copied = [&](int64_t unit) {
    return tiled.kind == Tiled::GATHERED ||
           (tiled.kind == Tiled::IN_X && range_of(unit).size() < STRIP);
  };
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    bfloat16* to = operand + (unit - units.begin) * size;
    if (tiled.kind == Tiled::BAND)
      fill_band(problem, data, tiled, unit / tiled.cuts,
                part_of(problem.P, tiled.cuts, unit % tiled.cuts), to);
    else if (is_copied(unit))
      find_operand(problem, data, range_of(unit), static_cast<const Pair*>(nullptr),
                   reinterpret_cast<Pair*>(to), pointers);
  }
  const auto segment_of = [&](int64_t unit) {
    const bfloat16* here = operand + (unit - units.begin) * size;
    if (tiled.kind == Tiled::BAND) {
      const Range rows = part_of(problem.P, tiled.cuts, unit % tiled.cuts);
      const int64_t pixel = (unit / tiled.cuts * problem.P + rows.begin) * problem.Q;
      return Segment{here,        tiled.channels, (rows.size() - 1) * tiled.width + problem.Q,
                     tiled.width, problem.Q,      pixel};
    }
    const auto [pixel, end] = range_of(unit);
    const int64_t count = end - pixel;
    if (is_copied(unit)) return Segment{here, tiled.channels, count, count, count, pixel};
    const int64_t stride = problem.x_stride_w;
    return Segment{data.x + pixel * stride, stride, count, count, count, pixel};
  };
  Tiles tiles;
  // Few weights stay in the second cache: then each strip gets all its channels before the next.
  const bool by_strips = panels.size() * problem.panel_size() * int64_t{4} <= TILED_BYTES / 2;
  const int64_t step = by_strips ? panels.size() : COLUMNS / PANEL;
  for (int64_t from = panels.begin; from < panels.end; from += step) {
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const Segment segment = segment_of(unit);
      for (int64_t first = 0; first < segment.pixels; first += STRIP) {
        const int64_t end = std::min(panels.end, from + step);
        for (int64_t panel = from; panel < end; panel += COLUMNS / PANEL)
          convolve_strip(problem, data, tiled, tiles, offsets, segment, first, panel * PANEL,
                         std::min(end - panel, COLUMNS / PANEL) * PANEL, sums);
      }
    }
  }
}
