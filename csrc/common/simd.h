// Vectors of LANES floats for the instruction set of CVK_TARGET: see isa.h. Vector types would be
// lowered to the baseline before CVK_SIMD clones a function, so every function that uses them names
// its target.

using V = float __attribute__((vector_size(LANES * sizeof(float))));
// The same in memory, wherever it lies.
using Unaligned [[gnu::may_alias]] =
    float __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
using I = int32_t __attribute__((vector_size(LANES * sizeof(int32_t))));
using Bits = uint32_t __attribute__((vector_size(LANES * sizeof(uint32_t))));
using Half = uint16_t __attribute__((vector_size(LANES * sizeof(uint16_t))));

#undef CVK_INLINE
#define CVK_INLINE CVK_TARGET static inline __attribute__((always_inline))

CVK_INLINE V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }

CVK_INLINE void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

CVK_INLINE V load(const bfloat16* p) {
  Half bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return __builtin_bit_cast(V, __builtin_convertvector(bits, Bits) << 16);
}

// v as bfloat16, in 32 bits each: rounded to nearest, ties to even.
CVK_INLINE Bits rounded(V v) {
  const Bits bits = __builtin_bit_cast(Bits, v);
  const Bits nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return v == v ? nearest : (Bits{} + 0x7fc0);
}

CVK_INLINE void store(bfloat16* p, V v) {
#if defined(HAS_DOTS)
  const __m256bh half = _mm512_cvtneps_pbh(__builtin_bit_cast(__m512, v));
#else
  const Bits kept = rounded(v);
#if LANES == 8
  const __m256i words = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);
  const __m128i half = _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08));
#else
  const Half half = __builtin_convertvector(kept, Half);
#endif
#endif
  __builtin_memcpy(p, &half, sizeof(half));
}

CVK_INLINE V load(const float16* p) {
#if LANES == 16
  return __builtin_bit_cast(V,
                            _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)));
#elif LANES == 8
  return __builtin_bit_cast(V, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = Number<float16>::widen(p[i]);
  return load(lanes);
#endif
}

CVK_INLINE void store(float16* p, V v) {
#if LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, __builtin_bit_cast(__m512, v), 8));
#elif LANES == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(__builtin_bit_cast(__m256, v), 8));
#else
  float lanes[LANES];
  store(lanes, v);
  for (int i = 0; i < LANES; ++i) p[i] = Number<float16>::narrow(lanes[i]);
#endif
}

// By the sets' own instructions: GCC 12 converts vectors of bytes one by one.
CVK_INLINE V load(const uint8_t* p) {
#if LANES == 16
  const __m512i wide = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
  return __builtin_convertvector(__builtin_bit_cast(I, wide), V);
#elif LANES == 8
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  return __builtin_convertvector(__builtin_bit_cast(I, wide), V);
#else
  I wide;
  for (int i = 0; i < LANES; ++i) wide[i] = p[i];
  return __builtin_convertvector(wide, V);
#endif
}

// v between 0 and 255 as bytes: rounded to nearest, ties to even.
CVK_INLINE void store(uint8_t* p, V v) {
  const Bits shifted = __builtin_bit_cast(Bits, v + 0x1.8p23f);  // rounded into the last places
#if LANES == 16
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, __builtin_bit_cast(__m512i, shifted));
  _mm_storeu_si128((__m128i*)p, bytes);
#elif LANES == 8
  const __m256i whole = __builtin_bit_cast(__m256i, shifted & 0xff);
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < LANES; ++i) p[i] = static_cast<uint8_t>(shifted[i]);
#endif
}

#if LANES == 16
CVK_INLINE __m512i nearest(V v) {
  return _mm512_maskz_cvtps_epi32(0xffff, __builtin_bit_cast(__m512, v));
}
#endif

// Four vectors of numbers of at most 255; those below 0 become 0.
CVK_INLINE void store(uint8_t* p, V a, V b, V c, V d) {
#if LANES == 16
  const __m512i ab = _mm512_packs_epi32(nearest(a), nearest(b));
  const __m512i cd = _mm512_packs_epi32(nearest(c), nearest(d));
  // Each of its four parts has four bytes of a, of b, of c and of d.
  const __m512i bytes = _mm512_packus_epi16(ab, cd);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_maskz_permutexvar_epi32(0xffff, order, bytes));
#else
  const V zero = V{};
  store(p, a < zero ? zero : a);
  store(p + LANES, b < zero ? zero : b);
  store(p + 2 * LANES, c < zero ? zero : c);
  store(p + 3 * LANES, d < zero ? zero : d);
#endif
}

// Two vectors, the first at p.
template <typename T>
CVK_INLINE void store(T* p, V first, V second) {
#if LANES == 8
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __m256i words = _mm256_packus_epi32((__m256i)rounded(first), (__m256i)rounded(second));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(words, 0xd8));
    return;
  }
#endif
  store(p, first);
  store(p + LANES, second);
}

// The `kept` first elements at p, and zeros.
template <typename T>
CVK_INLINE V load_some(const T* p, int64_t kept) {
  T lanes[LANES] = {};
  for (int64_t i = 0; i < kept; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <typename T>
CVK_INLINE void store_some(T* p, V v, int64_t kept) {
  T lanes[LANES];
  store(lanes, v);
  for (int64_t i = 0; i < kept; ++i) p[i] = lanes[i];
}

// `count` elements; few of them, which a call of memcpy would take longer for, by masks.
template <typename T>
CVK_INLINE void copy(const T* from, int64_t count, T* to) {
#if LANES == 16
  constexpr int64_t WHOLE = 64 / sizeof(T);
  if constexpr (sizeof(T) == 1) {
    for (; count >= WHOLE; count -= WHOLE, from += WHOLE, to += WHOLE)
      _mm512_storeu_si512(to, _mm512_loadu_si512(from));
    const __mmask64 rest = (uint64_t{1} << count) - 1;
    _mm512_mask_storeu_epi8(to, rest, _mm512_maskz_loadu_epi8(rest, from));
    return;
  }
  if constexpr (sizeof(T) == 2) {
    for (; count >= WHOLE; count -= WHOLE, from += WHOLE, to += WHOLE)
      _mm512_storeu_si512(to, _mm512_loadu_si512(from));
    const __mmask32 rest = (1u << count) - 1;
    _mm512_mask_storeu_epi16(to, rest, _mm512_maskz_loadu_epi16(rest, from));
    return;
  }
#endif
  std::memcpy(to, from, count * sizeof(T));
}

// a * b + c rounded once, where the set has an instruction for it. A compiler chooses that anew in
// each place; bytes are to be the same on all processors.
CVK_INLINE V fused(V a, V b, V c) {
#if LANES == 16
  return __builtin_bit_cast(
      V, _mm512_fmadd_ps(__builtin_bit_cast(__m512, a), __builtin_bit_cast(__m512, b),
                         __builtin_bit_cast(__m512, c)));
#elif LANES == 8
  return __builtin_bit_cast(
      V, _mm256_fmadd_ps(__builtin_bit_cast(__m256, a), __builtin_bit_cast(__m256, b),
                         __builtin_bit_cast(__m256, c)));
#else
  return a * b + c;
#endif
}

CVK_INLINE float fused(float a, float b, float c) {
#if LANES >= 8
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// a * b, which no compiler rounds together with a sum that it is added to.
CVK_INLINE V product(V a, V b) {
  V rounded = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(rounded));
#elif defined(__aarch64__)
  asm("" : "+w"(rounded));
#endif
  return rounded;
}

// e^x to 2 roundings, for a sum with 1: below -87 it stays at 2e-38, above 88.4 it is infinite.
CVK_INLINE V exponential(V x) {
  const V low = V{} - 87.0f, high = V{} + 89.0f;
  x = x < low ? low : x;
  x = x < high ? x : high;
  const V shifted = x * 0x1.715476p0f + 0x1.8p23f;  // x / ln(2), rounded into the last places
  const V n = shifted - 0x1.8p23f;
  V r = x - n * 0x1.62e400p-1f;  // ln(2) in two parts
  r = r - n * 0x1.7f7d1cp-20f;
  V y = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const I bits = __builtin_bit_cast(I, shifted);
  return y * __builtin_bit_cast(V, (bits + 127) << 23);  // 2^n, infinity for n = 128
}

// An inverse to 11 bits or more: 0 of infinity.
CVK_INLINE V short_inverse(V x) {
#if LANES == 16
  return __builtin_bit_cast(V, _mm512_maskz_rcp14_ps(0xffff, __builtin_bit_cast(__m512, x)));
#elif LANES == 8
  return __builtin_bit_cast(V, _mm256_rcp_ps(__builtin_bit_cast(__m256, x)));
#else
  return 1.0f / x;
#endif
}

// y * sigmoid(y) to 11 bits or more, for bfloat16.
CVK_INLINE V short_silu(V y) {
  const V low = V{} - 126.0f, high = V{} + 128.0f;
  V x = y * -0x1.715476p0f;  // -y / ln(2)
  x = x < low ? low : x;
  x = x < high ? x : high;
  const V shifted = x + 0x1.8p23f;  // rounded into the last places
  const V r = x - (shifted - 0x1.8p23f);
  V power = r * 0.0096181291f + 0.0555041087f;  // 2^r
  power = power * r + 0.2402265070f;
  power = power * r + 0.6931471806f;
  power = power * r + 1.0f;
  const I bits = __builtin_bit_cast(I, shifted);
  power = power * __builtin_bit_cast(V, (bits + 127) << 23);  // 2^n, infinity for n = 128
  return y * short_inverse(power + 1.0f);
}

// The numbers of a table of SigmoidTable::PIECES at these places.
CVK_INLINE V look_up(const float* table, I places) {
#if LANES == 16
  const __m512 low = _mm512_load_ps(table), high = _mm512_load_ps(table + 16);
  return __builtin_bit_cast(V,
                            _mm512_permutex2var_ps(low, __builtin_bit_cast(__m512i, places), high));
#elif LANES == 8
  // Four quarters of the table by the three lowest bits, of which the next two choose: a gather
  // takes longer on some processors.
  const __m256i at = __builtin_bit_cast(__m256i, places);
  __m256 quarters[4];
  for (int i = 0; i < 4; ++i)
    quarters[i] = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8 * i), at);
  const __m256 odd = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 27));
  const __m256 low = _mm256_blendv_ps(quarters[0], quarters[1], odd);
  const __m256 high = _mm256_blendv_ps(quarters[2], quarters[3], odd);
  return __builtin_bit_cast(V, _mm256_blendv_ps(low, high, upper));
#else
  V found{};
  for (int i = 0; i < LANES; ++i) found[i] = table[places[i]];
  return found;
#endif
}

// y * sigmoid(y) for bytes, see SigmoidTable.
CVK_INLINE V byte_silu(V y) {
  constexpr float PER_UNIT = SigmoidTable::PIECES / (2.0f * SigmoidTable::REACH);
  const V least = V{}, most = V{} + (SigmoidTable::PIECES - 0x1p-8f);
  V place = fused(y, V{} + PER_UNIT, V{} + SigmoidTable::PIECES / 2.0f);
  place = place > least ? place : least;
  place = place < most ? place : most;
  const I piece = __builtin_convertvector(place, I);
  const V t = place - __builtin_convertvector(piece, V);
  const V bent = fused(look_up(SIGMOID.c, piece), t, look_up(SIGMOID.b, piece));
  return product(y, fused(bent, t, look_up(SIGMOID.a, piece)));
}

// In what T needs. Each of them keeps a NaN.
template <Act ACT, typename T = float>
CVK_INLINE V activate(V y) {
  const V zero = V{}, six = V{} + 6.0f;
  if constexpr (ACT == Act::SILU && std::is_same_v<T, bfloat16>) return short_silu(y);
  if constexpr (ACT == Act::SILU && std::is_same_v<T, uint8_t>) return byte_silu(y);
  if constexpr (ACT == Act::SILU) return y / (1.0f + exponential(-y));
  if constexpr (ACT == Act::RELU || ACT == Act::RELU6) y = y < zero ? zero : y;
  if constexpr (ACT == Act::RELU6) y = y > six ? six : y;
  return y;
}
