// One source compiled for each instruction set: included inside an op's namespace with the source's
// name as CVK_SOURCE. In a namespace of the set's name the source sees CVK_TARGET, the attribute
// that each of its functions must have, LANES, the floats of a vector, and simd.h. CVK_BEST_ISA
// chooses among them. One set more is a part more below and a line more there.

#if defined(__x86_64__) && defined(__GLIBC__)
namespace avx512 {
#define LANES 16
#define CVK_TARGET __attribute__((target("arch=x86-64-v4")))
#include "simd.h"
#include CVK_SOURCE
#undef CVK_TARGET
#undef LANES
}  // namespace avx512

namespace avx2 {
#define LANES 8
#define CVK_TARGET __attribute__((target("arch=x86-64-v3")))
#include "simd.h"
#include CVK_SOURCE
#undef CVK_TARGET
#undef LANES
}  // namespace avx2
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
#define CVK_BEST_ISA(RUN)                                 \
  do {                                                    \
    if (__builtin_cpu_supports("x86-64-v4")) RUN(avx512); \
    if (__builtin_cpu_supports("x86-64-v3")) RUN(avx2);   \
    RUN(baseline);                                        \
  } while (false)
#else
#define CVK_BEST_ISA(RUN) RUN(baseline)
#endif

#undef CVK_SOURCE
