// The depthwise convolution of bytes by AVX512-VNNI, which multiplies four bytes at once, included
// for each instruction set (see isa.h), of which the others have none of it.
//
// Channels are taken in groups of 16, G of them at once. Interleaving the bytes of four
// neighbouring pixels gives four vectors, whose 32-bit lanes hold a channel's four pixels each: a
// row of taps, or with a kernel of 5 the first four; the fifth is multiplied with three zeros.
// Vector j has the channels 16 * i + 4 * j + k in its lane 4 * i + k.

#if LANES == 16 && defined(HAS_BYTE_DOTS)

#include "depthwise_conv_bn_act/rows.h"

template <int G>
struct BytesOf;
template <>
struct BytesOf<1> {
  using Vector = __m128i;
};
template <>
struct BytesOf<2> {
  using Vector = __m256i;
};
template <>
struct BytesOf<4> {
  using Vector = __m512i;
};

// The first of `kept` bytes, and zeros past them.
CVK_INLINE __m128i load_bytes(const uint8_t* p, int64_t kept, __m128i*) {
  return _mm_maskz_loadu_epi8(kept >= 16 ? 0xffff : (1u << kept) - 1, p);
}
CVK_INLINE __m256i load_bytes(const uint8_t* p, int64_t, __m256i*) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
CVK_INLINE __m512i load_bytes(const uint8_t* p, int64_t, __m512i*) { return _mm512_loadu_si512(p); }

CVK_INLINE __m128i load_whole(const uint8_t* p, __m128i*) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
CVK_INLINE __m256i load_whole(const uint8_t* p, __m256i*) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
CVK_INLINE __m512i load_whole(const uint8_t* p, __m512i*) { return _mm512_loadu_si512(p); }

CVK_INLINE void store_whole(uint8_t* p, __m128i v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
}
CVK_INLINE void store_whole(uint8_t* p, __m256i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
CVK_INLINE void store_whole(uint8_t* p, __m512i v) { _mm512_storeu_si512(p, v); }

#define CVK_BINARY(name, narrow, middle, wide)                           \
  CVK_INLINE __m128i name(__m128i a, __m128i b) { return narrow(a, b); } \
  CVK_INLINE __m256i name(__m256i a, __m256i b) { return middle(a, b); } \
  CVK_INLINE __m512i name(__m512i a, __m512i b) { return wide(a, b); }
CVK_BINARY(low_bytes, _mm_unpacklo_epi8, _mm256_unpacklo_epi8, _mm512_unpacklo_epi8)
CVK_BINARY(high_bytes, _mm_unpackhi_epi8, _mm256_unpackhi_epi8, _mm512_unpackhi_epi8)
CVK_BINARY(low_pairs, _mm_unpacklo_epi16, _mm256_unpacklo_epi16, _mm512_unpacklo_epi16)
CVK_BINARY(high_pairs, _mm_unpackhi_epi16, _mm256_unpackhi_epi16, _mm512_unpackhi_epi16)
#undef CVK_BINARY

CVK_INLINE __m128i add_dots(__m128i sum, __m128i x, __m128i w) {
  return _mm_dpbusd_epi32(sum, x, w);
}
CVK_INLINE __m256i add_dots(__m256i sum, __m256i x, __m256i w) {
  return _mm256_dpbusd_epi32(sum, x, w);
}
CVK_INLINE __m512i add_dots(__m512i sum, __m512i x, __m512i w) {
  return _mm512_dpbusd_epi32(sum, x, w);
}

CVK_INLINE __m512i side_by_side(__m256i low, __m256i high) {
  struct Both {
    __m256i low, high;
  };
  return __builtin_bit_cast(__m512i, Both{low, high});
}

// The sums of four vectors in the order of the channels, LANES of them in each.
CVK_INLINE void in_order(const __m128i* r, __m512i* to) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(r[0]), r[1], 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(r[2]), r[3], 1);
  to[0] = side_by_side(low, high);
}
CVK_INLINE void in_order(const __m256i* r, __m512i* to) {
  const __m512i low = side_by_side(r[0], r[1]);
  const __m512i high = side_by_side(r[2], r[3]);
  to[0] = _mm512_maskz_shuffle_i32x4(0xffff, low, high, 0x88);
  to[1] = _mm512_maskz_shuffle_i32x4(0xffff, low, high, 0xdd);
}
CVK_INLINE void in_order(const __m512i* r, __m512i* to) {
  const __m512i even_low = _mm512_maskz_shuffle_i32x4(0xffff, r[0], r[1], 0x88);
  const __m512i odd_low = _mm512_maskz_shuffle_i32x4(0xffff, r[0], r[1], 0xdd);
  const __m512i even_high = _mm512_maskz_shuffle_i32x4(0xffff, r[2], r[3], 0x88);
  const __m512i odd_high = _mm512_maskz_shuffle_i32x4(0xffff, r[2], r[3], 0xdd);
  to[0] = _mm512_maskz_shuffle_i32x4(0xffff, even_low, even_high, 0x88);
  to[2] = _mm512_maskz_shuffle_i32x4(0xffff, even_low, even_high, 0xdd);
  to[1] = _mm512_maskz_shuffle_i32x4(0xffff, odd_low, odd_high, 0x88);
  to[3] = _mm512_maskz_shuffle_i32x4(0xffff, odd_low, odd_high, 0xdd);
}

// One task: a band of rows for the channels [c, c + kept) of an image, 16 * G of them or fewer. x,
// out, the weights [K, T, 4, 4 * G, 4], scale, shift and surplus begin there.
struct QuadTask {
  int64_t first, last;  // rows of out
  int64_t kept;
  const uint8_t* x;
  uint8_t* out;
  const int8_t* weight;
  const float* scale;
  const float* shift;
  const int32_t* surplus;  // what is added to sums of products
  uint8_t* ring;           // [K, QUADS, 64 * G]
  float* row_sums;         // [band, 16 * G], null where no sums are taken
  float low, high;         // what an activation other than SiLU clamps to
};

// Columns of out that are made of the rows in a ring, which stays in the first cache.
constexpr int64_t TILE = 28;
constexpr int64_t QUADS = TILE + 4;

// The quads of row ih of x, from column `left` on, STRIDE apart.
template <int G, int STRIDE>
CVK_TARGET static void fill_quads(const Problem& problem, const QuadTask& task, int64_t ih,
                                  int64_t left, int64_t count, uint8_t* to) {
  using Vector = typename BytesOf<G>::Vector;
  Vector* const kind = nullptr;
  alignas(64) uint8_t padding[16 * G];
  std::memset(padding, static_cast<int>(problem.x_zero), sizeof(padding));
  const bool inside = ih >= 0 && ih < problem.H;
  const uint8_t* row = task.x + ih * problem.x_stride_h;
  const auto pixel = [&](int64_t w) __attribute__((always_inline)) {
    return inside && w >= 0 && w < problem.W ? row + w * problem.x_stride_w : padding;
  };
  for (int64_t m = 0; m < count; ++m, to += 64 * G) {
    const int64_t w = left + m * STRIDE;
    const Vector a = load_bytes(pixel(w), task.kept, kind);
    const Vector b = load_bytes(pixel(w + 1), task.kept, kind);
    const Vector c = load_bytes(pixel(w + 2), task.kept, kind);
    const Vector d = load_bytes(pixel(w + 3), task.kept, kind);
    const Vector low_ab = low_bytes(a, b), high_ab = high_bytes(a, b);
    const Vector low_cd = low_bytes(c, d), high_cd = high_bytes(c, d);
    store_whole(to, low_pairs(low_ab, low_cd));
    store_whole(to + 16 * G, high_pairs(low_ab, low_cd));
    store_whole(to + 32 * G, low_pairs(high_ab, high_cd));
    store_whole(to + 48 * G, high_pairs(high_ab, high_cd));
  }
}

// COUNT neighbouring pixels of out, whose quads begin at rows[r]; sums[G] of what they become.
template <bool SILU, int G, int K, int STRIDE, int COUNT>
CVK_INLINE void make_pixels(const Problem& problem, const QuadTask& task,
                            const uint8_t* const* rows, uint8_t* out, V* sums) {
  using Vector = typename BytesOf<G>::Vector;
  Vector* const kind = nullptr;
  const V low = V{} + task.low, high = V{} + task.high;
  constexpr int T = K == 5 ? 2 : 1, BYTES = 16 * G, NEXT = 4 / STRIDE;
  Vector acc[COUNT][4];
  for (int i = 0; i < COUNT; ++i)
    for (int j = 0; j < 4; ++j) acc[i][j] = Vector{};
  const auto* weight = reinterpret_cast<const uint8_t*>(task.weight);
#pragma GCC unroll 5
  for (int r = 0; r < K; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      const uint8_t* quads = rows[r] + t * NEXT * 4 * BYTES;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, weight += BYTES) {
        const Vector w = load_whole(weight, kind);
#pragma GCC unroll 2
        for (int i = 0; i < COUNT; ++i)
          acc[i][j] = add_dots(acc[i][j], load_whole(quads + (4 * i + j) * BYTES, kind), w);
      }
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < COUNT; ++i, out += problem.C) {
    __m512i ordered[G];
    in_order(acc[i], ordered);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      I total = __builtin_bit_cast(I, ordered[g]);
      total += __builtin_bit_cast(I, load(reinterpret_cast<const float*>(task.surplus) + g * 16));
      const V x = __builtin_convertvector(total, V);
      V y = fused(x, load(task.scale + g * 16), load(task.shift + g * 16));
      y = SILU ? byte_silu(y) : y < low ? low : y > high ? high : y;
      sums[g] += y;
      const V bytes = stored<uint8_t>(problem, y);
      if (G > 1 || task.kept == 16)
        store(out + g * 16, bytes);
      else
        store_some(out, bytes, task.kept);
    }
  }
}

template <bool SILU, int G, int K, int STRIDE>
CVK_TARGET static void make_quads(const Problem& problem, const QuadTask& task) {
  constexpr int64_t ROW = QUADS * 64 * G;
  constexpr int64_t MORE = K == 5 ? 4 / STRIDE : 0;
  const int64_t tiles = (problem.Q + TILE - 1) / TILE;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = tile * TILE, count = std::min(TILE, problem.Q - begin);
    const int64_t left = begin * STRIDE - problem.padding_w;
    int64_t next = task.first * STRIDE - problem.padding_h;  // the first row that the ring lacks
    for (int64_t p = task.first; p < task.last; ++p) {
      const int64_t top = p * STRIDE - problem.padding_h;
      // A row's place: rows before the first are as many rings on.
      const auto place = [&](int64_t ih) { return task.ring + (ih + 64 * K) % K * ROW; };
      for (next = std::max(next, top); next < top + K; ++next)
        fill_quads<G, STRIDE>(problem, task, next, left, count + MORE, place(next));
      const uint8_t* rows[K];
      for (int r = 0; r < K; ++r) rows[r] = place(top + r);
      V sums[G];
      float* const row_sums =
          task.row_sums == nullptr ? nullptr : task.row_sums + (p - task.first) * 16 * G;
      for (int g = 0; g < G; ++g)
        sums[g] = row_sums == nullptr || tile == 0 ? V{} : load(row_sums + g * 16);
      uint8_t* out = task.out + (p * problem.Q + begin) * problem.C;
      int64_t q = 0;
      for (; q + 2 <= count; q += 2, out += 2 * problem.C) {
        make_pixels<SILU, G, K, STRIDE, 2>(problem, task, rows, out, sums);
        for (int r = 0; r < K; ++r) rows[r] += 2 * 64 * G;
      }
      if (q < count) make_pixels<SILU, G, K, STRIDE, 1>(problem, task, rows, out, sums);
      if (row_sums != nullptr)
        for (int g = 0; g < G; ++g) store(row_sums + g * 16, sums[g]);
    }
  }
}

using MakeQuads = void (*)(const Problem&, const QuadTask&);

template <bool SILU, int G>
CVK_TARGET static MakeQuads select_quads(const Problem& problem) {
  if (problem.kernel == 3)
    return problem.stride == 1 ? &make_quads<SILU, G, 3, 1> : &make_quads<SILU, G, 3, 2>;
  return problem.stride == 1 ? &make_quads<SILU, G, 5, 1> : &make_quads<SILU, G, 5, 2>;
}

template <int G>
CVK_TARGET static MakeQuads select_quads(const Problem& problem) {
  return problem.act == Act::SILU ? select_quads<true, G>(problem)
                                  : select_quads<false, G>(problem);
}

#endif
