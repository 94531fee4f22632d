// avg_pool on CUDA. Schemas: cvkernels/ops/avg_pool/op.py.
#include "avg_pool.h"
#include "avg_pool_call.h"
#include "check.h"
#include "pool_kernels.h"

namespace cvkernels::avg_pool {
namespace {

// Output rows of one thread at most, which share its channels' scale and shift, where that leaves
// enough blocks for a GPU.
constexpr int64_t ROWS = 8;
constexpr int64_t ENOUGH_BLOCKS = 1024;

// One block pools THREADS packs of an output row, each thread one pack of one pixel, in rows
// gridDim.x apart. Reads each element of x that some window holds once from memory, and again, for
// windows that overlap, from the caches; writes out once.
//
// KERNEL > 0 is a square kernel of that size, all its loads in flight at once. KERNEL == 0 is any
// window.
template <typename T, int KERNEL, bool NORMALISES>
__global__ void __launch_bounds__(THREADS)
    avg_pool_nhwc_kernel(const T* __restrict__ x_ptr,  // [N, C, H, W], channels innermost
                         T* __restrict__ out_ptr,      // [N, C, P, Q], channels innermost
                         Problem problem, Average average) {
  constexpr int LANES = PackPlace<T>::LANES;
  const auto place = PackPlace<T>::of(problem);
  if (!place.inside) return;
  const int q = place.q, c = place.c;

  Affine<float> affine[LANES];
  if constexpr (NORMALISES) {
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) affine[lane] = affine_of<T>(average.bn, c + lane);
  }
  const Taps w = taps_of(problem.w, q);
  const int64_t w_counted = average.counted(problem.w, q, w);

  place.over_rows(problem, [&](int64_t n, int64_t p) {
    const T* x = x_ptr + n * problem.x_stride_n + c;
    const Taps h = taps_of(problem.h, p);
    float sums[LANES] = {};
    const auto load = [&](int64_t ih, int64_t iw) {
      return __ldg(
          reinterpret_cast<const Pack*>(x + ih * problem.x_stride_h + iw * problem.x_stride_w));
    };
    const auto add = [&](const Pack& pack) {
      T elements[LANES];
      memcpy(elements, &pack, sizeof(Pack));
#pragma unroll
      for (int lane = 0; lane < LANES; ++lane) {
        const float element = Number<T>::widen(elements[lane]);
        sums[lane] += NORMALISES ? affine[lane](element, 0.0f) : element;
      }
    };
    if constexpr (KERNEL > 0) {
      Pack taps[KERNEL][KERNEL];
#pragma unroll
      for (int r = 0; r < KERNEL; ++r)
#pragma unroll
        for (int s = 0; s < KERNEL; ++s)
          if (h.begin + r < h.end && w.begin + s < w.end)
            taps[r][s] = load(h.begin + r, w.begin + s);
#pragma unroll
      for (int r = 0; r < KERNEL; ++r)
#pragma unroll
        for (int s = 0; s < KERNEL; ++s)
          if (h.begin + r < h.end && w.begin + s < w.end) add(taps[r][s]);
    } else {
      for (int64_t ih = h.begin; ih < h.end; ++ih)
#pragma unroll 4
        for (int64_t iw = w.begin; iw < w.end; ++iw) add(load(ih, iw));
    }
    const int64_t taps = average.counted(problem.h, p, h) * w_counted;
    T elements[LANES];
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane)
      elements[lane] = Number<T>::narrow(average.of(sums[lane], taps));
    Pack pooled;
    memcpy(&pooled, elements, sizeof(Pack));
    T* out = out_ptr + n * problem.out_stride_n + p * problem.out_stride_h +
             q * problem.out_stride_w + c;
    *reinterpret_cast<Pack*>(out) = pooled;
  });
}

// Any strides: one thread pools one output element.
template <typename T, typename Index, bool CHANNELS_INNER>
__global__ void __launch_bounds__(THREADS)
    avg_pool_strided_kernel(const T* __restrict__ x_ptr,  // [N, C, H, W]
                            T* __restrict__ out_ptr,      // [N, C, P, Q]
                            Problem problem, Average average) {
  over_outputs<Index, CHANNELS_INNER>(problem, [&](int64_t n, int64_t c, int64_t p, int64_t q) {
    const Taps h = taps_of(problem.h, p);
    const Taps w = taps_of(problem.w, q);
    const T* x = x_ptr + n * problem.x_stride_n + c * problem.x_stride_c;
    Affine<float> affine{1.0f, 0.0f};
    if (average.normalises) affine = affine_of<T>(average.bn, c);
    const float lowest = Affine<float>::lowest(average.normalises);
    float sum = 0.0f;
    for (int64_t ih = h.begin; ih < h.end; ++ih)
      for (int64_t iw = w.begin; iw < w.end; ++iw)
        sum +=
            affine(Number<T>::widen(x[ih * problem.x_stride_h + iw * problem.x_stride_w]), lowest);
    const int64_t taps = average.counted(problem.h, p, h) * average.counted(problem.w, q, w);
    out_ptr[n * problem.out_stride_n + c * problem.out_stride_c + p * problem.out_stride_h +
            q * problem.out_stride_w] = Number<T>::narrow(average.of(sum, taps));
  });
}

template <typename T, bool NORMALISES>
void launch_nhwc(const Problem& problem, const Average& average, const T* x, T* out,
                 cudaStream_t stream) {
  const int64_t columns = PackPlace<T>::columns(problem);
  const int64_t rows = problem.N * problem.P;
  const int64_t shared = NORMALISES ? (rows + ROWS - 1) / ROWS : rows;
  const int64_t blocks = std::min(rows, std::max(shared, ENOUGH_BLOCKS / columns));
  const dim3 grid(grid_of(blocks), columns);
  if (problem.h.kernel == 2 && problem.w.kernel == 2)
    avg_pool_nhwc_kernel<T, 2, NORMALISES><<<grid, THREADS, 0, stream>>>(x, out, problem, average);
  else
    avg_pool_nhwc_kernel<T, 0, NORMALISES><<<grid, THREADS, 0, stream>>>(x, out, problem, average);
}

template <typename T>
void launch(Type<T>, const Problem& problem, const Average& average, const void* x_data,
            void* out_data, cudaStream_t stream) {
  const T* x = static_cast<const T*>(x_data);
  T* out = static_cast<T*>(out_data);
  if (PackPlace<T>::takes(problem, x, out))
    average.normalises ? launch_nhwc<T, true>(problem, average, x, out, stream)
                       : launch_nhwc<T, false>(problem, average, x, out, stream);
  else
    launch_over_outputs(problem, [&]<typename Index, bool CHANNELS_INNER>(unsigned grid) {
      avg_pool_strided_kernel<T, Index, CHANNELS_INNER>
          <<<grid, THREADS, 0, stream>>>(x, out, problem, average);
    });
}

void run(const Problem& problem, const Average& average, const Tensor& x, const Tensor& out) {
  const DeviceGuard guard(x.get_device_index());
  if (problem.N == 0) return;
  dispatch_floating("avg_pool", x.scalar_type(), [&](auto type) {
    launch(type, problem, average, x.const_data_ptr(), out.mutable_data_ptr(), current_stream(x));
  });
  CVK_CHECK_LAUNCH("avg_pool");
}

void avg_pool_out(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding,
                  bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& mean, const std::optional<Tensor>& var, double eps,
                  const Tensor& out) {
  CVK_CHECK_CUDA("avg_pool", x);
  Problem problem = problem_of(x, {"avg_pool", kernel_size, stride, padding, UNDILATED, ceil_mode});
  check_out("avg_pool", problem, x, out);
  set_out(problem, out);
  run(problem, average_of(x, {weight, bias, mean, var, eps}, count_include_pad, divisor), x, out);
}

Tensor avg_pool(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding,
                bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& mean, const std::optional<Tensor>& var, double eps) {
  CVK_CHECK_CUDA("avg_pool", x);
  Problem problem = problem_of(x, {"avg_pool", kernel_size, stride, padding, UNDILATED, ceil_mode});
  const Tensor out = new_out(problem, x);
  set_out(problem, out);
  run(problem, average_of(x, {weight, bias, mean, var, eps}, count_include_pad, divisor), x, out);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) {
  library.impl("avg_pool", TORCH_BOX(&avg_pool));
  library.impl("avg_pool_out", TORCH_BOX(&avg_pool_out));
}

}  // namespace
}  // namespace cvkernels::avg_pool
