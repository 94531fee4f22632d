// conv_bn_act on CUDA. Schema: cvkernels/ops/conv_bn_act/halo.py.
#include <atomic>
#include <limits>

#include "common/arguments.h"
#include "common/cuda.h"
#include "conv_bn_act/kernels.cuh"

namespace cvkernels::conv_bn_act {
namespace {

constexpr const char* OP = "conv_bn_act";

int attribute_of(cudaDeviceAttr attribute, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  CVK_CHECK(OP, error == cudaSuccess, "the GPU does not answer: ", cudaGetErrorString(error));
  return value;
}

// Lets KERNEL have all shared memory that a block of this device may, at its first call there.
template <auto KERNEL>
void allow_shared_memory(int device, int64_t bytes) {
  constexpr int DEVICES = 64;
  static std::atomic<int> allowed[DEVICES];
  int most = device < DEVICES ? allowed[device].load() : 0;
  if (most == 0) {
    most = attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const cudaError_t error =
        cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    CVK_CHECK(OP, error == cudaSuccess, "the halo kernel gets no ", most,
              " bytes of shared memory: ", cudaGetErrorString(error));
    if (device < DEVICES) allowed[device] = most;
  }
  CVK_CHECK(OP, bytes <= most, "the halo kernel needs ", bytes,
            " bytes of shared memory for this tile, and this GPU has ", most);
}

template <typename T, int ROWS, int COLUMNS>
void launch(const Halo& problem, const T* x, const T* weight, T* out, cudaStream_t stream) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  CVK_CHECK(OP, error == cudaSuccess, "no current GPU: ", cudaGetErrorString(error));
  const int64_t bytes = problem.shared_bytes();
  allow_shared_memory<&conv_bn_act_halo_kernel<T, ROWS, COLUMNS>>(device, bytes);
  const int64_t blocks = attribute_of(cudaDevAttrMultiProcessorCount, device);
  const unsigned grid = grid_of(std::min(problem.tiles(), blocks));
  conv_bn_act_halo_kernel<T, ROWS, COLUMNS>
      <<<grid, HALO_THREADS, bytes, stream>>>(x, weight, out, problem);
}

template <typename T>
void launch(const Halo& problem, void* const* at, cudaStream_t stream) {
  const T *x = static_cast<const T*>(at[0]), *weight = static_cast<const T*>(at[1]);
  T* out = static_cast<T*>(at[2]);
  if (problem.rows == 7 && problem.columns == 4)
    launch<T, 7, 4>(problem, x, weight, out, stream);
  else if (problem.rows == 7)
    launch<T, 7, 2>(problem, x, weight, out, stream);
  else if (problem.columns == 4)
    launch<T, 4, 4>(problem, x, weight, out, stream);
  else
    launch<T, 4, 2>(problem, x, weight, out, stream);
}

// The distance of neighbouring pixels of a map along rows or columns, which 32 bits hold.
int step_of(const char* name, const Tensor& map, int64_t axis) {
  const int64_t stride = map.size(axis) > 1 ? map.stride(axis) : 0;
  CVK_CHECK(OP, stride >= 0 && stride <= std::numeric_limits<int>::max(), name, " has a stride of ",
            stride);
  return static_cast<int>(stride);
}

// Every pixel's channels are whole units of 16 bytes.
void check_packed(const char* name, const Tensor& map) {
  const int64_t stride_n = map.size(0) > 1 ? map.stride(0) : 0;
  const int64_t stride_h = map.size(2) > 1 ? map.stride(2) : 0;
  const int64_t stride_w = map.size(3) > 1 ? map.stride(3) : 0;
  CVK_CHECK(
      OP,
      packable(map.const_data_ptr(), map.size(1), 2, stride_n, map.stride(1), stride_h, stride_w),
      name, " must have channels in multiples of 8 at aligned addresses, got shape ",
      shape_of(map));
}

void check_tile(const Halo& problem) {
  const auto one_of = [](int value, std::initializer_list<int> values) {
    return std::find(values.begin(), values.end(), value) != values.end();
  };
  const bool in_range = one_of(problem.rows, {4, 7}) && one_of(problem.columns, {2, 4}) &&
                        one_of(problem.warps_n, {1, 2, 4, 8}) &&
                        one_of(problem.warps_c, {1, 2, 4, 8}) &&
                        one_of(problem.slices, {1, 2, 4, 8}) && one_of(problem.stages, {2, 3, 4}) &&
                        problem.strips_h > 0 && problem.strips_h <= 16 && problem.strips_w > 0 &&
                        problem.strips_w <= 16 && problem.patches > 0 && problem.patches <= 16;
  CVK_CHECK(OP,
            in_range && problem.patches * problem.strips_h * problem.strips_w * problem.warps_n *
                                problem.warps_c ==
                            2 * HALO_WARPS,
            "the tile does not give each of ", HALO_WARPS, " warps two strips");
  CVK_CHECK(OP, problem.K <= problem.all_columns(), "the tile has ", problem.all_columns(),
            " output channels, and out ", problem.K);
  CVK_CHECK(OP, problem.all_patches() <= std::numeric_limits<int>::max(),
            "x has too many images; split the batch");
}

Halo problem_of(const Tensor& x, const Tensor& weight, const Tensor& out, const Maybe& bias,
                const BatchNormTensors& bn, int64_t act) {
  CVK_CHECK_DIM(OP, x, 4);
  CVK_CHECK_DIM(OP, weight, 4);
  CVK_CHECK_DIM(OP, out, 4);
  CVK_CHECK_SAME(OP, weight, x);
  CVK_CHECK_SAME(OP, out, x);
  constexpr int64_t MOST = 1 << 20;
  const int64_t C = x.size(1), K = out.size(1);
  CVK_CHECK(OP, C > 0 && C < MOST && K > 0 && K < MOST && x.size(2) < MOST && x.size(3) < MOST,
            "x or out is too large, got shapes ", shape_of(x), " and ", shape_of(out));
  CVK_CHECK(OP, out.size(0) == x.size(0) && out.size(2) == x.size(2) && out.size(3) == x.size(3),
            "out must have the images and pixels of x, got shapes ", shape_of(out), " and ",
            shape_of(x));
  CVK_CHECK(
      OP, weight.size(0) == K && weight.size(1) == C && weight.size(2) == 3 && weight.size(3) == 3,
      "weight must have shape [", K, ", ", C, ", 3, 3], got ", shape_of(weight));
  CVK_CHECK(OP,
            weight.stride(1) == 1 && weight.stride(3) == C && weight.stride(2) == 3 * C &&
                (K == 1 || weight.stride(0) == 9 * C) &&
                reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % sizeof(Pack) == 0,
            "weight must be dense, channels_last and aligned");
  CVK_CHECK(OP, act >= 0 && act <= 3, "act must be between 0 and 3, got ", act);
  check_packed("x", x);
  check_packed("out", out);
  Halo problem{};
  problem.N = x.size(0), problem.C = C, problem.H = x.size(2), problem.W = x.size(3);
  problem.K = K;
  problem.x_stride_n = x.stride(0), problem.out_stride_n = out.stride(0);
  problem.x_stride_h = step_of("x", x, 2), problem.x_stride_w = step_of("x", x, 3);
  problem.out_stride_h = step_of("out", out, 2), problem.out_stride_w = step_of("out", out, 3);
  problem.act = static_cast<Act>(act);
  problem.bn = batch_norm_of(OP, bn, x, K);
  problem.bias = vector_of(OP, "bias", bias, x, K);
  return problem;
}

void conv_bn_act_halo(const Tensor& x, const Tensor& weight, const Tensor& out, const Maybe& bias,
                      const Maybe& bn_weight, const Maybe& bn_bias, const Maybe& bn_mean,
                      const Maybe& bn_var, double bn_eps, int64_t act, int64_t rows,
                      int64_t columns, int64_t strips_h, int64_t strips_w, int64_t patches,
                      int64_t warps_n, int64_t warps_c, int64_t slices, int64_t stages) {
  Cuda::check(OP, x);
  Halo problem =
      problem_of(x, weight, out, bias, {bn_weight, bn_bias, bn_mean, bn_var, bn_eps}, act);
  const auto part = [](int64_t value) {
    return static_cast<int>(std::clamp<int64_t>(value, 0, HALO_THREADS));
  };
  problem.rows = part(rows), problem.columns = part(columns);
  problem.strips_h = part(strips_h), problem.strips_w = part(strips_w);
  problem.patches = part(patches), problem.warps_n = part(warps_n);
  problem.warps_c = part(warps_c), problem.slices = part(slices), problem.stages = part(stages);
  check_tile(problem);
  if (out.numel() == 0) return;
  const auto work = [&](auto type) {
    using T = typename decltype(type)::type;
    Cuda::perform(OP, x, {x.const_data_ptr(), weight.const_data_ptr(), out.mutable_data_ptr()},
                  [&](void* const* at, const Cuda& cuda) { launch<T>(problem, at, cuda.stream); });
  };
  if (x.scalar_type() == ScalarType::Half) return work(Type<float16>{});
  CVK_CHECK(OP, x.scalar_type() == ScalarType::BFloat16,
            "the halo kernel computes in float16 and bfloat16, got ",
            torch::headeronly::toString(x.scalar_type()));
  work(Type<bfloat16>{});
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) {
  library.impl("conv_bn_act_halo", TORCH_BOX(&conv_bn_act_halo));
}

}  // namespace
}  // namespace cvkernels::conv_bn_act
