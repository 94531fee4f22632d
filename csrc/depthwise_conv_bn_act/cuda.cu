// depthwise_conv_bn_act on CUDA. Schema: cvkernels/ops/depthwise_conv_bn_act/cuda.py.
#include "depthwise_conv_bn_act/kernels.cuh"

#include "common/arguments.h"
#include "common/cuda.h"

namespace cvkernels::depthwise_conv_bn_act {
namespace {

constexpr const char* OP = "depthwise_conv_bn_act";

struct Operands {
  const void *x, *weight;
  void* out;
  float* parts;
};

template <typename T, int K, int S, bool SQUEEZE, typename Activation>
void launch(Call call, const Operands& at, Activation activation, cudaStream_t stream) {
  using Of = Tile<T, K, S>;
  // The threads of a unit access its packs one after another.
  const int64_t columns = call.strips * Of::LANES / PACKS;
  const auto bytes = [](int64_t elements) {
    CVK_CHECK(OP, elements <= std::numeric_limits<int32_t>::max() / int64_t(sizeof(T)),
              "rows and columns must be less than 2 GiB apart");
    return static_cast<uint32_t>(elements * sizeof(T));
  };
  call.x_row_bytes = bytes(call.x_stride_h), call.x_pack_bytes = bytes(columns * call.x_stride_w);
  call.out_row_bytes = bytes(call.out_stride_h);
  call.out_pack_bytes = bytes(columns * call.out_stride_w);
  const int units = call.images * call.bands;
  CVK_CHECK(OP, units * call.strips <= Of::SLOTS && units * Of::span(call.strips) <= Of::COLUMNS,
            "a block has no room for ", units, " units of ", call.strips, " strips");
  const int64_t groups = (call.N + call.images - 1) / call.images;
  const int64_t blocks = groups * call.tiles * call.channel_blocks;
  const int band_groups = (call.all_bands + call.bands - 1) / call.bands;
  CVK_CHECK(OP, blocks <= std::numeric_limits<int32_t>::max() && band_groups <= GRID_Y_MAX, call.N,
            " images of ", call.C, " channels are more than a launch can index; split the batch");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(band_groups));
  depthwise_conv_bn_act_kernel<T, K, S, SQUEEZE, Activation>
      <<<grid, THREADS, 0, stream>>>(static_cast<const T*>(at.x), static_cast<const T*>(at.weight),
                                     static_cast<T*>(at.out), at.parts, call, activation);
}

template <typename T, int K, int S>
void launch_activation(const Call& call, const Operands& at, Act act, cudaStream_t stream) {
  const auto squeezed = [&]<typename Activation>(Activation activation) {
    if (at.parts == nullptr)
      launch<T, K, S, false>(call, at, activation, stream);
    else
      launch<T, K, S, true>(call, at, activation, stream);
  };
  constexpr float UNBOUNDED = std::numeric_limits<float>::infinity();
  if (act == Act::SILU)
    squeezed(SiluInto<T>{});
  else
    squeezed(Clamp{act == Act::NONE ? -UNBOUNDED : 0.0f, act == Act::RELU6 ? 6.0f : UNBOUNDED});
}

template <typename T>
void launch_filter(const Call& call, const Operands& at, int64_t kernel, int64_t stride, Act act,
                   cudaStream_t stream) {
  if (kernel == 3 && stride == 1)
    launch_activation<T, 3, 1>(call, at, act, stream);
  else if (kernel == 3)
    launch_activation<T, 3, 2>(call, at, act, stream);
  else if (stride == 1)
    launch_activation<T, 5, 1>(call, at, act, stream);
  else
    launch_activation<T, 5, 2>(call, at, act, stream);
}

// The sizes of a call, without how it is cut; its maps and their strides are checked.
Call call_of(const Tensor& x, const Tensor& weight, int64_t kernel, int64_t stride,
             int64_t padding_h, int64_t padding_w, const Tensor& out) {
  CVK_CHECK_DIM(OP, x, 4);
  CVK_CHECK(OP, kernel == 3 || kernel == 5, "kernel must be 3 or 5, got ", kernel);
  CVK_CHECK(OP, stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t P = (H + 2 * padding_h - kernel) / stride + 1;
  const int64_t Q = (W + 2 * padding_w - kernel) / stride + 1;
  constexpr int64_t SIZE_MAX_OF_MAP = 1 << 24;
  CVK_CHECK(OP, padding_h >= 0 && padding_w >= 0, "padding must not be negative");
  CVK_CHECK(OP,
            H + 2 * padding_h >= kernel && W + 2 * padding_w >= kernel &&
                H + 2 * padding_h < SIZE_MAX_OF_MAP && W + 2 * padding_w < SIZE_MAX_OF_MAP &&
                C < SIZE_MAX_OF_MAP,
            "no window fits x of shape ", shape_of(x), ", or it is too large");
  CVK_CHECK_SAME(OP, weight, x);
  CVK_CHECK(OP,
            weight.dim() == 3 && weight.size(0) == kernel && weight.size(1) == kernel &&
                weight.size(2) == C,
            "weight must have shape [", kernel, ", ", kernel, ", ", C, "], got ", shape_of(weight));
  CVK_CHECK_SAME(OP, out, x);
  CVK_CHECK(OP,
            out.dim() == 4 && out.size(0) == N && out.size(1) == C && out.size(2) == P &&
                out.size(3) == Q,
            "out must have shape [", N, ", ", C, ", ", P, ", ", Q, "], got ", shape_of(out));
  for (const Tensor* map : {&x, &out}) {
    CVK_CHECK(OP,
              packable(map->const_data_ptr(), C, map->element_size(), map->stride(0),
                       map->stride(1), map->stride(2), map->stride(3)),
              "the channels of x and out must be neighbours, in whole packs of 16 bytes");
  }
  Call call{};
  call.N = N;
  call.C = static_cast<int>(C), call.H = static_cast<int>(H), call.W = static_cast<int>(W);
  call.P = static_cast<int>(P), call.Q = static_cast<int>(Q);
  call.padding_h = static_cast<int>(padding_h), call.padding_w = static_cast<int>(padding_w);
  call.x_stride_n = x.stride(0), call.x_stride_h = x.stride(2), call.x_stride_w = x.stride(3);
  call.out_stride_n = out.stride(0), call.out_stride_h = out.stride(2);
  call.out_stride_w = out.stride(3);
  call.weight_stride_r = weight.stride(0), call.weight_stride_s = weight.stride(1);
  call.weight_stride_c = weight.stride(2);
  return call;
}

// How the call is cut, see tiling.py.
void cut(Call& call, int64_t element_size, int64_t strips, int64_t images, int64_t bands,
         int64_t band_rows) {
  CVK_CHECK(OP,
            strips > 0 && images > 0 && bands > 0 && band_rows > 0 && strips <= THREADS &&
                images <= THREADS && bands <= THREADS && band_rows <= call.P,
            "no such cut: ", strips, " strips, ", images, " images, ", bands, " bands of ",
            band_rows, " rows");
  call.strips = static_cast<int>(strips), call.images = static_cast<int>(images);
  call.bands = static_cast<int>(bands), call.band_rows = static_cast<int>(band_rows);
  const auto ceil = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  call.tiles = ceil(call.Q, strips * STRIP);
  call.channel_blocks = ceil(call.C, PIXEL / element_size);
  call.all_bands = ceil(call.P, band_rows);
  CVK_CHECK(OP, bands == 1 || call.P % band_rows == 0,
            "bands of one block must have as many rows, got ", band_rows, " of ", call.P);
}

void depthwise_conv_bn_act_cuda(const Tensor& x, const Tensor& weight, const Maybe& bias,
                                const Maybe& bn_weight, const Maybe& bn_bias, const Maybe& bn_mean,
                                const Maybe& bn_var, double bn_eps, int64_t kernel, int64_t stride,
                                int64_t padding_h, int64_t padding_w, int64_t act, int64_t strips,
                                int64_t images, int64_t bands, int64_t band_rows, const Tensor& out,
                                const Maybe& sums) {
  CVK_CHECK_CUDA(OP, x);
  CVK_CHECK(OP, act >= 0 && act <= 3, "act must be between 0 and 3, got ", act);
  Call call = call_of(x, weight, kernel, stride, padding_h, padding_w, out);
  cut(call, x.element_size(), strips, images, bands, band_rows);
  call.bn = batch_norm_of(OP, {bn_weight, bn_bias, bn_mean, bn_var, bn_eps}, x, call.C);
  call.bias = vector_of(OP, "bias", bias, x, call.C);
  if (sums) {
    CVK_CHECK(OP,
              sums->scalar_type() == ScalarType::Float && sums->is_contiguous() &&
                  sums->device() == x.device() && sums->numel() == call.N * call.C,
              "sums must hold ", call.N * call.C, " float32 numbers on x's device");
  }
  if (call.N == 0) return;
  dispatch_floating(OP, x.scalar_type(), [&]<typename T>(Type<T>) {
    Cuda::perform(OP, x, {}, [&](void* const*, const Cuda& cuda) {
      const int parts = sums ? call.all_bands * call.tiles : 0;
      float* total = sums ? static_cast<float*>(sums->mutable_data_ptr()) : nullptr;
      const Maybe partial = parts > 1 ? Maybe(cuda.floats(call.N * parts * call.C)) : Maybe();
      const Operands at{x.const_data_ptr(), weight.const_data_ptr(), out.mutable_data_ptr(),
                        partial ? static_cast<float*>(partial->mutable_data_ptr()) : total};
      launch_filter<T>(call, at, kernel, stride, static_cast<Act>(act), cuda.stream);
      if (!partial) return;
      const unsigned grid = grid_of((call.N * call.C + THREADS - 1) / THREADS);
      depthwise_conv_bn_act_add_kernel<<<grid, THREADS, 0, cuda.stream>>>(at.parts, total, call.N,
                                                                          parts, call.C);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA, library) {
  library.impl("depthwise_conv_bn_act_cuda", TORCH_BOX(&depthwise_conv_bn_act_cuda));
}

}  // namespace
}  // namespace cvkernels::depthwise_conv_bn_act
