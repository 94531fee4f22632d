// One source compiled for each instruction set: included inside an op's namespace with the source's
// name as CVK_SOURCE. In a namespace of the set's name the source sees CVK_TARGET, the attribute
// that each of its functions must have, LANES, the floats of a vector, and simd.h. CVK_BEST_ISA
// chooses among them. One set more is a part more below and a line more there. With CVK_DOTS there
// is one that multiplies pairs of bfloat16, HAS_DOTS there, and the baseline for every processor
// without, which computes so in tests alone; CVK_BEST_DOTS chooses among these. With
// CVK_BYTE_DOTS there are two that multiply four bytes each, HAS_BYTE_DOTS there, and no AVX-512
// without; CVK_BEST_BYTE_DOTS chooses among these.

#if defined(__x86_64__) && defined(__GLIBC__)
#if defined(CVK_DOTS)
namespace avx512bf16 {
#define LANES 16
#define HAS_DOTS 1
#define CVK_TARGET __attribute__((target("arch=x86-64-v4,avx512bf16")))
#include "simd.h"
#include CVK_SOURCE
#undef CVK_TARGET
#undef HAS_DOTS
#undef LANES
}  // namespace avx512bf16
#elif defined(CVK_BYTE_DOTS)
namespace avx512vnni {
#define LANES 16
#define HAS_BYTE_DOTS 1
#define CVK_TARGET __attribute__((target("arch=x86-64-v4,avx512vnni")))
#include "simd.h"
#include CVK_SOURCE
#undef CVK_TARGET
#undef HAS_BYTE_DOTS
#undef LANES
}  // namespace avx512vnni

namespace avxvnni {
#define LANES 8
#define HAS_BYTE_DOTS 1
#define CVK_TARGET __attribute__((target("arch=x86-64-v3,avxvnni")))
#include "simd.h"
#include CVK_SOURCE
#undef CVK_TARGET
#undef HAS_BYTE_DOTS
#undef LANES
}  // namespace avxvnni
#else
namespace avx512 {
#define LANES 16
#define CVK_TARGET __attribute__((target("arch=x86-64-v4")))
#include "simd.h"
#include CVK_SOURCE
#undef CVK_TARGET
#undef LANES
}  // namespace avx512
#endif

#if !defined(CVK_DOTS)
namespace avx2 {
#define LANES 8
#define CVK_TARGET __attribute__((target("arch=x86-64-v3")))
#include "simd.h"
#include CVK_SOURCE
#undef CVK_TARGET
#undef LANES
}  // namespace avx2
#endif
#endif

namespace baseline {
#define LANES 4
#define CVK_TARGET
#include "simd.h"
#include CVK_SOURCE
#undef CVK_TARGET
#undef LANES
}  // namespace baseline

// RUN(name), which returns, of the best set that the processor has.
#if defined(__x86_64__) && defined(__GLIBC__)
#define CVK_BEST_ISA(RUN)                           \
  do {                                              \
    if (takes(InstructionSet::AVX512)) RUN(avx512); \
    if (takes(InstructionSet::AVX2)) RUN(avx2);     \
    RUN(baseline);                                  \
  } while (false)
#define CVK_BEST_DOTS(RUN)                                   \
  do {                                                       \
    if (takes(InstructionSet::AVX512_BF16)) RUN(avx512bf16); \
    RUN(baseline);                                           \
  } while (false)
#define CVK_BEST_BYTE_DOTS(RUN)                              \
  do {                                                       \
    if (takes(InstructionSet::AVX512_VNNI)) RUN(avx512vnni); \
    if (takes(InstructionSet::AVX_VNNI)) RUN(avxvnni);       \
    if (takes(InstructionSet::AVX2)) RUN(avx2);              \
    RUN(baseline);                                           \
  } while (false)
#else
#define CVK_BEST_ISA(RUN) RUN(baseline)
#define CVK_BEST_DOTS(RUN) RUN(baseline)
#define CVK_BEST_BYTE_DOTS(RUN) RUN(baseline)
#endif

#undef CVK_SOURCE
#undef CVK_DOTS
#undef CVK_BYTE_DOTS
