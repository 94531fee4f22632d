// Sums over pixels of products of two of their channels: the gradient in the weight of a 1x1
// convolution, or in filters at Winograd's points. Included by winograd.h.

// Pixels whose products are summed before they are added to a total: the error of a long sum grows
// with it.
constexpr int64_t PIXELS = 64;

// to[row, column] += the sum over `count` pixels of a[pixel, row] * b[pixel, column], for HEIGHT
// rows and WIDTH vectors of columns.
template <int HEIGHT, int WIDTH>
CVK_TARGET static void add_outer_products(const float* a, int64_t a_stride, const float* b,
                                          int64_t b_stride, int64_t count, float* to,
                                          int64_t to_stride) {
  const float* rows[HEIGHT];
  for (int row = 0; row < HEIGHT; ++row) rows[row] = a + row;
  for (int64_t pixel = 0; pixel < count;) {
    V sums[HEIGHT * WIDTH];
    clear_sums<HEIGHT * WIDTH>(sums);
#pragma GCC unroll 2
    for (const int64_t end = std::min(count, pixel + PIXELS); pixel < end; ++pixel) {
      V columns[WIDTH];
      load_weights<Word::BOTH, WIDTH>(columns, b + pixel * b_stride, PANEL);
      add_products<HEIGHT, WIDTH>(sums, rows, pixel * a_stride, columns);
    }
    add_sums<HEIGHT, WIDTH>(sums, to, to_stride);
  }
}

using AddOuterProducts = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*,
                                  int64_t);

template <int WIDTH>
CVK_TARGET static AddOuterProducts outer_products_of_height(int64_t height) {
  static constexpr AddOuterProducts heights[HIGHEST] = {
      &add_outer_products<1, WIDTH>, &add_outer_products<2, WIDTH>, &add_outer_products<3, WIDTH>,
      &add_outer_products<4, WIDTH>, &add_outer_products<5, WIDTH>, &add_outer_products<6, WIDTH>};
  return heights[height - 1];
}

CVK_TARGET static AddOuterProducts outer_products(int64_t height, int64_t columns, int64_t* width) {
  if constexpr (WIDEST == 4)
    if (columns >= 4 * LANES) return *width = 4 * LANES, outer_products_of_height<4>(height);
  if (columns > LANES) return *width = 2 * LANES, outer_products_of_height<2>(height);
  return *width = LANES, outer_products_of_height<1>(height);
}

// to[rows, columns] += a[pixels, rows]^T * b[pixels, columns] for a range of rows, and columns that
// are a multiple of PANEL. Strides are those of pixels, and of to's rows.
CVK_TARGET static void multiply_pixels(Range rows, int64_t columns, int64_t pixels, const float* a,
                                       int64_t a_stride, const float* b, int64_t b_stride,
                                       float* to) {
  const int64_t parts = divide_up(rows.size(), HIGHEST);
  int64_t width = 0;
  for (int64_t column = 0; column < columns; column += width) {
    for (int64_t number = 0; number < parts; ++number) {
      const auto [begin, end] = part_of(rows.size(), parts, number);
      const int64_t row = rows.begin + begin;
      const auto add = outer_products(end - begin, columns - column, &width);
      add(a + row, a_stride, b + column, b_stride, pixels, to + row * columns + column, columns);
    }
  }
}
