// A digest of a sample of tensors' contents: what a cache of values derived from parameters
// compares to find that they were written. No torch header.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace cvkernels {

// Strides are in elements. Of a whole tensor every element is read; of a weight [K, C, ...] max(K,
// C) elements that touch every filter, every input channel and, where these are enough, every tap.
struct Sampled {
  uint64_t data;
  int64_t itemsize;
  std::vector<int64_t> sizes, strides;
  bool whole;
};

class Sample {
 public:
  explicit Sample(const std::vector<Sampled>& tensors) {
    for (const Sampled& tensor : tensors) add(tensor);
    int64_t lines = 0;
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (lines == 0) starts_.push_back(i);
      lines += blocks_[i].lines();
      if (lines >= PART) lines = 0;
    }
    starts_.push_back(blocks_.size());
  }

  // Any change of one sampled element changes it. The addresses are read blindly. parallel_for(n,
  // f) calls f(i) for each i < n.
  template <typename ParallelFor>
  uint64_t digest(ParallelFor parallel_for) const {
    std::vector<uint64_t> parts(starts_.size() - 1);
    parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t i) { parts[i] = part(i); });
    Lanes lanes;
    for (const uint64_t digest : parts) lanes.add(0, digest);
    return lanes.sum();
  }

 private:
  static constexpr int64_t LINE = 64;
  // Cache lines that are asked for ahead, and most of a block.
  static constexpr int64_t LINES = 96, BLOCK = 32;
  // Lines that a thread is worth waking for: the misses of a few microseconds.
  static constexpr int64_t PART = 384;

  // `count` elements at offsets_[first...] bytes from data, or where first < 0, `count` bytes
  // there.
  struct Block {
    const char* data;
    int64_t first, count, itemsize;

    int64_t lines() const { return first < 0 ? (count + LINE - 1) / LINE : count; }
  };

  // Four chains of multiplications, which overlap. Each step is one to one in the state and in the
  // value, and the sum in each lane.
  struct Lanes {
    uint64_t at[4] = {0x9e3779b97f4a7c15, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9,
                      0x27d4eb2f165667c5};

    void add(int lane, uint64_t value) {
      at[lane] = std::rotl((at[lane] ^ value) * 0xff51afd7ed558ccd, 29);
    }
    uint64_t sum() const {
      uint64_t sum = at[0] + std::rotl(at[1], 17) + std::rotl(at[2], 31) + std::rotl(at[3], 47);
      sum = (sum ^ (sum >> 33)) * 0xc4ceb9fe1a85ec53;
      return sum ^ (sum >> 29);
    }
  };

  template <typename Word>
  static uint64_t load(const char* from) {
    Word word;
    std::memcpy(&word, from, sizeof(Word));
    return word;
  }

  template <typename Word>
  void mix_elements(const Block& block, Lanes& lanes) const {
    const int32_t* offsets = offsets_.data() + block.first;
    Lanes own = lanes;
    int64_t i = 0;
    for (; i + 4 <= block.count; i += 4)
      for (int lane = 0; lane < 4; ++lane)
        own.add(lane, load<Word>(block.data + offsets[i + lane]));
    for (; i < block.count; ++i) own.add(i % 4, load<Word>(block.data + offsets[i]));
    lanes = own;
  }

  static void mix_bytes(const Block& block, Lanes& lanes) {
    const char *data = block.data, *end = data + block.count;
    Lanes own = lanes;
    for (; end - data >= 32; data += 32)
      for (int lane = 0; lane < 4; ++lane) own.add(lane, load<uint64_t>(data + 8 * lane));
    for (int lane = 0; data < end; ++lane, data += 8) {
      uint64_t value = 0;
      std::memcpy(&value, data, end - data < 8 ? end - data : 8);
      own.add(lane, value);
    }
    lanes = own;
  }

  uint64_t part(int64_t index) const {
    Lanes lanes;
    int64_t in_flight = 0;
    const Block* block = blocks_.data() + starts_[index];
    const Block *next = block, *end = blocks_.data() + starts_[index + 1];
    for (; block != end; ++block) {
      for (; next != end && in_flight < LINES; ++next) in_flight += prefetch(*next);
      mix(*block, lanes);
      in_flight -= block->lines();
    }
    return lanes.sum();
  }

  void mix(const Block& block, Lanes& lanes) const {
    if (block.first < 0) return mix_bytes(block, lanes);
    if (block.itemsize == 1) return mix_elements<uint8_t>(block, lanes);
    if (block.itemsize == 2) return mix_elements<uint16_t>(block, lanes);
    if (block.itemsize == 4) return mix_elements<uint32_t>(block, lanes);
    mix_elements<uint64_t>(block, lanes);
  }

  // Returns how many lines.
  int64_t prefetch(const Block& block) const {
    const int64_t lines = block.lines(), first = block.first;
    for (int64_t i = 0; i < lines; ++i)
      __builtin_prefetch(block.data + (first < 0 ? i * LINE : offsets_[first + i]));
    return lines;
  }

  void add(const Sampled& tensor) {
    const auto& [data, itemsize, sizes, strides, whole] = tensor;
    if (itemsize != 1 && itemsize != 2 && itemsize != 4 && itemsize != 8)
      throw std::invalid_argument("Sample: an element must have 1, 2, 4 or 8 bytes");
    if (sizes.size() != strides.size() || (!whole && sizes.size() < 2))
      throw std::invalid_argument("Sample: a tensor needs as many strides as sizes, a weight two");
    const auto count_from = [&](size_t axis) {
      return std::accumulate(sizes.begin() + axis, sizes.end(), int64_t{1}, std::multiplies<>());
    };
    const int64_t count = count_from(0);
    if (count == 0) return;
    // The offset in bytes of an index that runs over the axes from `axis` on.
    const auto offset_of = [&](int64_t index, size_t axis) {
      int64_t offset = 0;
      for (size_t d = sizes.size(); d-- > axis; index /= sizes[d])
        offset += index % sizes[d] * strides[d];
      return offset * itemsize;
    };
    const auto* base = reinterpret_cast<const char*>(data);
    if (!whole) {
      const int64_t K = sizes[0], C = sizes[1], taps = count_from(2);
      int64_t step = 7;
      while (std::gcd(step, taps) != 1) --step;
      const int64_t elements = std::max(K, C);
      for (int64_t i = 0; i < elements; ++i)
        add_element(base +
                        (i * K / elements * strides[0] + i * C / elements * strides[1]) * itemsize +
                        offset_of(i * step % taps, 2),
                    itemsize, i == 0);
      return;
    }
    bool dense = true;
    for (size_t d = 0; d < sizes.size(); ++d)
      dense = dense && (sizes[d] == 1 || strides[d] == count_from(d + 1));
    if (!dense) {
      for (int64_t i = 0; i < count; ++i) add_element(base + offset_of(i, 0), itemsize, i == 0);
      return;
    }
    for (int64_t byte = 0; byte < count * itemsize; byte += BLOCK * LINE)
      blocks_.push_back(
          {base + byte, -1, std::min(BLOCK * LINE, count * itemsize - byte), itemsize});
  }

  void add_element(const char* element, int64_t itemsize, bool starts) {
    if (!starts && blocks_.back().count < BLOCK) {
      Block& block = blocks_.back();
      const int64_t offset = element - block.data;
      if (offset == static_cast<int32_t>(offset)) {
        offsets_.push_back(static_cast<int32_t>(offset));
        ++block.count;
        return;
      }
    }
    blocks_.push_back({element, static_cast<int64_t>(offsets_.size()), 1, itemsize});
    offsets_.push_back(0);
  }

  std::vector<Block> blocks_;
  std::vector<size_t> starts_;  // of the parts, and the end
  std::vector<int32_t> offsets_;
};

}  // namespace cvkernels
