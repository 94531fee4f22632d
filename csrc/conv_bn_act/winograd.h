// Winograd's minimal filtering for 3x3 convolutions of stride 1, included once for each instruction
// set: see isa.h. Lavin and Gray 2015, arXiv:1509.09308.
//
// F(2x2, 3x3) interpolates at 0, 1, -1 and infinity, with 2.25 times fewer products than directly;
// F(4x4, 3x3) at 0, +-sqrt(1/2), +-sqrt(2) and infinity, with 4 times fewer. These points keep its
// error at about twice that of a direct sum; the usual 0, +-1, +-2 make it five times.

#include "products.h"

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

// operand[points, tiles, C] of a range of tiles. Channels past C hold anything.
template <int MH, int MW, typename T>
CVK_TARGET static void transform_input(const Problem& problem, const Data<T>& data,
                                       const Tiling& tiling, Range tiles, const T* zeros,
                                       const Points& points, float* operand) {
  constexpr int HEIGHT = MH + 2, WIDTH = MW + 2;
  const int64_t channels = Points::channels(problem), C = problem.C;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t column = tile % tiling.columns * MW - problem.padding_w;
    const int64_t row = tile / tiling.columns % tiling.rows * MH - problem.padding_h;
    const T* image = data.x + tile / tiling.columns / tiling.rows * problem.x_stride_n;
    const T* samples[HEIGHT * WIDTH];
    for (int i = 0; i < HEIGHT * WIDTH; ++i) {
      const int64_t h = row + i / WIDTH, w = column + i % WIDTH;
      const bool inside = h >= 0 && h < problem.H && w >= 0 && w < problem.W;
      samples[i] = inside ? image + h * problem.x_stride_h + w * problem.x_stride_w : zeros;
    }
    float* to = operand + (tile - tiles.begin) * channels;
    for (int64_t c = 0; c < C; c += LANES) {
      V d[HEIGHT * WIDTH], rows[HEIGHT * WIDTH], both[HEIGHT * WIDTH];
      if (c + LANES <= C) {
        for (int i = 0; i < HEIGHT * WIDTH; ++i) d[i] = load(samples[i] + c);
      } else {
        for (int i = 0; i < HEIGHT * WIDTH; ++i) d[i] = load_some(samples[i] + c, C - c);
      }
      for (int i = 0; i < HEIGHT; ++i) to_points<MW>(d + i * WIDTH, 1, rows + i * WIDTH, 1);
      for (int i = 0; i < WIDTH; ++i) to_points<MH>(rows + i, WIDTH, both + i, WIDTH);
      for (int i = 0; i < HEIGHT * WIDTH; ++i) store(to + i * points.operand_stride + c, both[i]);
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
  transform_input<MH, MW>(problem, data, tiling, tiles, zeros, points, operand);
  multiply_points<MH, MW>(problem, data.weight, tiles.size(), panels, points, operand, products);
  transform_output<MH, MW>(problem, data, tiling, tiles, panels, points, products);
}
