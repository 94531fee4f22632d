// The CPU as a device of an op's launcher, which is written once for all devices.
#pragma once

#include <algorithm>
#include <utility>

#include "check.h"
#include "recording.h"

namespace cvkernels {

using torch::stable::parallel_for;

struct Cpu {
  static void check(const char* op, const Tensor& x) { CVK_CHECK_CPU(op, x); }

  // Has work(at, device) done on the memory at `addresses`; see recording.h.
  template <typename Function>
  static void perform(const char*, const Tensor&, std::initializer_list<const void*> addresses,
                      Function&& work) {
    cvkernels::perform(addresses,
                       [work = std::forward<Function>(work)](void* const* at) { work(at, Cpu{}); });
  }
};

// Items of a task, so that it has at least some ten thousand elements.
inline int64_t grain_of(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
}

}  // namespace cvkernels
