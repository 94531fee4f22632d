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

from benchmarks.harness.case import Case, variants_of
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
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    act: str,
    residual: Tensor | None = None,
) -> Tensor:
    """What timm's and torchvision's modules call: the mean, two 1x1 convolutions, the product."""
    y = F.conv2d(x.mean((2, 3), keepdim=True), weight1, bias1)
    y = y.relu_() if act == "relu" else F.silu(y, inplace=True)
    y = x * F.conv2d(y, weight2, bias2).sigmoid()
    if residual is None:
        return y
    y += residual
    return y.relu_()


def block(function: Callable) -> Callable:
    """The whole block, ours or the reference's, with stock's arguments."""

    def call(x: Tensor, *layers_act_residual) -> Tensor:
        *layers, act = layers_act_residual[:5]
        residual = layers_act_residual[5] if len(layers_act_residual) > 5 else None
        out_act = "none" if residual is None else "relu"
        return function(x, *layers, act, residual, out_act)

    return call


class InBlock:
    """The block as our residual blocks call it: they own x, and the call has been checked before.

    The result is written over x, which :meth:`fresh` makes, untimed; it plans the call too.
    """

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._run: Callable | None = None

    def fresh(self, x: Tensor, *others) -> tuple:
        self._x = x.clone() if self._x is None else self._x.copy_(x)
        self._run = squeeze_excite.plan(self._x, *self._call(*others), out=self._x).run
        return self._x, *others

    @staticmethod
    def _call(*layers_act_residual) -> tuple:
        residual = layers_act_residual[5] if len(layers_act_residual) > 5 else None
        return *layers_act_residual[:5], residual, "none" if residual is None else "relu"

    def answers(self, *arguments) -> list[Tensor]:
        return [self(*self.fresh(*arguments))]

    def __call__(self, x: Tensor, *layers_act_residual) -> Tensor:
        call = self._call(*layers_act_residual)
        if self._run is None or record.current() is not None:
            return squeeze_excite(x, *call, out=x)
        return self._run(x, call[5], x)


def scaled(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.sigmoid(gate)[:, :, None, None]


def block_inputs(
    m: Map, dtype: torch.dtype, device: torch.device, residual: bool, grad: bool
) -> tuple[tuple, dict]:
    x = make_map(m, dtype, torch.channels_last, device)
    layers = [
        layer.contiguous(memory_format=torch.channels_last) if layer.dim() == 4 else layer
        for layer in make_layers(m, dtype, device)
    ]
    added = [make_map(m, dtype, torch.channels_last, device)] if residual else []
    if grad:
        for leaf in (x, *layers, *added):
            leaf.requires_grad_()
    return (x, *layers, m.act, *added), {}


def map_inputs(m: Map, dtype: torch.dtype, device: torch.device, gate: bool) -> tuple[tuple, dict]:
    x = make_map(m, dtype, torch.channels_last, device)
    return (x, torch.randn(m.N, m.C, device=device).to(dtype))[: 1 + gate], {}


def traffic(m: Map, dtype: torch.dtype, residual: bool, part: str) -> int | None:
    """Compulsory bytes: maps, parameters, and what the two passes over a map cannot share.

    Forward reads x for the squeeze and again for the scale, but where the cache holds an image: on
    a CPU only once. In place it is the same. Backward reads x and the gradient for the gates, and
    the gradient again for that of x; with a ReLU also its output, and it writes the gradient behind
    it.
    """
    if part == "host":
        return None
    size = m.N * m.C * m.H * m.W
    layers = 2 * m.C * m.R + m.C + m.R
    if part == "forward":
        return ((3 + residual) * size + layers) * dtype.itemsize
    return ((4 + 2 * residual) * size + 2 * layers) * dtype.itemsize


def block_case(
    name: str, m: Map, dtype: torch.dtype, device: torch.device, part: str = "forward"
) -> Case:
    residual = name.startswith("seresnet")
    variants = variants_of(stock, lambda: block(squeeze_excite))
    if part == "forward":
        variants["cvkernels in a block"] = InBlock
    grad = part == "backward"
    return Case(
        op="squeeze_excite",
        name=name,
        shape=f"{m.N}x{m.C}x{m.H}x{m.W} R {m.R}{' + residual' * residual}",
        dtype=dtype,
        inputs=functools.partial(block_inputs, m, dtype, device, residual, grad),
        reference=block(squeeze_excite_reference),
        variants=variants,
        bytes=traffic(m, dtype, residual, part),
        part=part,
    )


def part_cases(name: str, m: Map, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """squeeze and se_scale alone."""
    size = m.N * m.C * m.H * m.W * dtype.itemsize
    vector = m.N * m.C * dtype.itemsize
    peers = {"squeeze": squeeze_reference, "se_scale": scaled}
    ours = {"squeeze": squeeze, "se_scale": se_scale}
    references = {"squeeze": squeeze_reference, "se_scale": se_scale_reference}
    return [
        Case(
            op=op,
            name=name,
            shape=f"{m.N}x{m.C}x{m.H}x{m.W}",
            dtype=dtype,
            inputs=functools.partial(map_inputs, m, dtype, device, op == "se_scale"),
            reference=references[op],
            variants=variants_of(peers[op], lambda op=op: ours[op]),
            bytes=vector + size * (1 if op == "squeeze" else 2),
        )
        for op in peers
    ]


def cases(
    device: torch.device, dtypes: list[torch.dtype], batch: int, quick: bool = False
) -> list[Case]:
    maps = {name: m._replace(N=batch) for name, m in NETWORKS.items() if name in QUICK or not quick}
    made = []
    for dtype in dtypes:
        made += [block_case(name, m, dtype, device) for name, m in maps.items()]
        for name in ALONE:
            if name in maps:
                made += part_cases(name, maps[name], dtype, device)
        backward = [name for name in BACKWARD if name in maps]
        made += [block_case(name, maps[name], dtype, device, "backward") for name in backward]
        made.append(block_case(*HOST, dtype, device, "host"))
    return made


def test_squeeze_excite(measure):
    measure()
