// Reuse of the memory of large maps. In memory that comes fresh from the operating system, the
// first write to each page is an interrupt that clears it; for large maps that takes as long as the
// arithmetic of many layers. No torch header.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "large_output.h"

namespace cvkernels {

// Blocks of memory, each of whole huge pages. A block is in use from take() to give(), then idle.
// Idle blocks are kept up to KEPT bytes in all, or up to the bytes in use where those are more.
// Above that they are freed, the one that has been idle longest first.
class Blocks {
 public:
  static constexpr size_t PAGE = 1 << 21, KEPT = 256 << 20;

  // A block of at least `bytes` and at most twice as many, whose size is put into `capacity`: the
  // smallest idle one that fits, of equal ones the last given back, which caches may hold; else a
  // new one.
  void* take(size_t bytes, size_t* capacity) {
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    {
      const std::lock_guard lock(mutex_);
      auto best = idle_.end();
      for (auto block = idle_.begin(); block != idle_.end(); ++block)
        if (block->bytes >= bytes && block->bytes <= 2 * bytes &&
            (best == idle_.end() || block->bytes <= best->bytes))
          best = block;
      if (best != idle_.end()) {
        const Block found = *best;
        idle_.erase(best);
        idle_bytes_ -= found.bytes;
        used_bytes_ += found.bytes;
        return *capacity = found.bytes, found.data;
      }
    }
    void* const data = std::aligned_alloc(PAGE, bytes);
    if (data == nullptr) throw std::bad_alloc();
    prefer_huge_pages(data, static_cast<int64_t>(bytes));
    const std::lock_guard lock(mutex_);
    used_bytes_ += bytes;
    return *capacity = bytes, data;
  }

  void give(void* data, size_t capacity) {
    std::vector<void*> dropped;
    {
      const std::lock_guard lock(mutex_);
      used_bytes_ -= capacity;
      idle_bytes_ += capacity;
      idle_.push_back({data, capacity});
      while (idle_bytes_ > std::max(KEPT, used_bytes_)) {
        dropped.push_back(idle_.front().data);
        idle_bytes_ -= idle_.front().bytes;
        idle_.erase(idle_.begin());
      }
    }
    for (void* const block : dropped) std::free(block);
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> idle_;  // idle longest first
  size_t idle_bytes_ = 0, used_bytes_ = 0;
};

}  // namespace cvkernels
