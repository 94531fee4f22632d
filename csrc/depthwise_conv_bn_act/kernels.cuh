// The kernels of depthwise_conv_bn_act. CUDA only, no torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>

#include "common/affine.h"
#include "common/async_copy.cuh"
#include "common/cuda_launch.cuh"
#include "common/fast_act.cuh"
#include "common/number.h"

namespace cvkernels::depthwise_conv_bn_act {

constexpr int THREADS = 128;
constexpr int STRIP = 7;   // output columns of a thread: 7, 14, 28, 56 and 112 are whole strips
constexpr int PIXEL = 64;  // bytes of a pixel that a block has: its channels
constexpr int PACK = sizeof(Pack);
constexpr int PACKS = PIXEL / PACK;

// A call, and how it is cut. A unit is a band of rows of one image and of one tile of its columns,
// `strips` strips wide; a block has the units of some images and, where those are few, of some
// bands of as many rows. Strides are in elements.
struct Call {
  int64_t N;
  int C, H, W, P, Q;
  int padding_h, padding_w;
  int64_t x_stride_n, x_stride_h, x_stride_w;
  int64_t out_stride_n, out_stride_h, out_stride_w;
  int64_t weight_stride_r, weight_stride_s, weight_stride_c;
  int strips, images, bands, band_rows;
  int tiles, channel_blocks, all_bands;  // of the whole
  // Bytes between the rows of a map, and between the packs that a thread accesses one after
  // another.
  uint32_t x_row_bytes, x_pack_bytes, out_row_bytes, out_pack_bytes;
  BatchNorm bn;
  Vector bias;
};

template <typename Byte>
__device__ __forceinline__ Byte* further(Byte* from, uint32_t step, uint32_t times) {
  return from + static_cast<uint64_t>(step) * times;
}

// 32 bits of T, as float32 and back.
template <typename T>
struct Word;

template <>
struct Word<bfloat16> {
  static constexpr int COUNT = 2;
  static __device__ __forceinline__ void widen(uint32_t word, float* to) {
    to[0] = bits_as<float>(word << 16);
    to[1] = bits_as<float>(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t narrow(const float* from) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(from[0], from[1]));
  }
};

template <>
struct Word<float16> {
  static constexpr int COUNT = 2;
  static __device__ __forceinline__ void widen(uint32_t word, float* to) {
    const __half2 pair = bits_as<__half2>(word);
    to[0] = __low2float(pair);
    to[1] = __high2float(pair);
  }
  static __device__ __forceinline__ uint32_t narrow(const float* from) {
    return bits_as<uint32_t>(__floats2half2_rn(from[0], from[1]));
  }
};

template <>
struct Word<float> {
  static constexpr int COUNT = 1;
  static __device__ __forceinline__ void widen(uint32_t word, float* to) {
    *to = __uint_as_float(word);
  }
  static __device__ __forceinline__ uint32_t narrow(const float* from) {
    return __float_as_uint(*from);
  }
};

// A thread's channels of one pixel.
template <int WORDS>
struct alignas(4 * WORDS) Words {
  uint32_t at[WORDS];
};

// How the kernel for elements T, a K x K filter and the stride S is cut.
template <typename T, int K, int S>
struct Tile {
  static constexpr int CHANNELS = PIXEL / sizeof(T);
  // Channels of a thread: four where their sums fit the registers.
  static constexpr int WIDTH = sizeof(T) == 2 && K == 3 && S == 1 ? 4 : 2;
  static constexpr int LANES = CHANNELS / WIDTH;
  static constexpr int SLOTS = THREADS / LANES;  // strips of a block
  static constexpr int WORDS = WIDTH / Word<T>::COUNT;

  // Blocks that a multiprocessor holds at least: 16 warps, where no register is spilled for it.
  static constexpr int BLOCKS = sizeof(T) == 4 && K == 5 && S == 2 ? 3 : 4;

  // Output rows of a step, and rows of x that end them.
  static constexpr int ROWS_OUT = sizeof(T) == 2 && K == 5 && S == 1 ? 2 : 1;
  static constexpr int ROWS_IN = ROWS_OUT * S;
  // Output rows that have begun before a step.
  static constexpr int CARRIED = (K - 1) / S;
  // Steps' rows of x in shared memory: one that is read, the others on their way.
  static constexpr int STAGES = ROWS_IN == 1 ? 3 : 2;

  static constexpr int COLUMNS_IN = (STRIP - 1) * S + K;
  static __device__ __host__ constexpr int span(int strips) { return (strips * STRIP - 1) * S + K; }
  // Columns of x that a row of shared memory holds: those of units of one strip, or what fits.
  static constexpr int COLUMNS = sizeof(T) == 2 ? SLOTS * COLUMNS_IN : S == 1 ? 152 : 119;
  static constexpr int ROW = COLUMNS * PIXEL;
  static constexpr int STAGE = ROWS_IN * ROW;
  static constexpr int ROW_OUT = SLOTS * STRIP * PIXEL;

  static __device__ __forceinline__ int behind(int stage) {
    if (STAGES == 2) return STAGE - stage;
    return stage == (STAGES - 1) * STAGE ? 0 : stage + STAGE;
  }
  static __device__ __forceinline__ int before(int stage) {
    if (STAGES == 2) return STAGE - stage;
    return stage == 0 ? (STAGES - 1) * STAGE : stage - STAGE;
  }

  // Accesses of 16 bytes of a thread for a row of x, in units of one strip, and for one of out.
  static constexpr int READS = (COLUMNS_IN * PACKS + LANES - 1) / LANES;
  static constexpr int WRITES = (STRIP * PACKS + LANES - 1) / LANES;

  // A thread reads four numbers of the filter at once: the channels of one tap or of two, from the
  // last row to the first, as it uses them; only the last row has no neighbour in its last four.
  static constexpr int TAPS = 4 / WIDTH;
  static constexpr int TAP_READS = (K * K + 2 * (TAPS - 1)) / TAPS;
  static __device__ __host__ constexpr int tap(int r, int s) {
    return r == K - 1 ? s : K + (TAPS - 1) + (K - 2 - r) * K + s;
  }
  static __device__ __host__ constexpr int place(int tap, int c) {
    return ((tap / TAPS * LANES + c / WIDTH) * TAPS + tap % TAPS) * WIDTH + c % WIDTH;
  }
};

struct alignas(16) Floats {
  float at[4];
};

// Shared memory of a block.
template <typename T, int K, int S>
struct Memory {
  using Of = Tile<T, K, S>;
  Pack x[Of::STAGES * Of::STAGE / PACK];
  Pack out[2 * Of::ROWS_OUT * Of::ROW_OUT / PACK];
  Floats taps[(Of::TAP_READS + 1) * Of::LANES];  // and behind them the shift
  float scale[Of::CHANNELS];
  int64_t part[THREADS];            // where a thread's sums go, or -1
  float sums[THREADS * Of::WIDTH];  // of out, in a thread's columns
  float outside[K * Of::CHANNELS];  // what the filter's rows add to it outside x: 0, or NaN
};

// The unit and the strip of a thread.
struct Place {
  int64_t n;
  int band, tile, unit, strip, lane;
  int index;  // among the unit's threads
  int q;      // the unit's first output column
  bool inside;

  template <int LANES>
  static __device__ Place of(const Call& call, unsigned group, unsigned first_band) {
    Place place;
    const int slot = threadIdx.x / LANES, units = call.images * call.bands;
    place.lane = threadIdx.x % LANES;
    place.unit = slot / call.strips;
    place.strip = slot % call.strips;
    place.index = place.strip * LANES + place.lane;
    place.tile = group % call.tiles;
    place.q = place.tile * call.strips * STRIP;
    place.inside = place.unit < units;
    if (!place.inside) place.unit = 0;
    place.n = static_cast<int64_t>(group / call.tiles) * call.images + place.unit % call.images;
    place.band = first_band + place.unit / call.images;
    place.inside = place.inside && place.n < call.N && place.band < call.all_bands;
    return place;
  }
};

// In uniform registers, which min() and max() are not.
__device__ __forceinline__ int smaller_of(int a, int b) {
#if defined(__CUDA_ARCH__)
  int smaller;
  asm("{\n\t.reg .pred less;\n\tsetp.lt.s32 less, %1, %2;\n\tselp.s32 %0, %1, %2, less;\n\t}"
      : "=r"(smaller)
      : "r"(a), "r"(b));
  return smaller;
#else
  return a < b ? a : b;
#endif
}

__device__ __forceinline__ int larger_of(int a, int b) { return -smaller_of(-a, -b); }

// The steps of a block, by the first output row of the band that they end. Those before `begin` and
// from `end` on read rows outside x alone.
struct Steps {
  int begin, end, rows;

  template <int S, int ROWS_OUT>
  static __device__ Steps of(const Call& call, int band, int warm_up, int ahead) {
    constexpr int ROWS_IN = S * ROWS_OUT;
    const int p = band * call.band_rows;
    const int rows = smaller_of(call.band_rows, call.P - p);
    const int all = (rows + warm_up + ROWS_OUT - 1) / ROWS_OUT;
    const int row = (p - warm_up) * S - call.padding_h + ahead;  // of the first step
    const bool alike = call.bands == 1;
    const int before = alike ? smaller_of(larger_of(-row, 0) / ROWS_IN, all) : 0;
    const int until = larger_of(call.H - row + ROWS_IN - 1, 0) / ROWS_IN;
    return {before * ROWS_OUT - warm_up,
            (alike ? larger_of(before, smaller_of(until, all)) : all) * ROWS_OUT - warm_up, rows};
  }
};

// The lowest bits of what a thread does: which packs it reads, which it writes, and which columns
// of its strip are inside out.
constexpr uint32_t READ = 1, WRITE = 1 << 16, COLUMN = 1 << 24;

// Brings rows of x to shared memory, and zeros for what is outside of it.
template <typename T, int K, int S>
struct Reader {
  using Of = Tile<T, K, S>;
  const char* from;  // this thread's first pack of the next row
  uint32_t row_bytes, pack_bytes;
  char* to;
  int step_to;
  int row, H;

  // Sets in `mask` which of this thread's packs are inside x, as multiples of READ.
  __device__ Reader(const Call& call, const Place& place, const T* x_ptr, int c, char* stages,
                    int first_row, uint32_t& mask) {
    const int threads = call.strips * Of::LANES, span = Of::span(call.strips);
    const int column = place.index / PACKS, pack = place.index % PACKS;
    const int w = place.q * S - call.padding_w + column;
    const int channel = c + pack * (PACK / static_cast<int>(sizeof(T)));
    row = first_row, H = call.H;
    row_bytes = call.x_row_bytes, pack_bytes = call.x_pack_bytes;
    from = reinterpret_cast<const char*>(x_ptr) +
           (place.n * call.x_stride_n + row * call.x_stride_h + w * call.x_stride_w + channel) *
               static_cast<int64_t>(sizeof(T));
    to = stages + place.unit * span * PIXEL + place.index * PACK;
    step_to = threads * PACK;
    for (int k = 0; k < Of::READS; ++k) {
      const int beyond = k * (threads / PACKS);
      if (!place.inside || column + beyond >= span) break;
      const bool reads = w + beyond >= 0 && w + beyond < call.W && channel < call.C;
      if (reads) {
        mask |= READ << k;
        continue;
      }
      for (int r = 0; r < Of::STAGES * Of::ROWS_IN; ++r)
        *reinterpret_cast<Pack*>(to + r * Of::ROW + k * step_to) = Pack{};
    }
  }

  __device__ __forceinline__ void read_step(int stage, uint32_t mask) {
#pragma unroll
    for (int k = 0; k < Of::READS; ++k)
#pragma unroll
      for (int j = 0; j < Of::ROWS_IN; ++j)
        copy_pack_async(to + stage + k * step_to + j * Of::ROW,
                        further(further(from, row_bytes, j), pack_bytes, k), mask, READ << k,
                        static_cast<unsigned>(row + j) < static_cast<unsigned>(H));
    from = further(from, row_bytes, Of::ROWS_IN);
    row += Of::ROWS_IN;
  }
};

// Writes finished rows from shared memory to out.
template <typename T, int K, int S>
struct Writer {
  using Of = Tile<T, K, S>;
  char* to;  // this thread's first pack of the next row
  uint32_t row_bytes, pack_bytes;
  const char* from;
  int step_from;

  __device__ Writer(const Call& call, const Place& place, T* out_ptr, int c, const char* rows,
                    uint32_t& mask) {
    const int threads = call.strips * Of::LANES;
    const int column = place.index / PACKS, pack = place.index % PACKS;
    const int q = place.q + column;
    const int channel = c + pack * (PACK / static_cast<int>(sizeof(T)));
    row_bytes = call.out_row_bytes, pack_bytes = call.out_pack_bytes;
    const int64_t p = static_cast<int64_t>(place.band) * call.band_rows;
    to = reinterpret_cast<char*>(out_ptr) +
         (place.n * call.out_stride_n + p * call.out_stride_h + q * call.out_stride_w + channel) *
             static_cast<int64_t>(sizeof(T));
    from = rows + place.unit * call.strips * STRIP * PIXEL + place.index * PACK;
    step_from = threads * PACK;
    for (int k = 0; k < Of::WRITES; ++k) {
      const int beyond = k * (threads / PACKS);
      if (place.inside && column + beyond < call.strips * STRIP && q + beyond < call.Q &&
          channel < call.C)
        mask |= WRITE << k;
    }
  }

  __device__ __forceinline__ void write_step(int half, uint32_t mask, int rows = Of::ROWS_OUT) {
#pragma unroll
    for (int j = 0; j < Of::ROWS_OUT; ++j) {
      if (j >= rows) break;
#pragma unroll
      for (int k = 0; k < Of::WRITES; ++k) {
        // Read by all, so that the write alone is predicated.
        const Pack pack =
            *reinterpret_cast<const Pack*>(from + half + k * step_from + j * Of::ROW_OUT);
        if (mask & WRITE << k)
          *reinterpret_cast<Pack*>(further(further(to, row_bytes, j), pack_bytes, k)) = pack;
      }
    }
    to = further(to, row_bytes, Of::ROWS_OUT);
  }
};

// The filter, with the norm's scale and the activation's factor in it, and shift, to shared memory.
// Ends in a barrier.
template <typename T, int K, int S>
__device__ void load_filter(const Call& call, const T* weight_ptr, int c, float factor,
                            Memory<T, K, S>& memory) {
  using Of = Tile<T, K, S>;
  if (const int i = threadIdx.x; i < Of::CHANNELS) {
    Affine<float> affine{0, 0};
    if (c + i < call.C) {
      affine = affine_of<T>(call.bn, c + i);
      affine.shift += call.bias.template at<T>(c + i, 0.0f) * affine.scale;
    }
    memory.scale[i] = affine.scale * factor;
    memory.taps[0].at[Of::place(Of::TAP_READS * Of::TAPS, i)] = affine.shift * factor;
  }
  __syncthreads();
  float* taps = memory.taps[0].at;
  for (int i = threadIdx.x; i < K * K * Of::CHANNELS; i += THREADS) {
    const int channel = i % Of::CHANNELS, r = i / Of::CHANNELS / K, s = i / Of::CHANNELS % K;
    float value = 0;
    if (c + channel < call.C)
      value = Number<T>::widen(weight_ptr[r * call.weight_stride_r + s * call.weight_stride_s +
                                          (c + channel) * call.weight_stride_c]);
    taps[Of::place(Of::tap(r, s), channel)] = value * memory.scale[channel];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < K * Of::CHANNELS; i += THREADS) {
    float sum = 0;
    for (int s = 0; s < K; ++s)
      sum += taps[Of::place(Of::tap(i / Of::CHANNELS, s), i % Of::CHANNELS)] * 0.0f;
    memory.outside[i] = sum;
  }
  __syncthreads();
}

// sums += numbers where mask has the bit: predicated, where a condition would be a branch.
template <int WIDTH>
__device__ __forceinline__ void add_where(uint32_t mask, uint32_t bit, float (&sums)[WIDTH],
                                          const float (&numbers)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
#if defined(__CUDA_ARCH__)
    asm("{\n\t"
        ".reg .pred adds;\n\t"
        ".reg .b32 masked;\n\t"
        "and.b32 masked, %1, %2;\n\t"
        "setp.ne.b32 adds, masked, 0;\n\t"
        "@adds add.f32 %0, %0, %3;\n\t"
        "}"
        : "+f"(sums[i])
        : "r"(mask), "r"(bit), "f"(numbers[i]));
#else
    if (mask & bit) sums[i] += numbers[i];
#endif
  }
}

// What a thread keeps from step to step.
template <typename T, int K, int S, bool SQUEEZE>
struct Window {
  using Of = Tile<T, K, S>;
  static constexpr int WIDTH = Of::WIDTH;
  struct alignas(4 * WIDTH) Sums {
    float at[WIDTH];
  };
  float carried[Of::CARRIED][STRIP][WIDTH];  // output rows that have begun

  // The rows that begin, and those that go on, without what the rows of x add.
  __device__ __forceinline__ void begin(float (&current)[Of::CARRIED + 1][STRIP][WIDTH],
                                        const Floats* taps) const {
    const Floats shift = taps[Of::TAP_READS * Of::LANES];
#pragma unroll
    for (int q = 0; q < STRIP; ++q)
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
        for (int m = 0; m < Of::CARRIED; ++m) current[m][q][i] = carried[m][q][i];
        current[Of::CARRIED][q][i] = shift.at[i];
      }
  }

  // The first row's activations to shared memory, and those of the columns `which` to the sums.
  template <typename Activation>
  __device__ __forceinline__ void finish(float (&row)[STRIP][WIDTH], Activation activation,
                                         uint32_t which, char* to, Sums* sums_ptr) {
    [[maybe_unused]] float of_row[WIDTH];
#pragma unroll
    for (int q = 0; q < STRIP; ++q) {
      Words<Of::WORDS> words;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) row[q][i] = activation(row[q][i]);
      if constexpr (SQUEEZE) {
        if (q == 0) {
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) of_row[i] = row[0][i];
        } else {
          add_where(which, COLUMN << q, of_row, row[q]);
        }
      }
#pragma unroll
      for (int i = 0; i < Of::WORDS; ++i)
        words.at[i] = Word<T>::narrow(&row[q][i * Word<T>::COUNT]);
      *reinterpret_cast<Words<Of::WORDS>*>(to + q * PIXEL) = words;
    }
    if constexpr (SQUEEZE) {
      Sums sums = *sums_ptr;
      add_where(which, COLUMN, sums.at, of_row);
      *sums_ptr = sums;
    }
  }

  // The other rows move up.
  __device__ __forceinline__ void end(const float (&current)[Of::CARRIED + 1][STRIP][WIDTH]) {
#pragma unroll
    for (int m = 0; m < Of::CARRIED; ++m)
#pragma unroll
      for (int q = 0; q < STRIP; ++q)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) carried[m][q][i] = current[m + 1][q][i];
  }

  // One output row ends with S rows of x, `rows` at this thread's first column.
  // Where not FINISHES, it is a row before the band, which the others move past.
  template <bool FINISHES, typename Activation>
  __device__ __forceinline__ void row(const char* rows, const Floats* taps, Activation activation,
                                      uint32_t which, char* to, Sums* sums) {
    float current[Of::CARRIED + 1][STRIP][WIDTH];
    begin(current, taps);
#pragma unroll
    for (int j = 0; j < S; ++j) {
      float x[Of::COLUMNS_IN][WIDTH];
#pragma unroll
      for (int w = 0; w < Of::COLUMNS_IN; ++w) {
        const auto words =
            *reinterpret_cast<const Words<Of::WORDS>*>(rows + j * Of::ROW + w * PIXEL);
#pragma unroll
        for (int i = 0; i < Of::WORDS; ++i) Word<T>::widen(words.at[i], &x[w][i * Word<T>::COUNT]);
      }
#pragma unroll
      for (int m = 0; m <= Of::CARRIED; ++m) {
        const int r = K - S + j - m * S;  // the filter's row
        if (r < 0 || r >= K || (m == 0 && !FINISHES)) continue;
        if (m == 1) __syncwarp();
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const int tap = Of::tap(r, s);
          const Floats four = taps[tap / Of::TAPS * Of::LANES];
#pragma unroll
          for (int q = 0; q < STRIP; ++q)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
              current[m][q][i] =
                  fmaf(x[q * S + s][i], four.at[tap % Of::TAPS * WIDTH + i], current[m][q][i]);
        }
        if (m == 0 && j == S - 1) finish(current[0], activation, which, to, sums);
      }
    }
    end(current);
  }

  // The same with S rows outside of x.
  template <typename Activation>
  __device__ __forceinline__ void row_outside(const float* outside, const Floats* taps,
                                              Activation activation, bool finishes, uint32_t which,
                                              char* to, Sums* sums) {
    float current[Of::CARRIED + 1][STRIP][WIDTH];
    begin(current, taps);
#pragma unroll
    for (int m = 0; m <= Of::CARRIED; ++m) {
#pragma unroll
      for (int j = 0; j < S; ++j) {
        const int r = K - S + j - m * S;
        if (r < 0 || r >= K) continue;
#pragma unroll
        for (int q = 0; q < STRIP; ++q)
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) current[m][q][i] += outside[r * Of::CHANNELS + i];
      }
      if (m == 0 && finishes) finish(current[0], activation, which, to, sums);
    }
    end(current);
  }
};

// The sums of a unit's strips, by the threads of its first one.
template <typename T, int K, int S>
__device__ void add_strips(const Memory<T, K, S>& memory, float* parts_ptr, int strips) {
  using Of = Tile<T, K, S>;
  const int64_t part = memory.part[threadIdx.x];
  if (part < 0) return;
#pragma unroll
  for (int i = 0; i < Of::WIDTH; ++i) {
    float sum = 0;
#pragma unroll 1
    for (int strip = 0; strip < strips; ++strip)
      sum += memory.sums[(threadIdx.x + strip * Of::LANES) * Of::WIDTH + i];
    parts_ptr[part + i] = sum;
  }
}

// out = act(depthwise(x) * scale + shift), and parts[n, band, tile, c] the sums of out over a unit.
//
// A thread walks down its strip of STRIP columns for WIDTH channels. Each row of x is in registers
// once, as float32, and adds to the K / S output rows that it belongs to. Rows of x come to shared
// memory ahead of their use, and rows of out leave by it, so that all accesses have 16 bytes. Reads
// x once, but for what neighbouring bands and tiles share, and writes out once.
template <typename T, int K, int S, bool SQUEEZE, typename Activation>
__global__ void __launch_bounds__(THREADS, Tile<T, K, S>::BLOCKS)
    depthwise_conv_bn_act_kernel(const T* __restrict__ x_ptr,       // [N, C, H, W]
                                 const T* __restrict__ weight_ptr,  // [K, K, C]
                                 T* __restrict__ out_ptr,           // [N, C, P, Q]
                                 float* __restrict__ parts_ptr,     // [N, bands, tiles, C]
                                 Call call, Activation activation) {
  using Of = Tile<T, K, S>;
  __shared__ Memory<T, K, S> memory;
  char* const stages = reinterpret_cast<char*>(memory.x);
  char* const rows_out = reinterpret_cast<char*>(memory.out);

  const unsigned channel_blocks = call.channel_blocks;
  const int c = static_cast<int>(blockIdx.x % channel_blocks) * Of::CHANNELS;
  const int first_band = blockIdx.y * call.bands;
  const Place place = Place::of<Of::LANES>(call, blockIdx.x / channel_blocks, first_band);
  constexpr int WARM_UP = (Of::CARRIED + Of::ROWS_OUT - 1) / Of::ROWS_OUT * Of::ROWS_OUT;
  const Steps steps = Steps::of<S, Of::ROWS_OUT>(call, first_band, WARM_UP, K - S);

  const int first_row = (place.band * call.band_rows + steps.begin) * S - call.padding_h + K - S;
  const int inside = place.inside ? call.Q - place.q - place.strip * STRIP : 0;
  uint32_t mask = ((1u << min(max(inside, 0), STRIP)) - 1) * COLUMN;
  Reader<T, K, S> reader(call, place, x_ptr, c, stages, first_row, mask);
  // The rows of the step that begins `t` rows into the band, to their stage.
  const auto read_step = [&](int t, int stage) {
    if (t < steps.end) reader.read_step(stage, mask);
    __pipeline_commit();
  };
  constexpr int AHEAD = Of::STAGES - 1;
#pragma unroll 1
  for (int i = 0; i < AHEAD; ++i) read_step(steps.begin + i * Of::ROWS_OUT, i * Of::STAGE);
  load_filter<T, K, S>(call, weight_ptr, c, Activation::SCALE, memory);
  Writer<T, K, S> writer(call, place, out_ptr, c, rows_out, mask);

  const int slot = threadIdx.x / Of::LANES, channel = place.lane * Of::WIDTH;
  if constexpr (SQUEEZE) {
    const int64_t part = (place.n * call.all_bands + place.band) * call.tiles + place.tile;
    const bool adds = place.inside && place.strip == 0 && c + channel < call.C;
    memory.part[threadIdx.x] = adds ? part * call.C + c + channel : -1;
  }
  Window<T, K, S, SQUEEZE> window{};
  const int lane_bytes = channel * static_cast<int>(sizeof(T));
  const char* x_strip =
      stages + (place.unit * Of::span(call.strips) + place.strip * STRIP * S) * PIXEL + lane_bytes;
  char* out_strip = rows_out + slot * STRIP * PIXEL + lane_bytes;
  const Floats* taps = memory.taps + place.lane;
  // In shared memory, since the registers are few.
  auto* const sums =
      reinterpret_cast<typename Window<T, K, S, SQUEEZE>::Sums*>(memory.sums) + threadIdx.x;
  *sums = {};
  constexpr int HALF = Of::ROWS_OUT * Of::ROW_OUT;
  // The step, and where its rows of x are and its rows of out go.
  int t = -WARM_UP, stage = 0, half = 0;

  const auto step_outside = [&] {
    __syncthreads();
    if (t > 0) writer.write_step(HALF - half, mask);
#pragma unroll
    for (int j = 0; j < Of::ROWS_OUT; ++j)
      window.row_outside(memory.outside + channel, taps, activation, t >= 0,
                         t + j < steps.rows ? mask : 0, out_strip + half + j * Of::ROW_OUT, sums);
    half = HALF - half;
    t += Of::ROWS_OUT;
  };
  const auto step = [&]<bool FINISHES> {
    __pipeline_wait_prior(Of::STAGES - 2);
    __syncthreads();
    read_step(t + AHEAD * Of::ROWS_OUT, Of::before(stage));
    if (FINISHES && t > 0) writer.write_step(HALF - half, mask);
#pragma unroll(FINISHES ? Of::ROWS_OUT : 1)
    for (int j = 0; j < Of::ROWS_OUT; ++j)
      window.template row<FINISHES>(x_strip + stage + j * S * Of::ROW, taps, activation,
                                    t + j < steps.rows ? mask : 0,
                                    out_strip + half + j * Of::ROW_OUT, sums);
    half = HALF - half;
    stage = Of::behind(stage);
    t += Of::ROWS_OUT;
  };
#pragma unroll 1
  while (t < steps.begin) step_outside();
#pragma unroll 1
  while (t < smaller_of(steps.end, 0)) step.template operator()<false>();
#pragma unroll 1
  while (t < steps.end) step.template operator()<true>();
#pragma unroll 1
  while (t < steps.rows) step_outside();
  __syncthreads();
  writer.write_step(HALF - half, mask, steps.rows + Of::ROWS_OUT - t);

  if constexpr (SQUEEZE) add_strips(memory, parts_ptr, call.strips);
}

// sums[n, c] = the sum of parts[n, :, c].
__global__ void __launch_bounds__(THREADS)
    depthwise_conv_bn_act_add_kernel(const float* __restrict__ parts_ptr,  // [N, count, C]
                                     float* __restrict__ sums_ptr,         // [N, C]
                                     int64_t N, int count, int C) {
  over_elements<THREADS, int64_t, true>(N, C, 1, 1, [&](int64_t n, int64_t c, int64_t, int64_t) {
    const float* part = parts_ptr + n * count * C + c;
    float sum = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum += part[static_cast<int64_t>(i) * C];
    sums_ptr[n * C + c] = sum;
  });
}

}  // namespace cvkernels::depthwise_conv_bn_act
