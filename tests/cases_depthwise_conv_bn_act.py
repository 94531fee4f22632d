"""The depthwise convolutions of the networks, which the op's tests and its benchmark share."""

from __future__ import annotations

from typing import NamedTuple


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
