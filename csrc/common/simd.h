// Vectors of LANES floats for the instruction set of CVK_TARGET: see isa.h. Vector types would be
// lowered to the baseline before CVK_SIMD clones a function, so every function that uses them names
// its target.

using V = float __attribute__((vector_size(LANES * sizeof(float))));
// The same in memory, wherever it lies.
using Unaligned [[gnu::may_alias]] =
    float __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
using I = int32_t __attribute__((vector_size(LANES * sizeof(int32_t))));

#undef CVK_INLINE
#define CVK_INLINE CVK_TARGET static inline __attribute__((always_inline))

CVK_INLINE V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }

CVK_INLINE void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

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

// Each of them keeps a NaN.
template <Act ACT>
CVK_INLINE V activate(V y) {
  const V zero = V{}, six = V{} + 6.0f;
  if constexpr (ACT == Act::SILU) return y / (1.0f + exponential(-y));
  if constexpr (ACT == Act::RELU || ACT == Act::RELU6) y = y < zero ? zero : y;
  if constexpr (ACT == Act::RELU6) y = y > six ? six : y;
  return y;
}
