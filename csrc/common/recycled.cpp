// Large results in memory that freed ones lay in. Schema: cvkernels/ops/common/recycled.py.
#include "recycled.h"

#if defined(__unix__)
#include <pthread.h>
#endif

#include <cstdint>
#include <vector>

#include "check.h"

namespace cvkernels {

// Never destroyed: tensors may be freed while the process ends.
Blocks& recycled_blocks() {
  static Blocks& blocks = *new Blocks;
  return blocks;
}

namespace {

Blocks& blocks = recycled_blocks();

#if defined(__unix__)
// A forked process has no thread that would give back the lock, were it taken meanwhile.
[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { blocks.lock(); }, [] { blocks.unlock(); }, [] { blocks.unlock(); });
#endif

// An uninitialised tensor with like's sizes, strides and dtype; like is dense and needs no memory.
Tensor recycled(const Tensor& like) {
  CVK_CHECK_CPU("recycled", like);
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < like.dim(); ++d) {
    sizes.push_back(like.size(d));
    strides.push_back(like.stride(d));
  }
  size_t capacity = 0;
  void* data = nullptr;
  try {
    data = blocks.take(like.numel() * like.element_size(), &capacity);
  } catch (const std::bad_alloc&) {
    fail("recycled: can't allocate memory for a result of shape ", shape_of(like));
  }
  const auto give_back = [capacity](void* memory) { blocks.give(memory, capacity); };
  return torch::stable::from_blob(data, sizes, strides, like.device(), like.scalar_type(),
                                  give_back);
}

STABLE_TORCH_LIBRARY_IMPL(cvkernels, CPU, library) {
  library.impl("recycled", TORCH_BOX(&recycled));
}

}  // namespace
}  // namespace cvkernels
