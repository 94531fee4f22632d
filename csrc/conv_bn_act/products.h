// The products of conv_bn_act, included once for each instruction set: see isa.h. T is the element
// of x, the residual and out; U a factor of the products: float, Pair or Quad. Sums of products of
// bytes are int32, whose bits the vectors hold.

// Vectors of output channels that a tile holds, and the pixels: its sums fill the registers.
#if LANES == 16
constexpr int WIDEST = 4;
#else
constexpr int WIDEST = 2;
#endif
constexpr int HIGHEST = 6;

// Products that a sum takes before it is added to a total: the error of a long sum grows with it.
constexpr int64_t SUMMED = 256;

CVK_INLINE V multiply_add(V sum, V b, float a) { return sum + b * a; }

// b holds pairs: two products for each of the sums.
CVK_INLINE V multiply_add(V sum, V b, Pair a) {
#if defined(HAS_DOTS)
  const __m512i pairs = _mm512_set1_epi32(static_cast<int>(a.bits));
  return __builtin_bit_cast(
      V, _mm512_dpbf16_ps(__builtin_bit_cast(__m512, sum), __builtin_bit_cast(__m512bh, b),
                          __builtin_bit_cast(__m512bh, pairs)));
#else
  const Bits bits = __builtin_bit_cast(Bits, b);
  sum += __builtin_bit_cast(V, bits << 16) * bits_as<float>(a.bits << 16);
  return sum + __builtin_bit_cast(V, bits & 0xffff0000u) * bits_as<float>(a.bits & 0xffff0000u);
#endif
}

// b holds four weights, signed, for each of the sums; a four bytes of x.
CVK_INLINE V multiply_add(V sum, V b, Quad a) {
#if defined(HAS_BYTE_DOTS) && LANES == 16
  const __m512i bytes = _mm512_set1_epi32(static_cast<int>(a.bits));
  return __builtin_bit_cast(V, _mm512_dpbusd_epi32(__builtin_bit_cast(__m512i, sum), bytes,
                                                   __builtin_bit_cast(__m512i, b)));
#elif defined(HAS_BYTE_DOTS)
  const __m256i bytes = _mm256_set1_epi32(static_cast<int>(a.bits));
  return __builtin_bit_cast(V, _mm256_dpbusd_avx_epi32(__builtin_bit_cast(__m256i, sum), bytes,
                                                       __builtin_bit_cast(__m256i, b)));
#elif LANES == 8
  // Of x - 128, between -128 and 127: two products with a weight of at least -127 fit 16 bits.
  const __m256i bytes = _mm256_set1_epi32(static_cast<int>(a.bits ^ 0x80808080u));
  const __m256i signs = _mm256_sign_epi8(__builtin_bit_cast(__m256i, b), bytes);
  const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(bytes), signs);
  const __m256i fours = _mm256_madd_epi16(twos, _mm256_set1_epi16(1));
  return __builtin_bit_cast(V, _mm256_add_epi32(__builtin_bit_cast(__m256i, sum), fours));
#else
  I total = __builtin_bit_cast(I, sum);
  const Bits weights = __builtin_bit_cast(Bits, b);
  for (int byte = 0; byte < 4; ++byte) {
    const I weight = __builtin_bit_cast(I, weights << (24 - 8 * byte)) >> 24;
    total += weight * static_cast<int>(a.bits >> (8 * byte) & 0xff);
  }
  return __builtin_bit_cast(V, total);
#endif
}

// What multiply_add sums up, of x itself.
CVK_INLINE V whole_sum(V sum, const int32_t* surplus) {
  I total = __builtin_bit_cast(I, sum);
#if LANES == 8 && !defined(HAS_BYTE_DOTS)
  total += __builtin_bit_cast(I, load(reinterpret_cast<const float*>(surplus)));
#endif
  return __builtin_convertvector(total, V);
}

// sums[ROW, v] += rows[ROW][c] * b[v]. By recursion: an array that a loop indexes would not live in
// registers.
template <int HEIGHT, int WIDTH, typename U, int ROW = 0>
CVK_INLINE void add_products(V* sums, const U* const* rows, int64_t c, const V* b) {
  if constexpr (ROW < HEIGHT) {
    const U a = rows[ROW][c];
    V* of_row = sums + ROW * WIDTH;
    of_row[0] = multiply_add(of_row[0], b[0], a);
    if constexpr (WIDTH > 1) of_row[1] = multiply_add(of_row[1], b[1], a);
    if constexpr (WIDTH > 2) of_row[2] = multiply_add(of_row[2], b[2], a);
    if constexpr (WIDTH > 3) of_row[3] = multiply_add(of_row[3], b[3], a);
    add_products<HEIGHT, WIDTH, U, ROW + 1>(sums, rows, c, b);
  }
}

template <int COUNT, int INDEX = 0>
CVK_INLINE void clear_sums(V* sums) {
  if constexpr (INDEX < COUNT) {
    sums[INDEX] = V{};
    clear_sums<COUNT, INDEX + 1>(sums);
  }
}

// totals[i] += sums[i], both ways: into memory, the sums then starting anew, and back at the end.
template <int COUNT, int INDEX = 0>
CVK_INLINE void move_to_totals(V* sums, float* totals) {
  if constexpr (INDEX < COUNT) {
    store(totals + INDEX * LANES, load(totals + INDEX * LANES) + sums[INDEX]);
    sums[INDEX] = V{};
    move_to_totals<COUNT, INDEX + 1>(sums, totals);
  }
}

template <int COUNT, int INDEX = 0>
CVK_INLINE void add_totals(V* sums, const float* totals) {
  if constexpr (INDEX < COUNT) {
    sums[INDEX] += load(totals + INDEX * LANES);
    add_totals<COUNT, INDEX + 1>(sums, totals);
  }
}

// What is loaded of weights: all of each 32 bits, or the first or second bfloat16 in them.
enum class Word { BOTH, FIRST, SECOND };

template <Word WORD, int WIDTH, int INDEX = 0>
CVK_INLINE void load_weights(V* b, const float* weight, int64_t panel_size) {
  if constexpr (INDEX < WIDTH) {
    constexpr int column = INDEX * LANES;
    const V both = load(weight + column / PANEL * panel_size + column % PANEL);
    const Bits bits = __builtin_bit_cast(Bits, both);
    if constexpr (WORD == Word::BOTH) b[INDEX] = both;
    if constexpr (WORD == Word::FIRST) b[INDEX] = __builtin_bit_cast(V, bits << 16);
    if constexpr (WORD == Word::SECOND) b[INDEX] = __builtin_bit_cast(V, bits & 0xffff0000u);
    load_weights<WORD, WIDTH, INDEX + 1>(b, weight, panel_size);
  }
}

template <int HEIGHT, int WIDTH, int INDEX = 0>
CVK_INLINE void store_sums(const V* sums, float* to, int64_t stride) {
  if constexpr (INDEX < HEIGHT * WIDTH) {
    store(to + INDEX / WIDTH * stride + INDEX % WIDTH * LANES, sums[INDEX]);
    store_sums<HEIGHT, WIDTH, INDEX + 1>(sums, to, stride);
  }
}

template <int HEIGHT, int WIDTH, int INDEX = 0>
CVK_INLINE void add_sums(const V* sums, float* to, int64_t stride) {
  if constexpr (INDEX < HEIGHT * WIDTH) {
    float* const at = to + INDEX / WIDTH * stride + INDEX % WIDTH * LANES;
    store(at, load(at) + sums[INDEX]);
    add_sums<HEIGHT, WIDTH, INDEX + 1>(sums, to, stride);
  }
}

template <int HEIGHT, typename U, int ROW = 0>
CVK_INLINE void load_rows(const U** rows, const U* const* from) {
  if constexpr (ROW < HEIGHT) {
    rows[ROW] = from[ROW];
    load_rows<HEIGHT, U, ROW + 1>(rows, from);
  }
}

template <int HEIGHT, typename U, int ROW = 0>
CVK_INLINE bool are_all(const U* const* rows, const U* same) {
  if constexpr (ROW == HEIGHT)
    return true;
  else
    return rows[ROW] == same && are_all<HEIGHT, U, ROW + 1>(rows, same);
}

// What becomes of the sums: to[row, column] = clamp((sums + shift) * gates[row][column] +
// residual), or without a shift the sums themselves, in 32 bits. Of products of bytes see
// Quantised, whose vectors start at the tile's first column here.
template <typename T>
struct Epilogue {
  T* to;
  int64_t to_stride;
  const float* shift;
  const Gate<T>* const* gates;
  const T* residual;
  int64_t residual_stride;
  float low, high;
  float* sums = nullptr;
  Quantised quantised{};

  static Epilogue of_sums(float* sums, int64_t stride) {
    return {nullptr, stride, nullptr, nullptr, nullptr, 0, 0.0f, 0.0f, sums};
  }
};

// Before the residual: with the scale and shift of a channel, and its gate where there is one.
template <typename T>
CVK_INLINE V scaled(V sum, V shift, const Gate<T>* gate, const Quantised& quantised,
                    int64_t column) {
  if constexpr (!std::is_same_v<T, uint8_t>) {
    const V y = sum + shift;
    return gate == nullptr ? y : y * load(gate);
  } else {
    const V whole = whole_sum(sum, quantised.surplus + column);
    const V y = fused(whole, load(quantised.scale + column), shift);
    return gate == nullptr ? y : fused(y, load(gate), V{} + quantised.offset);
  }
}

template <typename T>
CVK_INLINE V with_residual(V y, const Quantised& quantised, const T* residual) {
  if constexpr (std::is_same_v<T, uint8_t>)
    return fused(load(residual), V{} + quantised.residual_scale, y);
  else
    return y + load(residual);
}

template <int INDEX, int WIDTH, typename T>
CVK_INLINE V finished(const V* sums, const Epilogue<T>& epilogue, const V* shift, V low, V high) {
  constexpr int row = INDEX / WIDTH, column = INDEX % WIDTH * LANES;
  const Gate<T>* gate = epilogue.gates == nullptr ? nullptr : epilogue.gates[row] + column;
  V y = scaled<T>(sums[INDEX], shift[INDEX % WIDTH], gate, epilogue.quantised, column);
  if (epilogue.residual != nullptr)
    y = with_residual(y, epilogue.quantised,
                      epilogue.residual + row * epilogue.residual_stride + column);
  y = y < low ? low : y;  // a NaN stays one
  return y > high ? high : y;
}

template <int HEIGHT, int WIDTH, int INDEX = 0, typename T>
CVK_INLINE void finish_sums(const V* sums, const Epilogue<T>& epilogue, const V* shift, V low,
                            V high) {
  if constexpr (INDEX < HEIGHT * WIDTH) {
    T* const to = epilogue.to + INDEX / WIDTH * epilogue.to_stride + INDEX % WIDTH * LANES;
    const V y = finished<INDEX, WIDTH>(sums, epilogue, shift, low, high);
    constexpr int STORED = std::is_same_v<T, uint8_t> ? WIDTH : std::min(WIDTH, 2);
    if constexpr (STORED == 4)
      store(to, y, finished<INDEX + 1, WIDTH>(sums, epilogue, shift, low, high),
            finished<INDEX + 2, WIDTH>(sums, epilogue, shift, low, high),
            finished<INDEX + 3, WIDTH>(sums, epilogue, shift, low, high));
    else if constexpr (STORED == 2)
      store(to, y, finished<INDEX + 1, WIDTH>(sums, epilogue, shift, low, high));
    else
      store(to, y);
    finish_sums<HEIGHT, WIDTH, INDEX + STORED>(sums, epilogue, shift, low, high);
  }
}

// The sums over parts and factors of operand[part * stride + row][c] * weight[part, c, column], for
// a tile of HEIGHT rows and WIDTH vectors of columns. operand holds pointers to the first of
// `depth` factors; a part whose rows are all `zeros` is left out. The weights of floats for
// bfloat16 are pairs of it, half as many bytes.
template <typename T, typename U, int HEIGHT, int WIDTH>
CVK_TARGET static void multiply(const U* const* operand, int64_t stride, int64_t parts,
                                int64_t depth, const float* weight, int64_t panel_size,
                                const U* zeros, const Epilogue<T>& epilogue) {
  V sums[HEIGHT * WIDTH];
  clear_sums<HEIGHT * WIDTH>(sums);
  constexpr bool EXACT = std::is_same_v<U, Quad>;
  const bool has_totals = !EXACT && parts * depth > SUMMED;
  alignas(64) float totals[HEIGHT * WIDTH * LANES];
  if (has_totals) std::fill_n(totals, HEIGHT * WIDTH * LANES, 0.0f);
  constexpr bool PAIRED = std::is_same_v<T, bfloat16> && std::is_same_v<U, float>;
  constexpr int64_t STEP = PAIRED ? 2 : 1;
  int64_t summed = 0;
  for (int64_t part = 0; part < parts; ++part, operand += stride) {
    const U* rows[HEIGHT];
    load_rows<HEIGHT>(rows, operand);
    const bool is_padding = !EXACT && are_all<HEIGHT>(rows, zeros);  // bytes of it are not 0
    for (int64_t c = 0, end = 0; c < depth;) {
      end = EXACT ? depth : std::min(depth, c + divide_up(SUMMED - summed, STEP) * STEP);
      summed += end - c;  // also of padding: no sum is to depend on how rows are cut into tiles
      if (is_padding) weight += divide_up(end - c, STEP) * PANEL, c = end;
      if constexpr (PAIRED) {
#pragma GCC unroll 2
        for (; c + 1 < end; c += 2, weight += PANEL) {
          V b[WIDTH];
          load_weights<Word::FIRST, WIDTH>(b, weight, panel_size);
          add_products<HEIGHT, WIDTH>(sums, rows, c, b);
          asm("" : "+r"(weight));  // loaded again: registers are short
          load_weights<Word::SECOND, WIDTH>(b, weight, panel_size);
          add_products<HEIGHT, WIDTH>(sums, rows, c + 1, b);
        }
        if (c < end) {
          V b[WIDTH];
          load_weights<Word::FIRST, WIDTH>(b, weight, panel_size);
          add_products<HEIGHT, WIDTH>(sums, rows, c, b);
          ++c, weight += PANEL;
        }
      } else {
#pragma GCC unroll 4
        for (; c < end; ++c, weight += PANEL) {
          V b[WIDTH];
          load_weights<Word::BOTH, WIDTH>(b, weight, panel_size);
          add_products<HEIGHT, WIDTH>(sums, rows, c, b);
        }
      }
      if (summed < SUMMED || !has_totals) continue;
      move_to_totals<HEIGHT * WIDTH>(sums, totals);
      summed = 0;
    }
  }
  if (has_totals) add_totals<HEIGHT * WIDTH>(sums, totals);
  if (epilogue.shift == nullptr) {
    store_sums<HEIGHT, WIDTH>(sums, epilogue.sums, epilogue.to_stride);
    return;
  }
  V shift[WIDTH];
  for (int v = 0; v < WIDTH; ++v) shift[v] = load(epilogue.shift + v * LANES);
  finish_sums<HEIGHT, WIDTH>(sums, epilogue, shift, V{} + epilogue.low, V{} + epilogue.high);
}

template <typename T, typename U>
using Multiply = void (*)(const U* const*, int64_t, int64_t, int64_t, const float*, int64_t,
                          const U*, const Epilogue<T>&);

template <typename T, typename U, int WIDTH>
CVK_TARGET static Multiply<T, U> multiply_of_height(int64_t height) {
  static constexpr Multiply<T, U> heights[HIGHEST] = {
      &multiply<T, U, 1, WIDTH>, &multiply<T, U, 2, WIDTH>, &multiply<T, U, 3, WIDTH>,
      &multiply<T, U, 4, WIDTH>, &multiply<T, U, 5, WIDTH>, &multiply<T, U, 6, WIDTH>};
  return heights[height - 1];
}

// The widest tile for `columns` columns that are left, and its width in columns.
template <typename T, typename U>
CVK_TARGET static Multiply<T, U> tile_of(int64_t height, int64_t columns, int64_t* width) {
  if constexpr (WIDEST == 4)
    if (columns >= 4 * LANES) return *width = 4 * LANES, multiply_of_height<T, U, 4>(height);
  if (columns > LANES) return *width = 2 * LANES, multiply_of_height<T, U, 2>(height);
  return *width = LANES, multiply_of_height<T, U, 1>(height);
}

// v between low and high where E is a byte.
template <typename E>
CVK_INLINE V clamped(V v, float low, float high) {
  if constexpr (!std::is_same_v<E, uint8_t>) return v;
  const V least = V{} + low, most = V{} + high;
  v = v < least ? least : v;
  return v > most ? most : v;
}

// What stands for act(y): of products of bytes see Quantised.
template <Act ACT, typename T>
CVK_INLINE V activated(V y, const Quantised& quantised) {
  if constexpr (!std::is_same_v<T, uint8_t>) {
    return activate<ACT, T>(y);
  } else {
    if constexpr (ACT == Act::SILU)
      y = fused(activate<ACT, T>(y), V{} + quantised.out_scale, V{} + quantised.out_zero);
    return clamped<T>(y, quantised.low, quantised.high);
  }
}

// Of the channels from c on; gate and residual, where there are any, begin with them.
template <Act ACT, typename T>
CVK_INLINE V finished(const float* sums, const float* shift, const Gate<T>* gate, const T* residual,
                      const Quantised& quantised, int64_t c) {
  V y = scaled<T>(load(sums + c), load(shift + c), gate, quantised, c);
  if (residual != nullptr) y = with_residual(y, quantised, residual);
  return activated<ACT, T>(y, quantised);
}

template <typename T>
CVK_INLINE const T* from(const T* p, int64_t c) {
  return p == nullptr ? p : p + c;
}

// out = act((sums + shift) * gates + residual) for `height` pixels and the `kept` first of
// `columns`. The vectors of all have whole panels.
template <Act ACT, typename T, typename O>
CVK_TARGET static void finish(const Problem& problem, const float* sums, int64_t sums_stride,
                              int64_t height, int64_t columns, int64_t kept, const float* shift,
                              const Gate<T>* const* gates, const T* residual, O* out,
                              const Quantised& quantised) {
  for (int64_t row = 0; row < height; ++row, sums += sums_stride, out += problem.out_stride) {
    const Gate<T>* gate = gates == nullptr ? nullptr : gates[row];
    int64_t c = 0;
    if constexpr (std::is_same_v<O, uint8_t>)
      for (; c + 4 * LANES <= std::min(columns, kept); c += 4 * LANES)
        store(out + c,
              finished<ACT, T>(sums, shift, from(gate, c), from(residual, c), quantised, c),
              finished<ACT, T>(sums, shift, from(gate, c + LANES), from(residual, c + LANES),
                               quantised, c + LANES),
              finished<ACT, T>(sums, shift, from(gate, c + 2 * LANES),
                               from(residual, c + 2 * LANES), quantised, c + 2 * LANES),
              finished<ACT, T>(sums, shift, from(gate, c + 3 * LANES),
                               from(residual, c + 3 * LANES), quantised, c + 3 * LANES));
    for (; c + 2 * LANES <= std::min(columns, kept); c += 2 * LANES)
      store(out + c, finished<ACT, T>(sums, shift, from(gate, c), from(residual, c), quantised, c),
            finished<ACT, T>(sums, shift, from(gate, c + LANES), from(residual, c + LANES),
                             quantised, c + LANES));
    for (; c < columns && c < kept; c += LANES) {
      if (c + LANES <= kept) {
        store(out + c,
              finished<ACT, T>(sums, shift, from(gate, c), from(residual, c), quantised, c));
        continue;
      }
      Gate<T> some_gates[LANES] = {};
      T some_residual[LANES] = {};
      for (int64_t i = 0; i < kept - c; ++i) {
        if (gate != nullptr) some_gates[i] = gate[c + i];
        if (residual != nullptr) some_residual[i] = residual[c + i];
      }
      const V y = finished<ACT, T>(sums, shift, gate == nullptr ? gate : some_gates,
                                   residual == nullptr ? residual : some_residual, quantised, c);
      store_some(out + c, y, kept - c);
    }
    if (residual != nullptr) residual += problem.residual_stride;
  }
}

template <Act ACT>
using Constant = std::integral_constant<Act, ACT>;

template <typename T>
CVK_TARGET static void finish_tile(const Problem& problem, const float* sums, int64_t sums_stride,
                                   int64_t height, int64_t columns, int64_t kept,
                                   const float* shift, const Gate<T>* const* gates,
                                   const T* residual, T* out, const Quantised& quantised = {}) {
  const auto finish_by = [&]<Act ACT>(Constant<ACT>) {
    const auto finish_to = [&](auto* out) {
      finish<ACT>(problem, sums, sums_stride, height, columns, kept, shift, gates, residual, out,
                  quantised);
    };
    if constexpr (std::is_same_v<T, uint8_t>)
      if (quantised.wide_out != nullptr) return finish_to(quantised.wide_out);
    finish_to(out);
  };
  // Of bytes, what is no SiLU is in their limits already.
  if constexpr (std::is_same_v<T, uint8_t>) {
    return problem.act == Act::SILU ? finish_by(Constant<Act::SILU>{})
                                    : finish_by(Constant<Act::NONE>{});
  } else {
    switch (problem.act) {
      case Act::NONE:
        return finish_by(Constant<Act::NONE>{});
      case Act::RELU:
        return finish_by(Constant<Act::RELU>{});
      case Act::RELU6:
        return finish_by(Constant<Act::RELU6>{});
      case Act::SILU:
        return finish_by(Constant<Act::SILU>{});
    }
  }
}

// Pointers to the gates of `count` pixels from `pixel` on, at a column; null without gates.
template <typename T>
CVK_INLINE const Gate<T>* const* find_gates(const Problem& problem, const Data<T>& data,
                                            int64_t pixel, int64_t count, int64_t column,
                                            const Gate<T>** gates) {
  if (data.output_gate == nullptr) return nullptr;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t image = (pixel + row) / (problem.P * problem.Q);
    gates[row] = data.output_gate + image * problem.K + column;
  }
  return gates;
}

// Sums whose SiLU is taken together: an exponential takes a hundred cycles, in which those of
// others are under way; and they are still in the nearest cache.
constexpr int64_t TOGETHER = 1024;

template <typename T>
CVK_TARGET static void apply_silu(T* out, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, out += stride)
    for (int64_t c = 0; c < width; c += LANES) store(out + c, activate<Act::SILU>(load(out + c)));
}

// Where a tap of an output pixel lies in x: its offset, or -1 in the padding.
CVK_INLINE int64_t offset_of(const Problem& problem, int64_t n, int64_t h, int64_t w) {
  if (h < 0 || h >= problem.H || w < 0 || w >= problem.W) return -1;
  return n * problem.x_stride_n + h * problem.x_stride_h + w * problem.x_stride_w;
}

// What a factor's numbers are in memory.
CVK_INLINE float* numbers_of(float* operand) { return operand; }
CVK_INLINE bfloat16* numbers_of(Pair* operand) { return reinterpret_cast<bfloat16*>(operand); }
CVK_INLINE uint8_t* numbers_of(Quad* operand) { return reinterpret_cast<uint8_t*>(operand); }
CVK_INLINE float number_of(float value, float) { return value; }
CVK_INLINE bfloat16 number_of(float value, bfloat16) { return Number<bfloat16>::narrow(value); }
CVK_INLINE uint8_t number_of(float value, uint8_t) { return Number<uint8_t>::narrow(value); }

// What stands for 0 in the operand.
CVK_INLINE float padding_of(const Problem&, float) { return 0.0f; }
CVK_INLINE bfloat16 padding_of(const Problem&, bfloat16) { return {}; }
CVK_INLINE uint8_t padding_of(const Problem& problem, uint8_t) { return problem.zero; }

// `count` neighbouring numbers of x, as the products take them.
template <typename T, typename E>
CVK_TARGET static void convert(const T* x, int64_t count, E* to) {
  if constexpr (std::is_same_v<T, E>) return copy(x, count, to);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(x + i));
  for (; i < count; ++i) to[i] = number_of(Number<T>::widen(x[i]), E{});
}

// What a prologue makes of a vector of x's channels. Of bytes it is at most 255, and what is below
// 0, where ReLU would clamp it, is stored as 0.
template <typename E, typename T>
CVK_INLINE V prepared(const Data<T>& data, const T* x, const Gate<T>* gate, int64_t c) {
  constexpr bool BYTES = std::is_same_v<E, uint8_t>;
  V u = load(x + c);
  if (data.input_scale != nullptr) {
    u = fused(u, load(data.input_scale + c), load(data.input_shift + c));
    if (!BYTES || gate != nullptr) u = activate<Act::RELU>(u);
  }
  if constexpr (!BYTES) return gate == nullptr ? u : u * load(gate + c);
  if constexpr (BYTES)
    if (gate != nullptr) u = fused(u, load(gate + c), load(gate + data.quantised.gate_shifts + c));
  const V high = V{} + 255.0f;
  return u > high ? high : u;
}

// The C channels of one tap of one pixel as the convolution multiplies them.
template <typename T, typename E>
CVK_TARGET static void gather_tap(const Problem& problem, const Data<T>& data, int64_t n,
                                  int64_t offset, E* to) {
  const int64_t C = problem.C, stride = problem.x_stride_c;
  if (offset < 0) {
    std::fill_n(to, C, padding_of(problem, E{}));
    return;
  }
  const T* x = data.x + offset;
  if (stride == 1 && !problem.has_prologue) return convert(x, C, to);
  const Gate<T>* gate = data.gate == nullptr ? nullptr : data.gate + n * C;
  int64_t c = 0;
  if (stride == 1 && C >= LANES) {
    if constexpr (std::is_same_v<E, uint8_t>)
      for (; c + 4 * LANES <= C; c += 4 * LANES)
        store(to + c, prepared<E>(data, x, gate, c), prepared<E>(data, x, gate, c + LANES),
              prepared<E>(data, x, gate, c + 2 * LANES), prepared<E>(data, x, gate, c + 3 * LANES));
    for (; c + LANES <= C; c += LANES)
      store(to + c, clamped<E>(prepared<E>(data, x, gate, c), 0.0f, 255.0f));
  }
  for (; c < C; ++c) {
    float u = Number<T>::widen(x[c * stride]);
    if (data.input_scale != nullptr) {
      u = fused(u, data.input_scale[c], data.input_shift[c]);
      u = u < 0.0f ? 0.0f : u;
    }
    if constexpr (std::is_same_v<T, uint8_t>)
      u = gate == nullptr ? u : fused(u, gate[c], gate[data.quantised.gate_shifts + c]);
    else if (gate != nullptr)
      u *= Number<T>::widen(gate[c]);
    to[c] = number_of(u, E{});
  }
}

// A row of taps whose channels lie together in x; w is the first tap's column.
template <typename T, typename E>
CVK_TARGET static void gather_row(const Problem& problem, const Data<T>& data, int64_t n, int64_t h,
                                  int64_t w, E* to) {
  const int64_t C = problem.C, S = problem.S;
  const bool inside = h >= 0 && h < problem.H;
  const int64_t first = inside ? std::clamp<int64_t>(-w, 0, S) : S;
  const int64_t last = std::clamp<int64_t>(problem.W - w, first, S);
  std::fill_n(to, first * C, padding_of(problem, E{}));
  if (first < last)
    convert(data.x + offset_of(problem, n, h, w + first), (last - first) * C, to + first * C);
  std::fill(to + last * C, to + S * C, padding_of(problem, E{}));
}

// The same for a problem that has bands: `bands` is [rows of pixels, R, width, band channels], each
// as wide as the pixels of the block in that row need.
template <typename T, typename U>
CVK_TARGET static void find_bands(const Problem& problem, const Data<T>& data, Range rows,
                                  const U* zeros, U* bands, const U** operand) {
  const int64_t count = rows.size(), C = problem.C, padded = problem.band_channels();
  const int64_t stride = problem.stride_w;
  for (int64_t row = 0; row < count;) {
    const int64_t pixel = rows.begin + row, q = pixel % problem.Q;
    const int64_t p = pixel / problem.Q % problem.P, n = pixel / problem.Q / problem.P;
    const int64_t pixels = std::min(count - row, problem.Q - q);
    const int64_t width = (pixels - 1) * stride + problem.S;
    const int64_t left = q * stride - problem.padding_w;
    const int64_t first = std::clamp<int64_t>(-left, 0, width);
    const int64_t last = std::clamp<int64_t>(problem.W - left, first, width);
    for (int64_t r = 0; r < problem.R; ++r) {
      const int64_t h = p * problem.stride_h - problem.padding_h + r * problem.dilation_h;
      const U** of_part = operand + r * count + row;
      if (h < 0 || h >= problem.H) {
        std::fill_n(of_part, pixels, zeros);
        continue;
      }
      auto* to = numbers_of(bands);
      using E = std::remove_pointer_t<decltype(to)>;
      const E zero = padding_of(problem, E{});
      std::fill_n(to, first * padded, zero);
      std::fill(to + last * padded, to + width * padded, zero);
      const T* x = data.x + n * problem.x_stride_n + h * problem.x_stride_h;
      for (int64_t w = first; w < last; ++w) {
        const T* from = x + (left + w) * problem.x_stride_w;
        for (int64_t c = 0; c < C; ++c)
          to[w * padded + c] = number_of(Number<T>::widen(from[c * problem.x_stride_c]), E{});
        std::fill(to + w * padded + C, to + (w + 1) * padded, E{});
      }
      for (int64_t i = 0; i < pixels; ++i)
        of_part[i] = reinterpret_cast<const U*>(to + i * stride * padded);
      bands = reinterpret_cast<U*>(to + width * padded);
    }
    row += pixels;
  }
}

// Pointers to the operand of a block of pixels, [parts][rows]; `gathered` is [rows, parts * depth]
// where the problem gathers, `zeros` a part of padding.
template <typename T, typename U>
CVK_TARGET static void find_operand(const Problem& problem, const Data<T>& data, Range rows,
                                    const U* zeros, U* gathered, const U** operand) {
  if (problem.has_bands()) return find_bands(problem, data, rows, zeros, gathered, operand);
  const int64_t count = rows.size(), C = problem.C, R = problem.R, S = problem.S;
  const bool gathers = problem.gathers(), rows_as_taps = problem.rows_as_taps();
  const bool rows_together = problem.rows_together();
  const int64_t depth = problem.depth(), factors = problem.parts() * depth;
  const int64_t numbers = factors * problem.together();
  int64_t q = rows.begin % problem.Q, p = rows.begin / problem.Q % problem.P;
  int64_t n = rows.begin / problem.Q / problem.P;
  for (int64_t row = 0; row < count; ++row) {
    U* of_row = gathered + row * factors;
    auto* to = numbers_of(of_row);
    using E = std::remove_pointer_t<decltype(to)>;
    if (gathers && !rows_as_taps) {
      operand[row] = of_row;
      std::fill(to + R * S * C, to + numbers, E{});  // what completes a factor
    }
    const int64_t top = p * problem.stride_h - problem.padding_h;
    const int64_t left = q * problem.stride_w - problem.padding_w;
    for (int64_t r = 0; r < R; ++r) {
      const int64_t h = top + r * problem.dilation_h;
      if (rows_as_taps) {
        const U*& tap = operand[r * count + row];
        if (h < 0 || h >= problem.H) {
          tap = zeros;
        } else if (left >= 0 && left + S <= problem.W) {
          tap = reinterpret_cast<const U*>(data.x + offset_of(problem, n, h, left));
        } else {
          gather_row(problem, data, n, h, left, to + r * S * C);
          tap = of_row + r * depth;
        }
        continue;
      }
      if (gathers && rows_together) {
        gather_row(problem, data, n, h, left, to + r * S * C);
        continue;
      }
      for (int64_t s = 0; s < S; ++s) {
        const int64_t offset = offset_of(problem, n, h, left + s * problem.dilation_w);
        if (gathers)
          gather_tap(problem, data, n, offset, to + (r * S + s) * C);
        else
          operand[(r * S + s) * count + row] =
              offset < 0 ? zeros : reinterpret_cast<const U*>(data.x + offset);
      }
    }
    if (++q < problem.Q) continue;
    q = 0;
    if (++p < problem.P) continue;
    p = 0;
    ++n;
  }
}

// Pixels between one that is written and one whose memory is asked for: a strip of few weights.
constexpr int64_t FAR = 4 * HIGHEST;

// Factors of weights that stay in the first cache. Then a strip of pixels gets all its channels
// before the next: each cache line of out is written once.
constexpr int64_t IN_FIRST_CACHE = 6 << 10;

// What a tile clamps to.
template <typename T>
CVK_INLINE std::pair<float, float> limits(const Problem& problem, const Data<T>& data) {
  if constexpr (std::is_same_v<T, uint8_t>) return {data.quantised.low, data.quantised.high};
  const float infinity = std::numeric_limits<float>::infinity();
  const bool clamps = problem.act == Act::RELU || problem.act == Act::RELU6;
  return {clamps ? 0.0f : -infinity, problem.act == Act::RELU6 ? 6.0f : infinity};
}

// A strip of pixels times a range of panels; the operand's parts are `stride` pointers apart.
template <typename T, typename U>
CVK_TARGET static void multiply_strip(const Problem& problem, const Data<T>& data, Range rows,
                                      Range panels, const U* zeros, const U* const* operand,
                                      int64_t stride) {
  const int64_t count = rows.size(), tiles = divide_up(count, HIGHEST);
  const int64_t parts = problem.parts(), depth = problem.depth();
  const int64_t panel_size = problem.panel_size();
  const auto [low, high] = limits(problem, data);
  // Few compute in float16 on a CPU: its products are those of floats, compiled once for both.
  using Tile = std::conditional_t<std::is_same_v<T, float16>, float, T>;
  // Whether a tile stores what becomes of its sums itself: SiLU is taken of floats.
  const bool finishes =
      std::is_same_v<T, float> ||
      (std::is_same_v<T, Tile> && problem.act != Act::SILU && data.quantised.wide_out == nullptr);
  // Bytes of each pixel that are fetched while the tile before it is multiplied: of those that lie
  // in x, where the first column reads them from memory.
  const bool fetches = !std::is_same_v<U, float> && !problem.gathers() && parts == 1;
  const int64_t ahead = fetches ? depth * int64_t{sizeof(U)} : 0;
  alignas(64) float sums[HIGHEST * WIDEST * LANES];
  int64_t width = 0;
  for (int64_t column = panels.begin * PANEL; column < panels.end * PANEL; column += width) {
    const float* weight = data.weight + column / PANEL * panel_size + column % PANEL;
    const float* shift = data.shift + column;
    const int64_t kept = std::min(problem.K, panels.end * PANEL) - column;
    if (kept <= 0) break;
    int64_t activated = 0;
    for (int64_t number = 0; number < tiles; ++number) {
      const auto [row, end] = part_of(count, tiles, number);
      const int64_t height = end - row;
      const Multiply<Tile, U> tile = tile_of<Tile, U>(height, kept, &width);
      const int64_t pixel = rows.begin + row;
      if (column == panels.begin * PANEL && ahead > 0)
        for (int64_t next = end; next < std::min(count, end + HIGHEST); ++next)
          for (int64_t line = 0; line < ahead; line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(operand[next]) + line);
      T* out = data.out == nullptr ? nullptr : data.out + pixel * problem.out_stride + column;
      const T* residual = data.residual;
      if (residual != nullptr) residual += pixel * problem.residual_stride + column;
      // Those of bytes are short runs, which no processor fetches by itself.
      if (std::is_same_v<T, uint8_t>) {
        const int64_t last = std::min(problem.pixels() - pixel, FAR + height);
        for (int64_t next = FAR; next < last; ++next) {
          if (residual != nullptr) __builtin_prefetch(residual + next * problem.residual_stride);
          if (out != nullptr) __builtin_prefetch(out + next * problem.out_stride, 1);
        }
      }
      const Gate<T>* of_rows[HIGHEST];
      const Gate<T>* const* gates = find_gates(problem, data, pixel, height, column, of_rows);
      Quantised quantised{};
      if constexpr (std::is_same_v<T, uint8_t>)
        quantised = data.quantised.at(pixel * problem.out_stride, column);
      if constexpr (std::is_same_v<T, Tile>)
        if (finishes && width <= kept) {
          tile(operand + row, stride, parts, depth, weight, panel_size, zeros,
               {out, problem.out_stride, shift, gates, residual, problem.residual_stride, low, high,
                nullptr, quantised});
          const int64_t pending = end - activated;
          if (std::is_same_v<T, float> && problem.act == Act::SILU &&
              (pending * width >= TOGETHER || end == count)) {
            apply_silu(out + (height - pending) * problem.out_stride, problem.out_stride, pending,
                       width);
            activated = end;
          }
          continue;
        }
      tile(operand + row, stride, parts, depth, weight, panel_size, zeros,
           Epilogue<Tile>::of_sums(sums, WIDEST * LANES));
      finish_tile(problem, sums, WIDEST * LANES, height, width, kept, shift, gates, residual, out,
                  quantised);
    }
  }
}

// One task of a direct convolution: a block of pixels times a range of panels.
template <typename T, typename U>
CVK_TARGET static void convolve(const Problem& problem, const Data<T>& data, Range rows,
                                Range panels, const U* zeros, U* gathered, const U** operand) {
  find_operand(problem, data, rows, zeros, gathered, operand);
  const bool few_weights = panels.size() * problem.panel_size() <= IN_FIRST_CACHE;
  const int64_t count = rows.size(), strips = few_weights ? divide_up(count, FAR) : 1;
  for (int64_t number = 0; number < strips; ++number) {
    const auto [begin, end] = part_of(count, strips, number);
    multiply_strip<T, U>(problem, data, {rows.begin + begin, rows.begin + end}, panels, zeros,
                         operand + begin, count);
  }
}
