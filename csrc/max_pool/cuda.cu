// max_pool on CUDA.
#include "max_pool/kernels.cuh"

#include "common/cuda.h"
#include "max_pool/ops.h"

namespace cvkernels::max_pool {
namespace {

template <typename T>
void launch_nhwc(const Problem& problem, const T* x, T* out, cudaStream_t stream) {
  const dim3 grid(grid_of(problem.N * problem.P), PackPlace<T>::columns(problem));
  const bool square =
      problem.h.kernel == problem.w.kernel && problem.h.dilation == 1 && problem.w.dilation == 1;
  if (square && problem.h.kernel == 3)
    max_pool_nhwc_kernel<T, 3><<<grid, THREADS, 0, stream>>>(x, out, problem);
  else if (square && problem.h.kernel == 2)
    max_pool_nhwc_kernel<T, 2><<<grid, THREADS, 0, stream>>>(x, out, problem);
  else
    max_pool_nhwc_kernel<T, 0><<<grid, THREADS, 0, stream>>>(x, out, problem);
}

struct OnCuda : Cuda {
  template <typename T>
  static void launch(const Cuda& cuda, Type<T>, const Problem& problem, const void* x_data,
                     void* out_data) {
    const T* x = static_cast<const T*>(x_data);
    T* out = static_cast<T*>(out_data);
    if (PackPlace<T>::takes(problem, x, out))
      launch_nhwc(problem, x, out, cuda.stream);
    else
      launch_over_outputs(problem, [&]<typename Index, bool CHANNELS_INNER>(unsigned grid) {
        max_pool_strided_kernel<T, Index, CHANNELS_INNER>
            <<<grid, THREADS, 0, cuda.stream>>>(x, out, problem);
      });
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) { Ops<OnCuda>::add_to(library); }

}  // namespace
}  // namespace cvkernels::max_pool
