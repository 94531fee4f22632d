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
  BatchNorm bn;
  Vector bias;
};

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
  static constexpr int COLUMNS = sizeof(T) == 2 ? SLOTS * COLUMNS_IN : S == 1 ? 160 : 120;
  static constexpr int ROW = COLUMNS * PIXEL;
  static constexpr int STAGE = ROWS_IN * ROW;
  static constexpr int ROW_OUT = SLOTS * STRIP * PIXEL;

  // Accesses of 16 bytes of a thread for a row of x, in units of one strip, and for one of out.
  static constexpr int READS = (COLUMNS_IN * PACKS + LANES - 1) / LANES;
  static constexpr int WRITES = (STRIP * PACKS + LANES - 1) / LANES;

  // A thread reads four numbers of the filter at once: the channels of one tap or of two.
  static constexpr int TAPS = 4 / WIDTH;
  static constexpr int TAP_READS = (K + TAPS - 1) / TAPS;  // for a row of the filter
  static __device__ __host__ constexpr int place(int r, int s, int c) {
    return (((r * TAP_READS + s / TAPS) * LANES + c / WIDTH) * TAPS + s % TAPS) * WIDTH + c % WIDTH;
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
  Floats taps[(K * Of::TAP_READS + 1) * Of::LANES];  // and behind them the shift
  float scale[Of::CHANNELS];
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
  uint32_t row_bytes, step_bytes;
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
    row_bytes = call.x_stride_h * sizeof(T);
    step_bytes = threads / PACKS * call.x_stride_w * sizeof(T);
    from = reinterpret_cast<const char*>(x_ptr) +
           (place.n * call.x_stride_n + row * call.x_stride_h + w * call.x_stride_w + channel) *
               static_cast<int64_t>(sizeof(T));
    to = stages + place.unit * span * PIXEL + place.index * PACK;
    step_to = threads * PACK;
    for (int k = 0; k < Of::READS; ++k) {
      const int further = k * (threads / PACKS);
      if (!place.inside || column + further >= span) break;
      const bool reads = w + further >= 0 && w + further < call.W && channel < call.C;
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
    for (int j = 0; j < Of::ROWS_IN; ++j) {
      const bool reads = static_cast<unsigned>(row) < static_cast<unsigned>(H);
#pragma unroll
      for (int k = 0; k < Of::READS; ++k)
        copy_pack_async(to + stage + k * step_to + j * Of::ROW,
                        from + static_cast<uint64_t>(step_bytes) * k, mask, READ << k, reads);
      from += row_bytes;
      ++row;
    }
  }
};

// Writes finished rows from shared memory to out.
template <typename T, int K, int S>
struct Writer {
  using Of = Tile<T, K, S>;
  char* to;  // this thread's first pack of the next row
  uint32_t row_bytes, step_bytes;
  const char* from;
  int step_from;

  __device__ Writer(const Call& call, const Place& place, T* out_ptr, int c, const char* rows,
                    uint32_t& mask) {
    const int threads = call.strips * Of::LANES;
    const int column = place.index / PACKS, pack = place.index % PACKS;
    const int q = place.q + column;
    const int channel = c + pack * (PACK / static_cast<int>(sizeof(T)));
    row_bytes = call.out_stride_h * sizeof(T);
    step_bytes = threads / PACKS * call.out_stride_w * sizeof(T);
    const int64_t p = static_cast<int64_t>(place.band) * call.band_rows;
    to = reinterpret_cast<char*>(out_ptr) +
         (place.n * call.out_stride_n + p * call.out_stride_h + q * call.out_stride_w + channel) *
             static_cast<int64_t>(sizeof(T));
    from = rows + place.unit * call.strips * STRIP * PIXEL + place.index * PACK;
    step_from = threads * PACK;
    for (int k = 0; k < Of::WRITES; ++k) {
      const int further = k * (threads / PACKS);
      if (place.inside && column + further < call.strips * STRIP && q + further < call.Q &&
          channel < call.C)
        mask |= WRITE << k;
    }
  }

  __device__ __forceinline__ void write_step(int half, uint32_t mask, int rows = Of::ROWS_OUT) {
#pragma unroll
    for (int j = 0; j < Of::ROWS_OUT; ++j) {
      if (j >= rows) break;
#pragma unroll
      for (int k = 0; k < Of::WRITES; ++k)
        if (mask & WRITE << k)
          *reinterpret_cast<Pack*>(to + static_cast<uint64_t>(step_bytes) * k) =
              *reinterpret_cast<const Pack*>(from + half + k * step_from + j * Of::ROW_OUT);
      to += row_bytes;
    }
  }
};

// The filter, with the norm's scale and the activation's factor in it, and shift, to shared memory.
// Ends in a barrier.
template <typename T, int K, int S>
__device__ void load_filter(const Call& call, const T* weight_ptr, int c, float factor,
                            Memory<T, K, S>& memory) {
  using Of = Tile<T, K, S>;
  for (int i = threadIdx.x; i < Of::CHANNELS; i += THREADS) {
    Affine<float> affine{0, 0};
    if (c + i < call.C) {
      affine = affine_of<T>(call.bn, c + i);
      affine.shift += call.bias.template at<T>(c + i, 0.0f) * affine.scale;
    }
    memory.scale[i] = affine.scale * factor;
    memory.taps[0].at[Of::place(K, 0, i)] = affine.shift * factor;
  }
  __syncthreads();
  float* taps = memory.taps[0].at;
  for (int i = threadIdx.x; i < K * K * Of::CHANNELS; i += THREADS) {
    const int channel = i % Of::CHANNELS, r = i / Of::CHANNELS / K, s = i / Of::CHANNELS % K;
    float value = 0;
    if (c + channel < call.C)
      value = Number<T>::widen(weight_ptr[r * call.weight_stride_r + s * call.weight_stride_s +
                                          (c + channel) * call.weight_stride_c]);
    taps[Of::place(r, s, channel)] = value * memory.scale[channel];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < K * Of::CHANNELS; i += THREADS) {
    float sum = 0;
    for (int s = 0; s < K; ++s)
      sum += taps[Of::place(i / Of::CHANNELS, s, i % Of::CHANNELS)] * 0.0f;
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
    const Floats shift = taps[K * Of::TAP_READS * Of::LANES];
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
        if (m % 2) __syncwarp();
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const Floats four = taps[(r * Of::TAP_READS + s / Of::TAPS) * Of::LANES];
#pragma unroll
          for (int q = 0; q < STRIP; ++q)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
              current[m][q][i] =
                  fmaf(x[q * S + s][i], four.at[s % Of::TAPS * WIDTH + i], current[m][q][i]);
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

// out = act(depthwise(x) * scale + shift), and parts[n, band, tile, c] the sums of out over a unit.
//
// A thread walks down its strip of STRIP columns for WIDTH channels. Each row of x is in registers
// once, as float32, and adds to the K / S output rows that it belongs to. Rows of x come to shared
// memory ahead of their use, and rows of out leave by it, so that all accesses have 16 bytes. Reads
// x once, but for what neighbouring bands and tiles share, and writes out once.
template <typename T, int K, int S, int BLOCKS, bool SQUEEZE, typename Activation>
__global__ void __launch_bounds__(THREADS, BLOCKS)
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
  Writer<T, K, S> writer(call, place, out_ptr, c, rows_out, mask);
  int to_read = steps.begin, stage_to = 0;
  const auto read_ahead = [&] {
    if (to_read < steps.end) reader.read_step(stage_to, mask);
    to_read += Of::ROWS_OUT;
    stage_to = stage_to == (Of::STAGES - 1) * Of::STAGE ? 0 : stage_to + Of::STAGE;
    __pipeline_commit();
  };
#pragma unroll 1
  for (int i = 1; i < Of::STAGES; ++i) read_ahead();
  load_filter<T, K, S>(call, weight_ptr, c, Activation::SCALE, memory);

  Window<T, K, S, SQUEEZE> window{};
  const int slot = threadIdx.x / Of::LANES, channel = place.lane * Of::WIDTH;
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
    read_ahead();
    if (FINISHES && t > 0) writer.write_step(HALF - half, mask);
#pragma unroll(FINISHES ? Of::ROWS_OUT : 1)
    for (int j = 0; j < Of::ROWS_OUT; ++j)
      window.template row<FINISHES>(x_strip + stage + j * S * Of::ROW, taps, activation,
                                    t + j < steps.rows ? mask : 0,
                                    out_strip + half + j * Of::ROW_OUT, sums);
    half = HALF - half;
    stage = stage == (Of::STAGES - 1) * Of::STAGE ? 0 : stage + Of::STAGE;
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

  if constexpr (SQUEEZE) {
    __syncthreads();
    if (!place.inside || place.strip != 0 || c + channel >= call.C) return;
    const int64_t part = (place.n * call.all_bands + place.band) * call.tiles + place.tile;
#pragma unroll
    for (int i = 0; i < Of::WIDTH; ++i) {
      float sum = 0;
      for (int s = 0; s < call.strips; ++s)
        sum += memory.sums[(threadIdx.x + s * Of::LANES) * Of::WIDTH + i];
      parts_ptr[part * call.C + c + channel + i] = sum;
    }
  }
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
