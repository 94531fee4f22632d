// The work of the CPU ops: done at once, or recorded, to be done again and again on the same memory
// or on other memory. No torch header.
#pragma once

#include <functional>
#include <initializer_list>
#include <utility>
#include <vector>

namespace cvkernels {

// What an op does once its arguments are checked, as a function of the addresses of its tensors: in
// the order of its schema, null for one that is absent, and last of a result that it returns.
struct Work {
  std::function<void(void* const*)> run;
  std::vector<void*> addresses;

  void operator()() const { run(addresses.data()); }
};

// Where this thread's ops leave their work; null while they do it.
inline thread_local std::vector<Work>* recording = nullptr;

// `work` owns all but the memory at `addresses`.
template <typename Function>
void perform(std::initializer_list<const void*> addresses, Function&& work) {
  auto* const first = const_cast<void* const*>(addresses.begin());
  if (recording == nullptr)
    work(first);
  else
    recording->push_back({std::forward<Function>(work), {first, first + addresses.size()}});
}

}  // namespace cvkernels
