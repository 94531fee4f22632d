"""Squeeze-and-excitation against the stock modules, eager and compiled, on the networks' own maps.

Every block of SE-ResNet-50, with the addition and the ReLU that follow it, and of EfficientNet-B0;
then squeeze and scale alone, backward, and the host's time per call on a few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.case import Case, Conditions, cases_of, variants_of
from cvkernels import record
from cvkernels.functional import se_scale, squeeze, squeeze_excite
from cvkernels.ops.squeeze_excite.reference import (
    se_scale_reference,
    squeeze_excite_reference,
    squeeze_reference,
)
from tests.support.cases.squeeze_excite import NETWORKS, Map, make_layers, make_map

QUICK = ("seresnet50.layer1", "seresnet50.layer4", "efficientnet_b0.1", "efficientnet_b0.6.1")
BACKWARD = ("seresnet50.layer1", "seresnet50.layer4", "efficientnet_b0.3.1")
ALONE = ("seresnet50.layer1", "efficientnet_b0.1", "efficientnet_b0.6.1")
HOST = ("small", Map(2, 32, 8, 4, 4, "silu"))


def stock(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, act: str,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What timm's and torchvision's modules call: the mean, two 1x1 convolutions, the product."""
    y = F.conv2d(x.mean((2, 3), keepdim=True), weight1, bias1)
    y = y.relu_() if act == "relu" else F.silu(y, inplace=True)
    y = x * F.conv2d(y, weight2, bias2).sigmoid()
    if residual is None:
        return y
    y += residual
    return y.relu_()


def in_order(weight1, bias1, weight2, bias2, act: str, residual: Tensor | None = None) -> tuple:
    """Stock's arguments after x as those of squeeze_excite: an addition is followed by a ReLU."""
    return weight1, bias1, weight2, bias2, act, residual, "none" if residual is None else "relu"


def block(function: Callable) -> Callable:
    """The whole block, ours or the reference's, with stock's arguments."""
    return lambda x, *others: function(x, *in_order(*others))


class InBlock:
    """The block as our residual blocks call it: they own x, and the call has been checked before.

    The result is written over x, which :meth:`fresh` makes, untimed; it plans the call too.
    """

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._run: Callable | None = None

    def fresh(self, x: Tensor, *others) -> tuple:
        self._x = x.clone() if self._x is None else self._x.copy_(x)
        self._run = squeeze_excite.plan(self._x, *in_order(*others), out=self._x).run
        return self._x, *others

    def answers(self, *arguments) -> list[Tensor]:
        return [self(*self.fresh(*arguments))]

    def __call__(self, x: Tensor, *others) -> Tensor:
        call = in_order(*others)
        if self._run is None or record.current() is not None:
            return squeeze_excite(x, *call, out=x)
        return self._run(x, call[5], x)


def scaled(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.sigmoid(gate)[:, :, None, None]


def block_inputs(m: Map, at: Conditions, residual: bool) -> tuple[tuple, dict]:
    x = make_map(m, at.dtype, torch.channels_last, at.device)
    layers = [
        layer.contiguous(memory_format=torch.channels_last) if layer.dim() == 4 else layer
        for layer in make_layers(m, at.dtype, at.device)
    ]
    added = [make_map(m, at.dtype, torch.channels_last, at.device)] if residual else []
    at.leaves(x, *layers, *added)
    return (x, *layers, m.act, *added), {}


def map_inputs(m: Map, at: Conditions, gate: bool) -> tuple[tuple, dict]:
    x = make_map(m, at.dtype, torch.channels_last, at.device)
    return (x, torch.randn(m.N, m.C, device=at.device).to(at.dtype))[: 1 + gate], {}


def traffic(m: Map, at: Conditions, residual: bool) -> int:
    """Compulsory bytes: maps, parameters, and what the two passes over a map cannot share.

    Forward reads x for the squeeze and again for the scale, but where the cache holds an image: on
    a CPU only once. In place it is the same. Backward reads x and the gradient for the gates, and
    the gradient again for that of x; with a ReLU also its output, and it writes the gradient behind
    it.
    """
    size = m.N * m.C * m.H * m.W
    layers = 2 * m.C * m.R + m.C + m.R
    if at.part == "backward":
        return ((4 + 2 * residual) * size + 2 * layers) * at.dtype.itemsize
    return ((3 + residual) * size + layers) * at.dtype.itemsize


def block_case(name: str, m: Map, at: Conditions) -> Case:
    m = m._replace(N=at.batch)
    residual = name.startswith("seresnet")
    variants = variants_of(stock, lambda: block(squeeze_excite))
    if at.part == "forward":
        variants["cvkernels in a block"] = InBlock
    return at.case(
        "squeeze_excite",
        name,
        f"{m.N}x{m.C}x{m.H}x{m.W} R {m.R}{' + residual' * residual}",
        inputs=functools.partial(block_inputs, m, at, residual),
        reference=block(squeeze_excite_reference),
        variants=variants,
        bytes=traffic(m, at, residual),
    )


# op, stock, reference, ours, maps that are read or written: squeeze and se_scale alone
PARTS = (
    ("squeeze", squeeze_reference, squeeze_reference, squeeze, 1),
    ("se_scale", scaled, se_scale_reference, se_scale, 2),
)


def part_cases(name: str, m: Map, at: Conditions) -> list[Case]:
    vectors = m.N * m.C * at.dtype.itemsize
    return [
        at.case(
            op,
            name,
            f"{m.N}x{m.C}x{m.H}x{m.W}",
            inputs=functools.partial(map_inputs, m, at, op == "se_scale"),
            reference=reference,
            variants=variants_of(peer, lambda ours=ours: ours),
            bytes=vectors * (1 + maps * m.H * m.W),
        )
        for op, peer, reference, ours, maps in PARTS
    ]


block_cases = cases_of(block_case, NETWORKS, QUICK, HOST, BACKWARD)


def cases(
    device: torch.device, dtypes: list[torch.dtype], batch: int, quick: bool = False
) -> list[Case]:
    """The blocks', and then those of squeeze and se_scale."""
    made = block_cases(device, dtypes, batch, quick)
    for dtype in dtypes:
        for name in ALONE:
            if name in QUICK or not quick:
                m = NETWORKS[name]._replace(N=batch)
                made += part_cases(name, m, Conditions(batch, dtype, device))
    return made


def test_squeeze_excite(measure):
    measure()
