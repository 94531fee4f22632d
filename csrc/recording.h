// The work of the CPU ops: done at once, or recorded, to be done again and again on the same
// memory. No torch header.
#pragma once

#include <functional>
#include <utility>
#include <vector>

namespace cvkernels {

// What an op does once its arguments are checked. It owns all but the memory that it reads and
// writes.
using Work = std::function<void()>;

// Where this thread's ops leave their work; null while they do it.
inline thread_local std::vector<Work>* recording = nullptr;

template <typename Function>
void perform(Function&& work) {
  if (recording == nullptr)
    work();
  else
    recording->emplace_back(std::forward<Function>(work));
}

}  // namespace cvkernels
