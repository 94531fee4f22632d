// Writing outputs that are larger than the caches: memory in huge pages, and stores that do not
// read the memory first. Host only; no torch header.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace cvkernels {

// Bytes from which fresh memory is worth a system call, and from which no cache keeps an output.
constexpr int64_t HUGE_BYTES = 1 << 22;
constexpr int64_t UNCACHED_BYTES = 1 << 23;

// Asks for huge pages in [data, data + bytes): the first write to fresh memory is an interrupt for
// each page, which for pages of 4 KB takes several times as long as the write. A hint: it changes
// no content, and a system without huge pages ignores it.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 1 << 21;
  if (bytes < HUGE_BYTES) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + PAGE - 1) / PAGE * PAGE, last = (start + bytes) / PAGE * PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// memcpy past the caches. Call finish_streams() before another thread may read what it wrote.
inline void stream(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t LINE = 64;
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
  const int64_t skew = -reinterpret_cast<intptr_t>(out) & (LINE - 1);
  const int64_t head = skew < bytes ? skew : bytes;
  std::memcpy(out, in, head);
  int64_t done = head;
  for (; done + LINE <= bytes; done += LINE)
    for (int64_t i = 0; i < LINE; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + done + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + done + i)));
  std::memcpy(out + done, in + done, bytes - done);
#else
  std::memcpy(to, from, bytes);
#endif
}

inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace cvkernels
