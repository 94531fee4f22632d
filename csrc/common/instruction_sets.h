// The instruction sets that the CPU ops are compiled for, see isa.h, and which of them a call
// takes.
#pragma once

#include <atomic>

#include "amx.h"

namespace cvkernels {

enum class InstructionSet : int { BASELINE, AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AVX512_BF16, AMX };

constexpr const char* INSTRUCTION_SETS[] = {"baseline",    "avx2",        "avx_vnni", "avx512",
                                            "avx512_vnni", "avx512_bf16", "amx"};

inline bool processor_has(InstructionSet set) {
#if defined(__x86_64__) && defined(__GLIBC__)
  if (set == InstructionSet::AVX2) return __builtin_cpu_supports("x86-64-v3");
  if (set == InstructionSet::AVX512) return __builtin_cpu_supports("x86-64-v4");
  if (set == InstructionSet::AVX_VNNI)
    return __builtin_cpu_supports("x86-64-v3") && __builtin_cpu_supports("avxvnni");
  if (set == InstructionSet::AVX512_VNNI)
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni");
  const bool has_bf16 = __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  if (set == InstructionSet::AVX512_BF16) return has_bf16;
  if (set == InstructionSet::AMX) return has_bf16 && amx_error() == 0;
#endif
  return set == InstructionSet::BASELINE;
}

// The best set that calls take: any, but where the others are tested or measured.
inline std::atomic<int> instruction_set_limit{static_cast<int>(InstructionSet::AMX)};

inline bool takes(InstructionSet set) {
  return static_cast<int>(set) <= instruction_set_limit.load(std::memory_order_relaxed) &&
         processor_has(set);
}

}  // namespace cvkernels
