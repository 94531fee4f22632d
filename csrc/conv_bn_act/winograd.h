// Winograd's minimal filtering for 3x3 convolutions of stride 1, included once for each instruction
// set: see isa.h. Lavin and Gray 2015, arXiv:1509.09308.
//
// F(2x2, 3x3) interpolates at 0, 1, -1 and infinity, with 2.25 times fewer products than directly;
// F(4x4, 3x3) at 0, +-sqrt(1/2), +-sqrt(2) and infinity, with 4 times fewer. These points keep its
// error at about twice that of a direct sum; the usual 0, +-1, +-2 make it five times.
//
// With outputs y = A^T [(G g G^T) * (B^T d B)] A of a tile, the gradient in the filter is
// G^T [sum over tiles of (A dy A^T) * (B^T d B)] G, by as many products fewer.

#include "products.h"

#include "outer_products.h"

constexpr float LOW = 0.70710678118654752f, HIGH = 1.4142135623730950f;

// to = B^T d: M + 2 samples at the points of interpolation.
template <int M>
CVK_INLINE void to_points(const V* d, int stride, V* to, int to_stride) {
  if constexpr (M == 2) {
    to[0] = d[0] - d[2 * stride];
    to[to_stride] = d[stride] + d[2 * stride];
    to[2 * to_stride] = d[2 * stride] - d[stride];
    to[3 * to_stride] = d[3 * stride] - d[stride];
  } else {
    const V d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride];
    const V d4 = d[4 * stride], d5 = d[5 * stride];
    const V even_low = d4 - 2.0f * d2, odd_low = LOW * (d3 - 2.0f * d1);
    const V even_high = d4 - 0.5f * d2, odd_high = HIGH * (d3 - 0.5f * d1);
    to[0] = d0 - 2.5f * d2 + d4;
    to[to_stride] = even_low + odd_low;
    to[2 * to_stride] = even_low - odd_low;
    to[3 * to_stride] = even_high + odd_high;
    to[4 * to_stride] = even_high - odd_high;
    to[5 * to_stride] = d1 - 2.5f * d3 + d5;
  }
}

// to = A^T m: M outputs from the products at M + 2 points.
template <int M>
CVK_INLINE void from_points(const V* m, int stride, V* to, int to_stride) {
  if constexpr (M == 2) {
    to[0] = m[0] + (m[stride] + m[2 * stride]);
    to[to_stride] = (m[stride] - m[2 * stride]) + m[3 * stride];
  } else {
    const V even_low = m[stride] + m[2 * stride], odd_low = m[stride] - m[2 * stride];
    const V even_high = m[3 * stride] + m[4 * stride], odd_high = m[3 * stride] - m[4 * stride];
    to[0] = m[0] + (even_low + even_high);
    to[to_stride] = LOW * odd_low + HIGH * odd_high;
    to[2 * to_stride] = 0.5f * even_low + 2.0f * even_high;
    to[3 * to_stride] = (0.5f * LOW) * odd_low + (2.0f * HIGH) * odd_high + m[5 * stride];
  }
}

// to = A y: M gradients in outputs at the points, the transpose of from_points.
template <int M>
CVK_INLINE void gradient_to_points(const V* y, int stride, V* to, int to_stride) {
  if constexpr (M == 2) {
    to[0] = y[0];
    to[to_stride] = y[0] + y[stride];
    to[2 * to_stride] = y[0] - y[stride];
    to[3 * to_stride] = y[stride];
  } else {
    const V y0 = y[0], y1 = y[stride], y2 = y[2 * stride], y3 = y[3 * stride];
    const V even_low = y0 + 0.5f * y2, odd_low = LOW * (y1 + 0.5f * y3);
    const V even_high = y0 + 2.0f * y2, odd_high = HIGH * (y1 + 2.0f * y3);
    to[0] = y0;
    to[to_stride] = even_low + odd_low;
    to[2 * to_stride] = even_low - odd_low;
    to[3 * to_stride] = even_high + odd_high;
    to[4 * to_stride] = even_high - odd_high;
    to[5 * to_stride] = y3;
  }
}

// Neighbouring filters, in double: what is rounded is their value at a point alone.
constexpr int FILTERS = LANES / 2;
using Filters = double __attribute__((vector_size(FILTERS * sizeof(double))));

CVK_INLINE Filters load_filters(const float* from) {
  float __attribute__((vector_size(FILTERS * sizeof(float)))) lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return __builtin_convertvector(lanes, Filters);
}

CVK_INLINE void store_filters(float* to, const Filters& filters) {
  using Lanes = float __attribute__((vector_size(FILTERS * sizeof(float))));
  const Lanes lanes = __builtin_convertvector(filters, Lanes);
  std::memcpy(to, &lanes, sizeof(lanes));
}
constexpr double EXACT_LOW = 0.70710678118654752, EXACT_HIGH = 1.4142135623730950;

// to = G g: 3 taps at the M + 2 points.
template <int M>
CVK_INLINE void filter_to_points(const Filters* g, int stride, Filters* to, int to_stride) {
  const Filters g0 = g[0], g1 = g[stride], g2 = g[2 * stride];
  to[0] = g0;
  if constexpr (M == 2) {
    const Filters even = 0.5 * (g0 + g2), odd = 0.5 * g1;
    to[to_stride] = even + odd;
    to[2 * to_stride] = even - odd;
  } else {
    const Filters even_low = (-2.0 / 3) * (g0 + 0.5 * g2), odd_low = (-2.0 / 3 * EXACT_LOW) * g1;
    const Filters even_high = (1.0 / 6) * (g0 + 2.0 * g2), odd_high = (1.0 / 6 * EXACT_HIGH) * g1;
    to[to_stride] = even_low + odd_low;
    to[2 * to_stride] = even_low - odd_low;
    to[3 * to_stride] = even_high + odd_high;
    to[4 * to_stride] = even_high - odd_high;
  }
  to[(M + 1) * to_stride] = g2;
}

// to = G^T u: the transpose of filter_to_points.
template <int M>
CVK_INLINE void filter_from_points(const Filters* u, int stride, Filters* to, int to_stride) {
  const Filters last = u[(M + 1) * stride];
  if constexpr (M == 2) {
    const Filters even = 0.5 * (u[stride] + u[2 * stride]);
    to[0] = u[0] + even;
    to[to_stride] = 0.5 * (u[stride] - u[2 * stride]);
    to[2 * to_stride] = even + last;
  } else {
    const Filters even_low = (-2.0 / 3) * (u[stride] + u[2 * stride]);
    const Filters even_high = (1.0 / 6) * (u[3 * stride] + u[4 * stride]);
    to[0] = u[0] + even_low + even_high;
    to[to_stride] = (-2.0 / 3 * EXACT_LOW) * (u[stride] - u[2 * stride]) +
                    (1.0 / 6 * EXACT_HIGH) * (u[3 * stride] - u[4 * stride]);
    to[2 * to_stride] = 0.5 * even_low + 2.0 * even_high + last;
  }
}

// The taps of a block of filters.
using FilterBlock = float[PANEL][9][PANEL];

// Calls copy(number in memory, number of the block) for all taps of block number i, but of no
// filters past K and C, in the order of memory; returns the block's input channels.
template <typename Copy>
CVK_INLINE Range for_filters(const FilterMap& map, int64_t i, bool reversed, FilterBlock& block,
                             Copy copy) {
  const int64_t blocks = divide_up(map.C, PANEL);
  const int64_t k0 = i / blocks * PANEL, c0 = i % blocks * PANEL;
  const int64_t K = std::min(PANEL, map.K - k0), C = std::min(PANEL, map.C - c0);
  float* const data = map.data + k0 * map.stride_k + c0 * map.stride_c;
  for (int tap = 0; tap < 9; ++tap) {
    const int at = reversed ? 8 - tap : tap;
    float* const of_tap = data + at / 3 * map.stride_r + at % 3 * map.stride_s;
    if (map.stride_k < map.stride_c) {
      for (int64_t c = 0; c < C; ++c)
        for (int64_t k = 0; k < K; ++k)
          copy(of_tap[k * map.stride_k + c * map.stride_c], block[c][tap][k]);
    } else {
      for (int64_t k = 0; k < K; ++k)
        for (int64_t c = 0; c < C; ++c)
          copy(of_tap[k * map.stride_k + c * map.stride_c], block[c][tap][k]);
    }
  }
  return {c0, c0 + C};
}

// points[points, panels, C, PANEL] of a range of blocks of filters; `reversed`: the taps from the
// last to the first.
template <int MH, int MW>
CVK_TARGET static void transform_filters(const FilterMap& map, Range range, bool reversed,
                                         float* points) {
  constexpr int HEIGHT = MH + 2, WIDTH = MW + 2;
  const int64_t blocks = divide_up(map.C, PANEL), size = map.panels() * map.C * PANEL;
  for (int64_t i = range.begin; i < range.end; ++i) {
    FilterBlock block{};
    const Range channels =
        for_filters(map, i, reversed, block, [](float& number, float& to) { to = number; });
    float* to = points + (i / blocks * map.C + channels.begin) * PANEL;
    for (int64_t c = 0; c < channels.size(); ++c, to += PANEL) {
      alignas(64) float lines[HEIGHT * WIDTH][PANEL];
      for (int k = 0; k < PANEL; k += FILTERS) {
        Filters g[9], columns[HEIGHT * 3], both[HEIGHT * WIDTH];
        for (int tap = 0; tap < 9; ++tap) g[tap] = load_filters(block[c][tap] + k);
        for (int s = 0; s < 3; ++s) filter_to_points<MH>(g + s, 3, columns + s, 3);
        for (int r = 0; r < HEIGHT; ++r)
          filter_to_points<MW>(columns + r * 3, 1, both + r * WIDTH, 1);
        for (int i = 0; i < HEIGHT * WIDTH; ++i) store_filters(lines[i] + k, both[i]);
      }
      // Whole cache lines: those of all points may be of one set of the first cache.
      for (int i = 0; i < HEIGHT * WIDTH; ++i)
        for (int k = 0; k < PANEL; k += LANES) store(to + i * size + k, load(lines[i] + k));
    }
  }
}

// The gradients in a range of blocks of filters, from sums[points, C, columns].
template <int MH, int MW>
CVK_TARGET static void finish_filters(const FilterMap& map, Range range, const float* sums,
                                      int64_t columns) {
  constexpr int HEIGHT = MH + 2, WIDTH = MW + 2;
  const int64_t blocks = divide_up(map.C, PANEL);
  for (int64_t i = range.begin; i < range.end; ++i) {
    FilterBlock block;
    const int64_t first = i % blocks * PANEL;
    const float* from = sums + first * columns + i / blocks * PANEL;
    for (int64_t part = 0; part < std::min(PANEL, map.C - first) * PANEL; part += FILTERS) {
      const int64_t c = part / PANEL, k = part % PANEL;
      Filters u[HEIGHT * WIDTH], rows[HEIGHT * 3], g[9];
      for (int point = 0; point < HEIGHT * WIDTH; ++point)
        u[point] = load_filters(from + (point * map.C + c) * columns + k);
      for (int r = 0; r < HEIGHT; ++r) filter_from_points<MW>(u + r * WIDTH, 1, rows + r * 3, 1);
      for (int s = 0; s < 3; ++s) filter_from_points<MH>(rows + s, 3, g + s, 3);
      for (int tap = 0; tap < 9; ++tap) store_filters(block[c][tap] + k, g[tap]);
    }
    for_filters(map, i, false, block, [](float& number, float& from) { number = from; });
  }
}

// The scratch of one task: `count` tiles at each point, before and after the products. Points are
// an odd number of cache lines apart, or they would share few sets of the first cache.
struct Points {
  int64_t operand_stride, product_stride;

  static int64_t odd_lines(int64_t floats) { return (divide_up(floats, 16) | 1) * 16; }
  Points(const Problem& problem, int64_t count, int64_t panels)
      : operand_stride(odd_lines(count * channels(problem))),
        product_stride(odd_lines(count * panels * PANEL)) {}
  static int64_t channels(const Problem& problem) { return divide_up(problem.C, 16) * 16; }
};

// What tiles are cut from: maps of H rows of W pixels, and the pixels before the first of a tile
// that are zeros.
template <typename T>
struct Pixels {
  const T* data;
  int64_t C, H, W, stride_n, stride_h, stride_w, padding_h, padding_w;

  static Pixels of_input(const Problem& problem, const Data<T>& data) {
    return {data.x,
            problem.C,
            problem.H,
            problem.W,
            problem.x_stride_n,
            problem.x_stride_h,
            problem.x_stride_w,
            problem.padding_h,
            problem.padding_w};
  }
  static Pixels of_gradient(const Problem& problem, const T* grad) {
    const int64_t stride = problem.out_stride, row = problem.Q * stride;
    return {grad, problem.K, problem.P, problem.Q, problem.P * row, row, stride, 0, 0};
  }
};

// Whether a tile is of the inputs of MH x MW outputs, or of the gradients in these.
enum class Of { INPUT, GRADIENT };

template <Of OF, int M>
CVK_INLINE void samples_to_points(const V* samples, int stride, V* to, int to_stride) {
  if constexpr (OF == Of::INPUT)
    to_points<M>(samples, stride, to, to_stride);
  else
    gradient_to_points<M>(samples, stride, to, to_stride);
}

// to[points, tiles, channels] of a range of tiles, points `point_stride` apart. Channels past C
// hold anything.
template <int MH, int MW, Of OF, typename T>
CVK_TARGET static void transform_tiles(const Pixels<T>& pixels, const Tiling& tiling, Range tiles,
                                       const T* zeros, int64_t channels, int64_t point_stride,
                                       float* to) {
  constexpr int MORE = OF == Of::INPUT ? 2 : 0, ROWS = MH + MORE, COLUMNS = MW + MORE;
  constexpr int HEIGHT = MH + 2, WIDTH = MW + 2;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, to += channels) {
    const int64_t column = tile % tiling.columns * MW - pixels.padding_w;
    const int64_t row = tile / tiling.columns % tiling.rows * MH - pixels.padding_h;
    const T* image = pixels.data + tile / tiling.columns / tiling.rows * pixels.stride_n;
    const T* samples[ROWS * COLUMNS];
    for (int i = 0; i < ROWS * COLUMNS; ++i) {
      const int64_t h = row + i / COLUMNS, w = column + i % COLUMNS;
      const bool inside = h >= 0 && h < pixels.H && w >= 0 && w < pixels.W;
      samples[i] = inside ? image + h * pixels.stride_h + w * pixels.stride_w : zeros;
    }
    for (int64_t c = 0; c < pixels.C; c += LANES) {
      V d[ROWS * COLUMNS], rows[ROWS * WIDTH], both[HEIGHT * WIDTH];
      if (c + LANES <= pixels.C) {
        for (int i = 0; i < ROWS * COLUMNS; ++i) d[i] = load(samples[i] + c);
      } else {
        for (int i = 0; i < ROWS * COLUMNS; ++i) d[i] = load_some(samples[i] + c, pixels.C - c);
      }
      for (int i = 0; i < ROWS; ++i)
        samples_to_points<OF, MW>(d + i * COLUMNS, 1, rows + i * WIDTH, 1);
      for (int i = 0; i < WIDTH; ++i) samples_to_points<OF, MH>(rows + i, WIDTH, both + i, WIDTH);
      for (int i = 0; i < HEIGHT * WIDTH; ++i) store(to + i * point_stride + c, both[i]);
    }
  }
}

// products[points, tiles, panels * PANEL] = operand * weight, point by point.
template <int MH, int MW>
CVK_TARGET static void multiply_points(const Problem& problem, const float* weights, int64_t count,
                                       Range panels, const Points& points, const float* operand,
                                       float* products) {
  constexpr int HEIGHT = MH + 2, WIDTH = MW + 2;
  const int64_t channels = Points::channels(problem), parts = divide_up(count, HIGHEST);
  const int64_t panel_size = problem.C * PANEL, columns = panels.size() * PANEL;
  for (int point = 0; point < HEIGHT * WIDTH; ++point) {
    const float* weight = weights + (point * problem.panels() + panels.begin) * panel_size;
    const float* from = operand + point * points.operand_stride;
    float* to = products + point * points.product_stride;
    int64_t width = 0;
    for (int64_t column = 0; column < columns; column += width) {
      const float* part = weight + column / PANEL * panel_size + column % PANEL;
      for (int64_t number = 0; number < parts; ++number) {
        const auto [tile, end] = part_of(count, parts, number);
        const int64_t height = end - tile;
        const float* rows[HIGHEST];
        for (int64_t i = 0; i < height; ++i) rows[i] = from + (tile + i) * channels;
        const auto product = tile_of<float, float>(height, columns - column, &width);
        product(rows, 0, 1, problem.C, part, panel_size, nullptr,
                Epilogue<float>::of_sums(to + tile * columns + column, columns));
      }
    }
  }
}

// out = act((A^T products A + shift) * gates + residual) for a range of tiles and panels.
template <int MH, int MW, typename T>
CVK_TARGET static void transform_output(const Problem& problem, const Data<T>& data,
                                        const Tiling& tiling, Range tiles, Range panels,
                                        const Points& points, const float* products) {
  constexpr int HEIGHT = MH + 2, WIDTH = MW + 2;
  const int64_t columns = panels.size() * PANEL;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t q = tile % tiling.columns * MW, p = tile / tiling.columns % tiling.rows * MH;
    const int64_t n = tile / tiling.columns / tiling.rows;
    const int64_t height = std::min<int64_t>(MH, problem.P - p);
    const int64_t width = std::min<int64_t>(MW, problem.Q - q);
    const float* from = products + (tile - tiles.begin) * columns;
    for (int64_t c = 0; c < columns; c += LANES) {
      V m[HEIGHT * WIDTH], rows[MH * WIDTH], both[MH * MW];
      float y[MH * MW * LANES];
      for (int i = 0; i < HEIGHT * WIDTH; ++i) m[i] = load(from + i * points.product_stride + c);
      for (int i = 0; i < WIDTH; ++i) from_points<MH>(m + i, WIDTH, rows + i, WIDTH);
      for (int i = 0; i < MH; ++i) from_points<MW>(rows + i * WIDTH, 1, both + i * MW, 1);
      for (int i = 0; i < MH * MW; ++i) store(y + i * LANES, both[i]);
      const int64_t channel = panels.begin * PANEL + c, kept = problem.K - channel;
      if (kept <= 0) break;
      for (int64_t i = 0; i < height; ++i) {
        const int64_t pixel = (n * problem.P + p + i) * problem.Q + q;
        const T* residual = data.residual;
        if (residual != nullptr) residual += pixel * problem.residual_stride + channel;
        const T* of_rows[MW];
        const T* const* gates = find_gates(problem, data, pixel, width, channel, of_rows);
        finish_tile(problem, y + i * MW * LANES, LANES, width, LANES, kept, data.shift + channel,
                    gates, residual, data.out + pixel * problem.out_stride + channel);
      }
    }
  }
}

// One task: a range of tiles times a range of panels.
template <int MH, int MW, typename T>
CVK_TARGET static void convolve_tiles(const Problem& problem, const Data<T>& data,
                                      const Tiling& tiling, Range tiles, Range panels,
                                      const T* zeros, const Points& points, float* operand,
                                      float* products) {
  transform_tiles<MH, MW, Of::INPUT>(Pixels<T>::of_input(problem, data), tiling, tiles, zeros,
                                     Points::channels(problem), points.operand_stride, operand);
  multiply_points<MH, MW>(problem, data.weight, tiles.size(), panels, points, operand, products);
  transform_output<MH, MW>(problem, data, tiling, tiles, panels, points, products);
}

// Operand and products of a range of tiles, of the input and of the gradient in the output; both
// start at tile `first`.
template <int MH, int MW, typename T>
CVK_TARGET static void transform_both(const Problem& problem, const Data<T>& data, const T* grad,
                                      const Tiling& tiling, Range tiles, int64_t first,
                                      const T* zeros, const Points& points, float* operand,
                                      float* products) {
  const int64_t channels = Points::channels(problem), columns = problem.panels() * PANEL;
  const int64_t before = tiles.begin - first;
  transform_tiles<MH, MW, Of::INPUT>(Pixels<T>::of_input(problem, data), tiling, tiles, zeros,
                                     channels, points.operand_stride, operand + before * channels);
  transform_tiles<MH, MW, Of::GRADIENT>(Pixels<T>::of_gradient(problem, grad), tiling, tiles, zeros,
                                        columns, points.product_stride,
                                        products + before * columns);
}
