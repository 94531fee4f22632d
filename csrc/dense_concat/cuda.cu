// dense_concat on CUDA.
#include "common/cuda.h"
#include "dense_concat/kernels.cuh"
#include "dense_concat/ops.h"

namespace cvkernels::dense_concat {
namespace {

template <typename T>
bool packable(const void* data, const Problem& problem, const Strides& strides) {
  return cvkernels::packable(data, problem.C, sizeof(T), problem.N > 1 ? strides.n : 0, strides.c,
                             problem.H > 1 ? strides.h : 0, strides.w);
}

struct OnCuda : Cuda {
  template <typename T>
  static void launch(const Cuda& cuda, Type<T>, const Problem& problem, const void* src_data,
                     void* out_data) {
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
        dense_concat_nhwc_kernel<T, true><<<grid, THREADS, 0, cuda.stream>>>(src, out, problem);
      else
        dense_concat_nhwc_kernel<T, false><<<grid, THREADS, 0, cuda.stream>>>(src, out, problem);
    } else {
      launch_over_elements<THREADS>(problem.pixels() * problem.C, problem.out.c == 1,
                                    [&]<typename Index, bool CHANNELS_INNER>(unsigned grid) {
                                      dense_concat_strided_kernel<T, Index, CHANNELS_INNER>
                                          <<<grid, THREADS, 0, cuda.stream>>>(src, out, problem);
                                    });
    }
  }
};

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) { Ops<OnCuda>::add_to(library); }

}  // namespace
}  // namespace cvkernels::dense_concat
