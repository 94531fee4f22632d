// The activations of the convolutions, by the number that Python gives them. No torch header.
#pragma once

#include <cstdint>

namespace cvkernels {

enum class Act : int64_t { NONE = 0, RELU = 1, RELU6 = 2, SILU = 3 };

}  // namespace cvkernels
