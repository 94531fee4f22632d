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
  // new one, for which idle ones are freed where memory runs out.
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
    void* data = std::aligned_alloc(PAGE, bytes);
    if (data == nullptr) {
      free_idle(0);
      data = std::aligned_alloc(PAGE, bytes);
    }
    if (data == nullptr) throw std::bad_alloc();
    prefer_huge_pages(data, static_cast<int64_t>(bytes));
    const std::lock_guard lock(mutex_);
    used_bytes_ += bytes;
    return *capacity = bytes, data;
  }

  // Throws nothing, as destructors of tensors call it.
  void give(void* data, size_t capacity) noexcept {
    size_t most;
    {
      const std::lock_guard lock(mutex_);
      used_bytes_ -= capacity;
      most = std::max(KEPT, used_bytes_);
      try {
        idle_.push_back({data, capacity});
        idle_bytes_ += capacity;
        data = nullptr;
      } catch (const std::bad_alloc&) {  // its place in the list has no room: it is freed
      }
    }
    std::free(data);
    free_idle(most);
  }

  // Between these, other threads wait in take() and give().
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // Frees idle blocks down to `most` bytes, outside of the lock since that takes long.
  void free_idle(size_t most) noexcept {
    for (;;) {
      void* data = nullptr;
      {
        const std::lock_guard lock(mutex_);
        if (idle_bytes_ <= most) return;
        data = idle_.front().data;
        idle_bytes_ -= idle_.front().bytes;
        idle_.erase(idle_.begin());
      }
      std::free(data);
    }
  }

  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> idle_;  // idle longest first
  size_t idle_bytes_ = 0, used_bytes_ = 0;
};

// Those of all results and of what ops work in; defined in recycled.cpp.
Blocks& recycled_blocks();

// A block as scratch memory of one call.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(recycled_blocks().take(bytes, &capacity_)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { recycled_blocks().give(data_, capacity_); }

  float* floats() const { return static_cast<float*>(data_); }

 private:
  size_t capacity_ = 0;
  void* data_;
};

}  // namespace cvkernels
