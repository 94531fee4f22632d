// See cuda_runtime.h. A copy is made when its thread waits for it, so that one that nothing waits
// for is missed.
#pragma once

#include <cstring>
#include <deque>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_host {

struct Copy {
  char* to;
  const char* from;
  size_t size, zeros;
};

struct Pipeline {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;

  static Pipeline& of_thread() {
    static Pipeline pipelines[1024];
    return pipelines[block.thread.x +
                     block.size.x * (block.thread.y + block.size.y * block.thread.z)];
  }

  void wait(size_t pending) {
    for (; committed.size() > pending; committed.pop_front())
      for (const Copy& copy : committed.front()) {
        if (copy.size > copy.zeros) memcpy(copy.to, copy.from, copy.size - copy.zeros);
        memset(copy.to + copy.size - copy.zeros, 0, copy.zeros);
      }
  }
};

}  // namespace cuda_on_host

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  cuda_on_host::Pipeline::of_thread().open.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), size, zeros});
}

inline void __pipeline_commit() {
  auto& pipeline = cuda_on_host::Pipeline::of_thread();
  pipeline.committed.push_back(std::move(pipeline.open));
  pipeline.open.clear();
}

inline void __pipeline_wait_prior(size_t pending) {
  cuda_on_host::Pipeline::of_thread().wait(pending);
}
