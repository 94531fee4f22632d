// dense_concat on CUDA. Schema: cvkernels/ops/dense_concat/op.py.
#include "check.h"
#include "cuda_elements.h"
#include "cuda_pack.h"
#include "dense_concat.h"
#include "dense_concat_call.h"

namespace cvkernels::dense_concat {
namespace {

constexpr int THREADS = 128;
// Pixels of one thread, all their loads in flight at once.
constexpr int PIXELS = 4;

// Channels innermost on both sides. One block moves PIXELS * rows pixels: each thread keeps its
// pack of channels, and their scale and shift, and steps through the pixels. Reads src once and
// writes it once: 2 * N*C*H*W elements, the minimum for this op.
template <typename T, bool COPIES>
__global__ void __launch_bounds__(THREADS)
    dense_concat_nhwc_kernel(const T* __restrict__ src_ptr,  // [N, C, H, W], channels innermost
                             T* __restrict__ out_ptr,        // [N, C, H, W], channels innermost
                             Problem problem) {
  constexpr int LANES = sizeof(Pack) / sizeof(T);
  const int packs = static_cast<int>(problem.C / LANES);
  const int columns = packs < THREADS ? packs : THREADS;
  const int rows = THREADS / columns;
  const int row = threadIdx.x / columns;
  const int pack = blockIdx.y * columns + threadIdx.x - row * columns;
  if (row >= rows || pack >= packs) return;
  const int64_t c = static_cast<int64_t>(pack) * LANES;

  Affine<float> affine[LANES];
  if constexpr (!COPIES) {
#pragma unroll
    for (int i = 0; i < LANES; ++i) affine[i] = affine_of<T>(problem.bn, c + i);
  }
  const float lowest = Affine<float>::lowest(problem.relu);

  const int64_t pixels = problem.pixels();
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows * PIXELS;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows * PIXELS + row; first < pixels;
       first += step) {
    Pack loaded[PIXELS];
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      const int64_t pixel = first + i * rows;
      if (pixel < pixels)
        loaded[i] =
            __ldg(reinterpret_cast<const Pack*>(src_ptr + problem.offset(problem.src, pixel) + c));
    }
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      const int64_t pixel = first + i * rows;
      if (pixel >= pixels) break;
      if constexpr (!COPIES) {
        T elements[LANES];
        memcpy(elements, &loaded[i], sizeof(Pack));
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane)
          elements[lane] =
              Number<T>::narrow(affine[lane](Number<T>::widen(elements[lane]), lowest));
        memcpy(&loaded[i], elements, sizeof(Pack));
      }
      *reinterpret_cast<Pack*>(out_ptr + problem.offset(problem.out, pixel) + c) = loaded[i];
    }
  }
}

// Any strides: one thread moves one element.
template <typename T, typename Index, bool CHANNELS_INNER>
__global__ void __launch_bounds__(THREADS)
    dense_concat_strided_kernel(const T* __restrict__ src_ptr,  // [N, C, H, W]
                                T* __restrict__ out_ptr,        // [N, C, H, W]
                                Problem problem) {
  const auto move = [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const auto offset = [&](const Strides& strides) {
      return n * strides.n + c * strides.c + h * strides.h + w * strides.w;
    };
    T x = src_ptr[offset(problem.src)];
    if (!problem.copies)
      x = Number<T>::narrow(
          affine_of<T>(problem.bn, c)(Number<T>::widen(x), Affine<float>::lowest(problem.relu)));
    out_ptr[offset(problem.out)] = x;
  };
  over_elements<THREADS, Index, CHANNELS_INNER>(problem.N, problem.C, problem.H, problem.W, move);
}

template <typename T>
bool packable(const void* data, const Problem& problem, const Strides& strides) {
  return cvkernels::packable(data, problem.C, sizeof(T), problem.N > 1 ? strides.n : 0, strides.c,
                             problem.H > 1 ? strides.h : 0, strides.w);
}

template <typename T>
void launch(Type<T>, const Problem& problem, const void* src_data, void* out_data,
            cudaStream_t stream) {
  const T* src = static_cast<const T*>(src_data);
  T* out = static_cast<T*>(out_data);
  const int64_t packs = problem.C * static_cast<int64_t>(sizeof(T)) / sizeof(Pack);
  const int64_t columns = std::min<int64_t>(packs, THREADS);
  if (packable<T>(src, problem, problem.src) && packable<T>(out, problem, problem.out) &&
      packs <= GRID_Y_MAX * THREADS) {
    const int64_t pixels_per_block = THREADS / columns * PIXELS;
    const dim3 grid(grid_of((problem.pixels() + pixels_per_block - 1) / pixels_per_block),
                    (packs + columns - 1) / columns);
    if (problem.copies)
      dense_concat_nhwc_kernel<T, true><<<grid, THREADS, 0, stream>>>(src, out, problem);
    else
      dense_concat_nhwc_kernel<T, false><<<grid, THREADS, 0, stream>>>(src, out, problem);
  } else {
    launch_over_elements<THREADS>(problem.pixels() * problem.C, problem.out.c == 1,
                                  [&]<typename Index, bool CHANNELS_INNER>(unsigned grid) {
                                    dense_concat_strided_kernel<T, Index, CHANNELS_INNER>
                                        <<<grid, THREADS, 0, stream>>>(src, out, problem);
                                  });
  }
}

void dense_concat(const Tensor& buffer, const Tensor& src, int64_t start,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& mean, const std::optional<Tensor>& var, double eps,
                  bool relu) {
  CVK_CHECK_CUDA("dense_concat", buffer);
  const Problem problem = problem_of(buffer, src, start, {weight, bias, mean, var, eps}, relu);
  const DeviceGuard guard(buffer.get_device_index());
  if (src.numel() == 0) return;
  dispatch_floating("dense_concat", src.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* out = static_cast<T*>(buffer.mutable_data_ptr()) + start * buffer.stride(1);
    launch(type, problem, src.const_data_ptr(), out, current_stream(buffer));
  });
  CVK_CHECK_LAUNCH("dense_concat");
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) {
  library.impl("dense_concat", TORCH_BOX(&dense_concat));
}

}  // namespace
}  // namespace cvkernels::dense_concat
