// The inner loops of depthwise_conv_bn_act, included once for each instruction set: see isa.h.

// What a number, or a vector of them, of x stands for.
template <typename T, typename X>
CVK_INLINE X meant(const Problem& problem, X x) {
  return std::is_same_v<T, uint8_t> ? x - problem.x_zero : x;
}

// BLOCK channels as floats.
template <typename T>
CVK_INLINE void load_block(const Problem& problem, const T* from, float* to) {
  for (int c = 0; c < BLOCK; c += LANES) store(to + c, meant<T>(problem, load(from + c)));
}

// One row of x into scratch[blocks][scratch width][BLOCK], as floats; the padding is not written.
template <typename T>
CVK_TARGET static void load_row(const Problem& problem, const Task& task, const T* x,
                                float* scratch) {
  const int64_t block_size = problem.scratch_width() * BLOCK;
  const int64_t W = problem.W, stride_w = problem.x_stride_w, stride_c = problem.x_stride_c;
  const int64_t spread = problem.spread;
  x += task.block_begin * BLOCK * stride_c;
  scratch += problem.padding_w * BLOCK;
  const int64_t channels = std::min(task.block_end * BLOCK, problem.C) - task.block_begin * BLOCK;
  const int64_t whole = stride_c == 1 ? channels / BLOCK : 0;
  for (int64_t iw = 0; iw < W; iw += spread) {
    const auto* from = x + iw / spread * stride_w;
    float* to = scratch + iw * BLOCK;
    for (int64_t b = 0; b < whole; ++b, from += BLOCK, to += block_size)
      load_block<T>(problem, from, to);
  }
  for (int64_t c = whole * BLOCK; c < channels; ++c) {
    const auto* from = x + c * stride_c;
    float* to = scratch + c / BLOCK * block_size + c % BLOCK;
    for (int64_t iw = 0; iw < W; iw += spread)
      to[iw * BLOCK] = meant<T>(problem, Number<T>::widen(from[iw / spread * stride_w]));
  }
}

// What follows is unrolled by recursion: an array that a loop indexes would not live in registers.

// What a product of an input column with a tap, or with the gradient in an output column, is added
// to.
enum class Sums { COLUMNS, TAPS };

// columns[i] += x * taps[s], or taps[s] += x * columns[i], for input column J and all taps s by
// which output column i = (J - s) / STRIDE reads it.
template <Sums SUMS, int K, int STRIDE, int COLUMNS, int J, int TAP = 0>
CVK_INLINE void add_taps(V* columns, V x, V* taps) {
  if constexpr (TAP < K) {
    constexpr int ahead = J - TAP;
    if constexpr (ahead >= 0 && ahead % STRIDE == 0 && ahead / STRIDE < COLUMNS) {
      if constexpr (SUMS == Sums::COLUMNS)
        columns[ahead / STRIDE] += x * taps[TAP];
      else
        taps[TAP] += x * columns[ahead / STRIDE];
    }
    add_taps<SUMS, K, STRIDE, COLUMNS, J, TAP + 1>(columns, x, taps);
  }
}

template <Sums SUMS, int K, int STRIDE, int COLUMNS, int J = 0>
CVK_INLINE void add_filter_row(V* columns, const float* x, V* taps) {
  if constexpr (J < (COLUMNS - 1) * STRIDE + K) {
    add_taps<SUMS, K, STRIDE, COLUMNS, J>(columns, load(x + J * BLOCK), taps);
    add_filter_row<SUMS, K, STRIDE, COLUMNS, J + 1>(columns, x, taps);
  }
}

template <int COUNT, int INDEX = 0>
CVK_INLINE void clear_each(V* values) {
  if constexpr (INDEX < COUNT) {
    values[INDEX] = V{};
    clear_each<COUNT, INDEX + 1>(values);
  }
}

template <int COUNT, int INDEX = 0>
CVK_INLINE void load_blocks(V* values, const float* from) {
  if constexpr (INDEX < COUNT) {
    values[INDEX] = load(from + INDEX * BLOCK);
    load_blocks<COUNT, INDEX + 1>(values, from);
  }
}

template <int COUNT, int INDEX = 0>
CVK_INLINE void add_each(V* values, const V* others) {
  if constexpr (INDEX < COUNT) {
    values[INDEX] += others[INDEX];
    add_each<COUNT, INDEX + 1>(values, others);
  }
}

template <int COUNT, int INDEX = 0>
CVK_INLINE void store_blocks(const V* values, float* to) {
  if constexpr (INDEX < COUNT) {
    store(to + INDEX * BLOCK, values[INDEX]);
    store_blocks<COUNT, INDEX + 1>(values, to);
  }
}

template <int COUNT, int INDEX = 0>
CVK_INLINE void store_each(const V* values, float* to) {
  if constexpr (INDEX < COUNT) {
    store(to + INDEX * LANES, values[INDEX]);
    store_each<COUNT, INDEX + 1>(values, to);
  }
}

// How y is stored as a T.
template <typename T>
CVK_INLINE V stored(const Problem& problem, V y) {
  if constexpr (!std::is_same_v<T, uint8_t>) return y;
  const V low = V{}, high = V{} + 255.0f;
  y = fused(y, V{} + problem.out_scale, V{} + problem.out_zero);
  y = y < low ? low : y;
  return y > high ? high : y;
}

// out = act(row * scale + shift) for the first `kept` channels of a row's pixels; returns their
// sum. A loop of its own, so that act's constants stay in registers.
template <Act ACT, typename T>
CVK_INLINE V finish_row_by(const Problem& problem, const float* row, V scale, V shift, int64_t kept,
                           T* out) {
  V sum = V{};
  for (int64_t q = 0; q < problem.Q; ++q, row += LANES, out += problem.C) {
    const V y = activate<ACT, T>(fused(load(row), scale, shift));
    sum += y;
    if (kept == LANES)
      store(out, stored<T>(problem, y));
    else
      store_some(out, stored<T>(problem, y), kept);
  }
  return sum;
}

// unfinished[padded Q, LANES]: the sums of products of one row of out, COLUMNS pixels at a time in
// registers. It depends on no type, and finish_row on no filter: each is compiled once for all of
// the other's.
template <int K, int STRIDE, int COLUMNS>
CVK_TARGET static void multiply_row(int64_t Q, const float* const* rows, int64_t lane,
                                    const float* weight, float* unfinished) {
  for (int64_t q = 0; q < Q; q += COLUMNS) {
    V acc[COLUMNS], w[K];
    clear_each<COLUMNS>(acc);
#pragma GCC unroll 1
    for (int r = 0; r < K; ++r) {
      load_blocks<K>(w, weight + r * K * BLOCK + lane);
      add_filter_row<Sums::COLUMNS, K, STRIDE, COLUMNS>(acc, rows[r] + q * STRIDE * BLOCK + lane,
                                                        w);
    }
    store_each<COLUMNS>(acc, unfinished + q * LANES);
  }
}

template <int K>
auto select_multiply_row(const Problem& problem) {
  const auto columns = problem.columns();
#define CVK_COLUMNS(STRIDE)                     \
  (columns == 8   ? &multiply_row<K, STRIDE, 8> \
   : columns == 7 ? &multiply_row<K, STRIDE, 7> \
                  : &multiply_row<K, STRIDE, 6>)
  return problem.stride == 1 ? CVK_COLUMNS(1) : CVK_COLUMNS(2);
#undef CVK_COLUMNS
}

template <typename T>
CVK_TARGET static V finish_row(const Problem& problem, const float* row, V scale, V shift,
                               int64_t kept, T* out) {
  switch (problem.act) {
    case Act::NONE:
      return finish_row_by<Act::NONE>(problem, row, scale, shift, kept, out);
    case Act::RELU:
      return finish_row_by<Act::RELU>(problem, row, scale, shift, kept, out);
    case Act::RELU6:
      return finish_row_by<Act::RELU6>(problem, row, scale, shift, kept, out);
    case Act::SILU:
      return finish_row_by<Act::SILU>(problem, row, scale, shift, kept, out);
  }
  return V{};
}

// The K rows of x that row p of out reads, of a ring of them in scratch, which holds K + 1 rows,
// zero but for what load_row writes; the last is a row of zeros. `next` is the first row of x that
// the ring has not had.
template <typename T, int K>
CVK_TARGET static void find_rows(const Problem& problem, const Task& task, const T* x, int64_t p,
                                 float* scratch, int64_t row_size, int64_t& next,
                                 const float** ring) {
  for (int r = 0; r < K; ++r) {
    const int64_t ih = p * problem.stride - problem.padding_h + r;
    const bool inside = ih >= 0 && ih < problem.H && ih % problem.spread == 0;
    float* row = scratch + (inside ? ih % K : K) * row_size;
    if (inside && ih >= next) {
      load_row<T>(problem, task, x + ih / problem.spread * problem.x_stride_h, row);
      next = ih + 1;
    }
    ring[r] = row;
  }
}

// One task: its band of output rows, from a ring of K rows of x in scratch. sums[blocks][BLOCK] of
// the task.
template <typename T, int K>
CVK_TARGET static void make_band(const Problem& problem, const Task& task, const void* x_data,
                                 const float* weight, const float* affine, void* out_data,
                                 float* scratch, float* unfinished, float* sums) {
  const auto multiply = select_multiply_row<K>(problem);
  const int64_t block_size = problem.scratch_width() * BLOCK;
  const int64_t row_size = problem.group() * block_size;
  const T* x = static_cast<const T*>(x_data) + task.n * problem.x_stride_n;
  T* out = static_cast<T*>(out_data) + task.n * problem.P * problem.Q * problem.C;
  const int64_t first = task.band * Problem::BAND;
  const int64_t last = std::min(problem.P, first + Problem::BAND);
  int64_t next = 0;
  for (int64_t p = first; p < last; ++p) {
    const float* ring[K];
    find_rows<T, K>(problem, task, x, p, scratch, row_size, next, ring);
    for (int64_t b = task.block_begin; b < task.block_end; ++b) {
      const int64_t local = b - task.block_begin, count = std::min(BLOCK, problem.C - b * BLOCK);
      const float* rows[K];
      for (int r = 0; r < K; ++r) rows[r] = ring[r] + local * block_size;
      const float* scale = affine + b * BLOCK;
      const float* shift = affine + (problem.blocks() + b) * BLOCK;
      T* row_out = out + p * problem.Q * problem.C + b * BLOCK;
      float* sum = sums + local * BLOCK;
      for (int64_t lane = 0; lane < count; lane += LANES) {
        multiply(problem.Q, rows, lane, weight + b * K * K * BLOCK, unfinished);
        const int64_t kept = std::min<int64_t>(LANES, count - lane);
        store(sum + lane,
              load(sum + lane) + finish_row<T>(problem, unfinished, load(scale + lane),
                                               load(shift + lane), kept, row_out + lane));
      }
    }
  }
}

// Gradients of `width` columns of `count` channels, and zeros past them.
template <int COLUMNS, typename T>
CVK_INLINE void load_gradients(const T* from, int64_t stride, int64_t width, int64_t kept, V* to) {
  for (int i = 0; i < COLUMNS; ++i) {
    if (i >= width)
      to[i] = V{};
    else
      to[i] = kept >= LANES ? load(from + i * stride) : load_some(from + i * stride, kept);
  }
}

// One task: the sums over its band of rows of grad[N, P, Q, C], to sums[blocks][K][K][BLOCK].
template <typename T, int K, int STRIDE>
CVK_TARGET static void add_band(const Problem& problem, const Task& task, const void* x_data,
                                const void* grad_data, float* scratch, float* sums) {
  constexpr int COLUMNS = STRIDE == 1 ? Problem::GRADIENTS : Problem::GRADIENTS / 2;
  const int64_t block_size = problem.scratch_width() * BLOCK;
  const int64_t row_size = problem.group() * block_size, C = problem.C, Q = problem.Q;
  const T* x = static_cast<const T*>(x_data) + task.n * problem.x_stride_n;
  const T* grad = static_cast<const T*>(grad_data) + task.n * problem.P * Q * C;
  const int64_t first = task.band * Problem::BAND;
  const int64_t last = std::min(problem.P, first + Problem::BAND);
  int64_t next = 0;
  for (int64_t p = first; p < last; ++p) {
    const float* ring[K];
    find_rows<T, K>(problem, task, x, p, scratch, row_size, next, ring);
    for (int64_t b = task.block_begin; b < task.block_end; ++b) {
      const int64_t local = b - task.block_begin, count = std::min(BLOCK, C - b * BLOCK);
      for (int64_t lane = 0; lane < count; lane += LANES) {
        const T* of_row = grad + p * Q * C + b * BLOCK + lane;
        for (int r = 0; r < K; ++r) {
          V row[K], total[K];
          clear_each<K>(row);
          for (int64_t q = 0; q < Q; q += COLUMNS) {
            V of_columns[COLUMNS];
            load_gradients<COLUMNS>(of_row + q * C, C, Q - q, count - lane, of_columns);
            add_filter_row<Sums::TAPS, K, STRIDE, COLUMNS>(
                of_columns, ring[r] + local * block_size + q * STRIDE * BLOCK + lane, row);
          }
          float* const to = sums + (local * K + r) * K * BLOCK + lane;
          load_blocks<K>(total, to);
          add_each<K>(total, row);
          store_blocks<K>(total, to);
        }
      }
    }
  }
}

template <typename T>
auto select_gradient(const Problem& problem) {
  if (problem.kernel == 3) return problem.stride == 1 ? &add_band<T, 3, 1> : &add_band<T, 3, 2>;
  return problem.stride == 1 ? &add_band<T, 5, 1> : &add_band<T, 5, 2>;
}

template <typename T>
auto select(const Problem& problem) {
  return problem.kernel == 3 ? &make_band<T, 3> : &make_band<T, 5>;
}
