// avg_pool on CUDA.
#include "avg_pool/kernels.cuh"

#include "avg_pool/ops.h"
#include "common/cuda.h"

namespace cvkernels::avg_pool {
namespace {

// Output rows of one thread at most, which share its channels' scale and shift, where that leaves
// enough blocks for a GPU.
constexpr int64_t ROWS = 8;
constexpr int64_t ENOUGH_BLOCKS = 1024;

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

struct OnCuda : Cuda {
  template <typename T>
  static void launch(const Cuda& cuda, Type<T>, const Problem& problem, const Average& average,
                     const void* x_data, void* out_data) {
    const T* x = static_cast<const T*>(x_data);
    T* out = static_cast<T*>(out_data);
    if (PackPlace<T>::takes(problem, x, out))
      average.normalises ? launch_nhwc<T, true>(problem, average, x, out, cuda.stream)
                         : launch_nhwc<T, false>(problem, average, x, out, cuda.stream);
    else
      launch_over_outputs(problem, [&]<typename Index, bool CHANNELS_INNER>(unsigned grid) {
        avg_pool_strided_kernel<T, Index, CHANNELS_INNER>
            <<<grid, THREADS, 0, cuda.stream>>>(x, out, problem, average);
      });
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) { Ops<OnCuda>::add_to(library); }

}  // namespace
}  // namespace cvkernels::avg_pool
