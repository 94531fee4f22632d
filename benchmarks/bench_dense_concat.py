"""dense_concat against what stock DenseNet and GoogLeNet do: a copy, and norm + ReLU of a concat.

There is no backward row: the op is not differentiable.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from benchmarks.harness.case import Case, Conditions, batch_norm, cases_of, variants_of
from cvkernels.functional import BatchNormParams, dense_concat
from cvkernels.ops.dense_concat.reference import appended


class Append(NamedTuple):
    """src[N, C, H, W], a prefix of ``width`` channels' buffer, to the channels from ``start`` of
    one with ``total``; H and W as at images of 224 x 224."""

    C: int
    H: int
    W: int
    width: int
    total: int
    start: int
    norm: bool = False


APPENDS = {
    "densenet121-block1": Append(32, 56, 56, 32, 256, 96),
    "densenet121-block4": Append(32, 7, 7, 32, 1024, 512),
    "densenet161-block2": Append(48, 28, 28, 48, 768, 384),
    "googlenet-3a": Append(64, 28, 28, 64, 256, 0),
    "norm1-of-a-prefix": Append(160, 56, 56, 256, 160, 0, True),
    "norm1-of-a-long-prefix": Append(736, 14, 14, 1024, 736, 0, True),
    "odd": Append(19, 31, 45, 19, 67, 5, True),  # nothing divides a vector
}
QUICK = ("densenet121-block1", "norm1-of-a-prefix", "odd")
HOST = ("one-pixel", Append(8, 1, 1, 8, 16, 8))


def traffic(append: Append, at: Conditions) -> int:
    """src read once, the slice written once, the norm's four vectors."""
    elements = 2 * at.batch * append.C * append.H * append.W
    return elements * at.dtype.itemsize + 4 * 4 * append.C * append.norm


def inputs_of(append: Append, at: Conditions) -> tuple[tuple, dict]:
    bn = batch_norm(append.C, at.device) if append.norm else None
    src = at.image(append.width, append.H, append.W)[:, : append.C]
    buffer = at.image(append.total, append.H, append.W)
    return (buffer, src, append.start, bn, append.norm), {}


def copied(buffer: Tensor, src: Tensor, start: int, bn: BatchNormParams | None, relu: bool):
    """PyTorch's own: norm, ReLU, and a copy into the slice."""
    target = buffer[:, start : start + src.shape[1]]
    target.copy_(appended(src, bn, relu))
    return target


def written(buffer: Tensor, src: Tensor, start: int, bn: BatchNormParams | None, relu: bool):
    return dense_concat(buffer, src, start, bn, relu)[:, start : start + src.shape[1]]


def case_of(name: str, append: Append, at: Conditions) -> Case:
    norm = " norm + relu" if append.norm else ""
    return at.case(
        "dense_concat",
        name,
        f"{at.batch}x{append.C}x{append.H}x{append.W} into {append.total}{norm}",
        inputs=functools.partial(inputs_of, append, at),
        reference=lambda buffer, src, start, bn, relu: appended(src, bn, relu),
        variants=variants_of(copied, lambda: written),
        bytes=traffic(append, at),
        bitwise=not append.norm,
    )


cases = cases_of(case_of, APPENDS, QUICK, HOST)


def test_dense_concat(measure):
    measure()
