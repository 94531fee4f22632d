// As much of CUDA as csrc/*.cu uses, on the host: a kernel's threads are fibers, run one after
// another, which change at __syncthreads() and where the 32 of a warp work together (warp_wait).
// Included after torch's headers, in place of the toolkit's; cuda_on_host.py turns each launch into
// launch(grid, block, bytes, function).
//
// Threads run in order or in reverse (cuda_on_host_reverse). A barrier that some threads of a block
// do not reach is an error, and so is one of a warp. What a block leaves in static shared memory
// the next one finds there; that which a launch asks for starts as NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_host {

constexpr unsigned WARP = 32;

class Block {
 public:
  void run(dim3 index, const std::function<void()>& kernel, bool reverse);
  void wait() { leave(State::WAITS); }
  // Until all threads of the warp are here; `what` they do together is one thing.
  void warp_wait(const void* what) {
    current_->what = what;
    leave(State::WAITS_FOR_WARP);
  }
  unsigned number() const { return thread.x + size.x * (thread.y + size.y * thread.z); }
  dim3 index, size, thread, grid;
  // Of the launch; in bytes, at a multiple of 16.
  char* memory = nullptr;
  size_t memory_size = 0;
  uint64_t count = 0;  // of the blocks that ran, and this one

 private:
  enum class State { RUNS, WAITS, WAITS_FOR_WARP, ENDED };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    const void* what;
  };
  static constexpr size_t STACK = 1 << 16;

  static void enter();
  void leave(State state) {
    current_->state = state;
    swapcontext(&current_->context, &scheduler_);
  }
  void start(size_t threads);
  void run_warp(size_t first, size_t threads, bool reverse);

  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
};

inline Block block;
inline bool reverse = false;

inline void Block::enter() {
  (*block.kernel_)();
  block.leave(State::ENDED);
}

inline void Block::start(size_t threads) {
  if (fibers_.size() < threads) fibers_.resize(threads);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers_[i];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(STACK);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = STACK};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
    fiber.state = State::RUNS;
  }
}

// Runs `threads` threads from `first` on until each waits for the block or has ended.
inline void Block::run_warp(size_t first, size_t threads, bool reverse) {
  for (size_t waiting = threads; waiting != 0;) {
    waiting = 0;
    const void* what = nullptr;
    for (size_t i = 0; i < threads; ++i) {
      const size_t t = first + (reverse ? threads - 1 - i : i);
      thread = dim3(t % size.x, t / size.x % size.y, t / size.x / size.y);
      current_ = &fibers_[t];
      swapcontext(&scheduler_, &current_->context);
      if (current_->state != State::WAITS_FOR_WARP) continue;
      if (waiting++ != 0 && current_->what != what)
        throw std::runtime_error("cuda_on_host: the threads of a warp do different things");
      what = current_->what;
    }
    if (waiting != 0 && waiting != WARP)
      throw std::runtime_error("cuda_on_host: some threads of a warp do not come to its work");
  }
}

inline void Block::run(dim3 at, const std::function<void()>& kernel, bool reverse) {
  const size_t threads = size_t(size.x) * size.y * size.z;
  index = at;
  kernel_ = &kernel;
  ++count;
  start(threads);
  for (size_t ended = 0; ended < threads;) {
    for (size_t i = 0; i < threads; i += WARP) {
      const size_t first = reverse ? (threads - 1) / WARP * WARP - i : i;
      const size_t count = std::min<size_t>(WARP, threads - first);
      run_warp(first, count, reverse);
      for (size_t t = first; t < first + count; ++t) ended += fibers_[t].state == State::ENDED;
    }
    if (ended != 0 && ended != threads)
      throw std::runtime_error("cuda_on_host: a barrier that some threads do not reach");
  }
}

inline void launch(dim3 grid, dim3 size, size_t bytes, const std::function<void()>& kernel) {
  constexpr unsigned THREADS_MAX = 1024, GRID_YZ_MAX = 65535;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > GRID_YZ_MAX ||
      grid.z > GRID_YZ_MAX || size.x * size.y * size.z - 1 >= THREADS_MAX)
    throw std::runtime_error("cuda_on_host: invalid configuration of a launch");
  block.grid = grid, block.size = size;
  std::vector<std::max_align_t> memory((bytes + sizeof(std::max_align_t) - 1) /
                                       sizeof(std::max_align_t));
  block.memory = reinterpret_cast<char*>(memory.data()), block.memory_size = bytes;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(block.memory, 0xff, bytes);
        block.run(reverse ? dim3(grid.x - 1 - x, grid.y - 1 - y, grid.z - 1 - z) : dim3(x, y, z),
                  kernel, reverse);
      }
}

}  // namespace cuda_on_host

extern "C" __attribute__((visibility("default"))) void cuda_on_host_reverse(int reverse) {
  cuda_on_host::reverse = reverse;
}

#define threadIdx (cuda_on_host::block.thread)
#define blockIdx (cuda_on_host::block.index)
#define blockDim (cuda_on_host::block.size)
#define gridDim (cuda_on_host::block.grid)
#define __syncthreads() cuda_on_host::block.wait()
#define __syncwarp()

template <typename T>
T __ldg(const T* from) {
  return *from;
}

using std::max;
using std::min;

inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }

// Launches on a CPU tensor of the host's one device and stream.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

// A device of few multiprocessors, which the tests' largest maps fill.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 18 : 227 << 10;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 4;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, 0)

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

#define is_cuda is_cpu
