"""Squeeze-and-excitation: as one op, and its gates alone where convolutions take the rest over."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvkernels.freeze.graph import Node, Op, Run, Step
from cvkernels.ops.squeeze_excite import excite as excite_op
from cvkernels.ops.squeeze_excite import op as squeeze_excite
from cvkernels.ops.squeeze_excite import scale as scale_op
from cvkernels.ops.squeeze_excite import squeeze as squeeze_op

if TYPE_CHECKING:
    from cvkernels.freeze.lower import Lowered
    from cvkernels.freeze.steps import Site


class _Layers(Op):
    """The two linear layers of squeeze-and-excitation, with ``act`` between them."""

    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    act: str

    @property
    def layers(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """weight1, bias1, weight2, bias2; the weights of 1x1 convolutions as matrices."""
        return (self.weight1.flatten(1), self.bias1, self.weight2.flatten(1), self.bias2)


class SqueezeExcite(
    _Layers, name="se", runs_plans=True, writes=True, in_place=True, placeable=True
):
    """``out_act(x * sigmoid(fc2(act(fc1(mean of x)))) + residual)``."""

    out_act: str = "none"
    roles: tuple[str, ...] = ("x",)

    @property
    def is_plain(self) -> bool:
        """Whether no addition and no activation is fused behind it yet."""
        return self.out_act == "none" and "residual" not in self.roles

    def build(self, site: Site) -> Run:
        x, residual = site.role("x"), site.role("residual")
        options = (self.act, site.like(residual), self.out_act)
        plan, out = squeeze_excite.plan, site.like(site.out)
        excite = site.plan(plan, site.like(x), *self.layers, *options, out=out)
        return site.written(lambda env, y: excite(env[x], env[residual], y))


class Squeeze(Op, name="squeeze", runs_plans=True, kept=True):
    """The mean of each channel of x over all pixels, [N, C]."""

    def shape(self, node: Node, x: tuple) -> tuple:
        return x[:2]

    def build(self, site: Site) -> Run:
        (x,) = site.inputs
        squeeze = site.plan(squeeze_op.plan, site.like(x))
        return site.computed(lambda env: squeeze(env[x]))


class Excite(_Layers, name="excite", runs_plans=True, kept=True):
    """The gates, computed from the sums of a map over its pixels, or from its mean.

    Without ``sigmoid`` they are logits, and the step that multiplies by them applies it; ``count``
    are the pixels of a sum.
    """

    sigmoid: bool = True
    count: int | None = None

    def shape(self, node: Node, pooled: tuple) -> tuple:
        return (pooled[0], self.weight2.shape[0])

    def lower(self, node: Node, lowered: Lowered) -> Step:
        (pooled,), count = node.inputs, None
        x = lowered.of[pooled].inputs[0].value
        if not isinstance(pooled.op, Squeeze):
            count = x.shape[2] * x.shape[3]
        op = replace(self, sigmoid=node not in lowered.logits, count=count)
        dtype = x.dtype if x.dtype.is_floating_point else torch.float32
        return lowered.emit(op, node, value=lowered.values[node]._replace(dtype=dtype))

    def build(self, site: Site) -> Run:
        (pooled,), options = site.inputs, {"sigmoid": self.sigmoid, "count": self.count}
        excite = site.plan(excite_op.plan, site.like(pooled), *self.layers, self.act, **options)
        return site.computed(lambda env: excite(env[pooled]))


class Scale(Op, name="scale", runs_plans=True, writes=True, in_place=True, placeable=True):
    """``x * sigmoid(gate)``, a step before a convolution whose backend takes no gates."""

    def build(self, site: Site) -> Run:
        x, gate = site.inputs
        scale = site.plan(scale_op.plan, site.like(x), site.like(gate), out=site.like(site.out))
        return site.written(lambda env, y: scale(env[x], env[gate], None, y))
