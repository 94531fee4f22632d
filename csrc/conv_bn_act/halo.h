// The sizes of one 3x3 convolution by conv_bn_act_halo_kernel and how it is cut. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/act.h"
#include "common/affine.h"

namespace cvkernels::conv_bn_act {

constexpr int HALO_WARPS = 8, HALO_THREADS = 32 * HALO_WARPS;
constexpr int STRIP = 8;     // pixels of a row of a strip: half the rows of a product
constexpr int OCTET = 8;     // 16-bit channels of 16 bytes
constexpr int PRODUCT = 16;  // channels that one product sums over

// One call: x[N, C, H, W] and out[N, K, H, W], whose channels are neighbours, and
// weight[K, 3, 3, C]. Strides are in elements.
//
// A strip is STRIP pixels wide and `rows` high. A patch, `strips_h` x `strips_w` strips of an image
// and a border of one pixel, lies in shared memory with `slices` times 16 of its channels; a tile
// is `patches` of them. A warp has two strips, one of `warps_n` parts of the output channels, and
// one of `warps_c` parts of a stage's slices.
struct Halo {
  int64_t N, x_stride_n, out_stride_n;
  int C, H, W, K;
  int x_stride_h, x_stride_w, out_stride_h, out_stride_w;
  Act act;
  int rows, columns, strips_h, strips_w, patches, warps_n, warps_c, slices, stages;
  BatchNorm bn;
  Vector bias;

  CVK_HOST_DEVICE int tile_h() const { return strips_h * rows; }
  CVK_HOST_DEVICE int tile_w() const { return strips_w * STRIP; }
  CVK_HOST_DEVICE int patch_w() const { return tile_w() + 2; }
  CVK_HOST_DEVICE int patch_pixels() const { return (tile_h() + 2) * patch_w(); }
  CVK_HOST_DEVICE int pairs() const { return patches * strips_h * strips_w / 2; }

  CVK_HOST_DEVICE int patches_w() const { return (W + tile_w() - 1) / tile_w(); }
  CVK_HOST_DEVICE int patches_of_image() const {
    return (H + tile_h() - 1) / tile_h() * patches_w();
  }
  CVK_HOST_DEVICE int64_t all_patches() const { return N * patches_of_image(); }
  CVK_HOST_DEVICE int64_t tiles() const { return (all_patches() + patches - 1) / patches; }

  CVK_HOST_DEVICE int all_slices() const { return (C + PRODUCT - 1) / PRODUCT; }
  CVK_HOST_DEVICE int chunks() const { return (all_slices() + slices - 1) / slices; }
  CVK_HOST_DEVICE int octets() const { return 2 * slices; }

  // Output channels with their padding, `columns` times 8 of each warp.
  CVK_HOST_DEVICE int all_columns() const { return warps_n * columns * 8; }

  // Shared memory, in units of 16 bytes: weights [9, all_slices * 2, all_columns], then stages of
  // [octets, plane], then scale and shift of all_columns.
  CVK_HOST_DEVICE int tap_units() const { return all_slices() * 2 * all_columns(); }
  CVK_HOST_DEVICE int weight_units() const { return 9 * tap_units(); }

  // An octet's pixels, and so many more that eight neighbouring lanes of a copy, which have eight
  // octets of a pixel, or four of two, or two of four, write to all banks.
  CVK_HOST_DEVICE int plane_units() const {
    const int offset = octets() > 8 ? 1 : 8 / octets();
    const int pixels = patches * patch_pixels();
    return pixels + ((offset - pixels) % 8 + 8) % 8;
  }

  // A stage also holds the sums that half of the warps give the others, where they share outputs.
  CVK_HOST_DEVICE int stage_units() const {
    const int planes = octets() * plane_units();
    const int sums = warps_c == 1 ? 0 : HALO_WARPS / 2 * rows * columns * 32;
    return planes > sums ? planes : sums;
  }

  CVK_HOST_DEVICE int64_t shared_bytes() const {
    const int64_t vectors = 2 * all_columns() * static_cast<int64_t>(sizeof(float));
    return (weight_units() + static_cast<int64_t>(stages) * stage_units()) * 16 + vectors;
  }
};

}  // namespace cvkernels::conv_bn_act
