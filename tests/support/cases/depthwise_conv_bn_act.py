"""Shapes and inputs of depthwise_conv_bn_act that its tests and its benchmark share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem
from tests.support.cases.conv_bn_act import make_bn


class Depthwise(NamedTuple):
    """x[N, C, size, size], weight[C, 1, kernel, kernel], padded so that stride 1 keeps the size."""

    C: int
    size: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return f"{self.C}x{self.size}x{self.size}-{self.kernel}x{self.kernel}-s{self.stride}"


# Every distinct one, at 224 x 224 and at 384 x 384, by the first block that has it.
EFFICIENTNET_B0 = {
    "b0.1.0": Depthwise(32, 112, 3, 1),
    "b0.2.0": Depthwise(96, 112, 3, 2),
    "b0.2.1": Depthwise(144, 56, 3, 1),
    "b0.3.0": Depthwise(144, 56, 5, 2),
    "b0.3.1": Depthwise(240, 28, 5, 1),
    "b0.4.0": Depthwise(240, 28, 3, 2),
    "b0.4.1": Depthwise(480, 14, 3, 1),
    "b0.5.0": Depthwise(480, 14, 5, 1),
    "b0.5.1": Depthwise(672, 14, 5, 1),
    "b0.6.0": Depthwise(672, 14, 5, 2),
    "b0.6.1": Depthwise(1152, 7, 5, 1),
    "b0.7.0": Depthwise(1152, 7, 3, 1),
}
EFFICIENTNET_V2_S = {
    "v2_s.4.0": Depthwise(256, 48, 3, 2),
    "v2_s.4.1": Depthwise(512, 24, 3, 1),
    "v2_s.5.0": Depthwise(768, 24, 3, 1),
    "v2_s.5.1": Depthwise(960, 24, 3, 1),
    "v2_s.6.0": Depthwise(960, 24, 3, 2),
    "v2_s.6.1": Depthwise(1536, 12, 3, 1),
}
NETWORKS = EFFICIENTNET_B0 | EFFICIENTNET_V2_S


def problem_of(shape: Depthwise, batch: int, dtype=torch.bfloat16) -> DepthwiseProblem:
    """The call of a network's block, which gives the sums of its output too."""
    C, size, kernel, stride = shape
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1))
    return DepthwiseProblem(
        batch, C, size, size, C, kernel, kernel, *geometry, C, dtype, "silu", has_bn=True,
        squeeze=True,
    )  # fmt: skip


# N, C, H, W, kernel, stride, padding, and a dilation that is not 1
CASES = {
    "49-pixels": (2, 24, 7, 7, 3, 1, 1),
    "channels-24": (1, 24, 6, 9, 5, 1, 2),
    "channels-not-8": (3, 37, 9, 5, 3, 2, 1),
    "few-channels": (2, 3, 21, 16, 5, 1, 2),
    "one-channel": (3, 1, 6, 8, 3, 1, 1),
    "unpadded": (1, 40, 8, 9, 5, 2, 0),
    "one-pixel": (2, 20, 1, 1, 3, 1, 1),
    "kernel-larger-than-x": (1, 16, 2, 3, 5, 2, 2),
    "wide-padding": (1, 18, 3, 4, 3, 1, (4, 3)),
    "bands": (1, 17, 61, 8, 3, 1, 1),  # more rows than one task of the native op makes
    "wide": (1, 16, 3, 130, 3, 1, 1),  # more columns than a tile of Triton's has
    "tall": (1, 8, 33, 4, 5, 2, 2),
    "empty-batch": (0, 24, 7, 7, 3, 1, 1),
}
LARGE = {
    "effnet-b0-112": (2, 32, 112, 112, 3, 1, 1),
    "effnet-b0-112-s2": (1, 96, 112, 112, 3, 2, 1),
    "effnet-b0-56-5x5-s2": (1, 144, 56, 56, 5, 2, 2),
    "effnet-b0-14-5x5": (2, 672, 14, 14, 5, 1, 2),
    "effnet-b0-7-5x5": (2, 1152, 7, 7, 5, 1, 2),
    "effnet-v2-24-s2": (1, 256, 24, 24, 3, 2, 1),
}
# What only Triton's kernel has, and what none has.
UNCOMMON = {
    "mixed": (1, 18, 9, 11, 3, (2, 1), (3, 0), (1, 2)),
    "dilated": (1, 12, 13, 10, 3, 1, 2, 2),
    "dilated-5x5-stride-3": (1, 10, 17, 12, 5, 3, 4, (2, 3)),
    "stride-3": (1, 12, 15, 14, 3, 3, 1),
}
OTHER_KERNELS = {
    "7x7": (1, 12, 15, 14, 7, 1, 1),
    "3x5": (1, 12, 15, 14, (3, 5), 1, 1),
}


def make_inputs(case, dtype=torch.float32, memory_format=torch.channels_last, device="cpu"):
    """Arguments and options of the op, with bias and batch norm."""
    N, C, H, W, kernel, stride, padding, *dilation = case
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randn(N, C, H, W, device=device).to(dtype).contiguous(memory_format=memory_format)
    weight = (torch.randn(C, 1, height, width, device=device) / height).to(dtype)
    args = (x, weight, torch.randn(C, device=device), make_bn(C, device=device))
    options = {"stride": stride, "padding": padding, "act": "silu"}
    return args, options | ({"dilation": dilation[0]} if dilation else {})
