// CUDA as a device of an op's launcher, which is written once for all devices: device guard,
// current stream, launch check.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <utility>

#include "check.h"

namespace cvkernels {

struct Cuda {
  torch::stable::Device device;
  cudaStream_t stream;

  static void check(const char* op, const Tensor& x) { CVK_CHECK_CUDA(op, x); }

  // Does work(at, device) on the memory at `addresses`, on x's device.
  template <typename Function>
  static void perform(const char* op, const Tensor& x, std::initializer_list<const void*> addresses,
                      Function&& work) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    work(const_cast<void* const*>(addresses.begin()),
         Cuda{x.device(), static_cast<cudaStream_t>(stream)});
    const cudaError_t error = cudaGetLastError();
    CVK_CHECK(op, error == cudaSuccess, "the kernel launch failed: ", cudaGetErrorString(error));
  }

  // Blocks of a kernel that the current device, this one, runs at once; asked once for each.
  template <typename Kernel>
  int64_t resident_blocks(Kernel* kernel, int threads) const {
    static std::mutex mutex;
    static std::map<std::pair<Kernel*, int>, int64_t> known;
    const std::lock_guard lock(mutex);
    const auto [found, is_new] = known.try_emplace({kernel, device.index()}, 0);
    if (is_new) {
      int of_multiprocessor = 0, multiprocessors = 0;
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_multiprocessor, kernel, threads, 0);
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device.index());
      found->second = std::max(1, of_multiprocessor) * std::max(1, multiprocessors);
    }
    return found->second;
  }

  // Memory for `count` floats.
  Tensor floats(int64_t count) const {
    return torch::stable::empty({count}, ScalarType::Float, std::nullopt, device, std::nullopt,
                                std::nullopt);
  }
};

}  // namespace cvkernels
