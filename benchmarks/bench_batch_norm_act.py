"""batch_norm_act against stock batch norm with activation and shortcut in training, both ways."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.case import Case, Conditions, cases_of, variants_of
from cvkernels.functional import batch_norm_act
from cvkernels.ops.batch_norm_act.reference import batch_norm_act_reference


class Norm(NamedTuple):
    """x[N, C, H, W], a prefix of ``total`` channels; H and W as at images of 224 x 224."""

    C: int
    H: int
    W: int
    total: int
    act: str = "relu"
    adds: bool = False  # a shortcut, before the activation


NORMS = {
    "densenet121-norm0": Norm(64, 112, 112, 64),
    "densenet121-block1-norm1": Norm(160, 56, 56, 256),
    "densenet121-block1-norm2": Norm(128, 56, 56, 128),
    "densenet121-block3-norm1": Norm(736, 14, 14, 1024),
    "googlenet-3a-branch2": Norm(96, 28, 28, 96),
    "resnet50-layer1-bn3": Norm(256, 56, 56, 256, adds=True),
    "resnet50-layer4-bn3": Norm(2048, 7, 7, 2048, adds=True),
    "efficientnet_b0-2.1-expand": Norm(144, 56, 56, 144, "silu"),
    "odd": Norm(19, 31, 45, 19),  # nothing divides a vector
}
QUICK = ("densenet121-block1-norm1", "resnet50-layer1-bn3", "efficientnet_b0-2.1-expand", "odd")
HOST = ("one-pixel", Norm(8, 1, 1, 8))


def traffic(norm: Norm, at: Conditions) -> int:
    """Forward: x read for its statistics and to be normalised, out written. Backward, sums and
    gradient: grad and x read twice, d x written. With a shortcut it is read once, and in backward
    the output is read and the shortcut's gradient written."""
    elements = at.batch * norm.C * norm.H * norm.W
    maps = 3 + norm.adds if at.part == "forward" else 5 + 2 * norm.adds
    return maps * elements * at.dtype.itemsize


def inputs_of(norm: Norm, at: Conditions) -> tuple[tuple, dict]:
    def make() -> Tensor:
        return at.image(norm.total, norm.H, norm.W)[:, : norm.C]

    weight, bias = torch.randn(2, norm.C, device=at.device)
    shortcut = make() if norm.adds else None
    x = make()
    at.leaves(x, shortcut)
    return (x, weight, bias, shortcut), {}


def stock(act: str, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
    return batch_norm_act_reference(x, weight, bias, 1e-5, act, shortcut)[0]


def eager(act: str, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, True)
    if shortcut is not None:
        y += shortcut
    activate = torch.nn.functional.relu if act == "relu" else torch.nn.functional.silu
    return activate(y, inplace=True)


def fused(act: str, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None) -> Tensor:
    return batch_norm_act(x, weight, bias, act=act, residual=shortcut).out


def case_of(name: str, norm: Norm, at: Conditions) -> Case:
    return at.case(
        "batch_norm_act",
        name,
        f"{at.batch}x{norm.C}x{norm.H}x{norm.W} of {norm.total}",
        inputs=functools.partial(inputs_of, norm, at),
        reference=functools.partial(stock, norm.act),
        variants=variants_of(
            functools.partial(eager, norm.act), lambda: functools.partial(fused, norm.act)
        ),
        bytes=traffic(norm, at),
    )


cases = cases_of(case_of, NORMS, QUICK, HOST, backward=NORMS)


def test_batch_norm_act(measure):
    measure()
