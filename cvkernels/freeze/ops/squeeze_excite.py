"""Squeeze-and-excitation: as a whole, and in parts around a depthwise convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from cvkernels import functional
from cvkernels.freeze.graph import Node, Op, Run, Step
from cvkernels.ops.squeeze_excite.native import ACTS

if TYPE_CHECKING:
    from cvkernels.freeze.lower import Lowered
    from cvkernels.freeze.steps import Site


class _Layers(Op):
    """The two layers, with ``act`` between them."""

    @property
    def layers(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Weights, as matrices, and biases."""
        return (self.weight1.flatten(1), self.bias1, self.weight2.flatten(1), self.bias2)


@dataclass(frozen=True, eq=False)
class SqueezeExcite(_Layers):
    """``out_act(x * sigmoid(fc2(act(fc1(mean of x)))) + residual)``."""

    name = "se"
    kernel = "squeeze_excite_native_out"
    writes = True
    in_place = True
    placeable = True
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    act: str
    out_act: str = "none"
    roles: tuple[str, ...] = ("x",)

    @property
    def is_plain(self) -> bool:
        """Whether nothing follows yet."""
        return self.out_act == "none" and "residual" not in self.roles

    def build(self, site: Site) -> Run:
        x, residual = site.role("x"), site.role("residual")
        layers, acts = self.layers, (self.act, self.out_act)
        excite = functional.squeeze_excite
        if site.native:
            excite, acts = site.kernel, (ACTS[self.act], ACTS[self.out_act])
            return site.written(
                lambda env, y: excite(env[x], *layers, acts[0], env[residual], acts[1], y)
            )
        return site.written(
            lambda env, y: excite(env[x], *layers, acts[0], env[residual], acts[1], out=y)
        )


@dataclass(frozen=True, eq=False)
class Excite(_Layers):
    """The gates from sums over ``count`` pixels; logits, where the step after it has a sigmoid."""

    name = "excite"
    kernel = "excite_native"
    kept = True
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    act: str
    sigmoid: bool = True
    count: int = 1

    def lower(self, node: Node, lowered: Lowered) -> Step:
        conv = lowered.of[node.inputs[0]].inputs[0].value
        count = conv.shape[2] * conv.shape[3]
        op = replace(self, sigmoid=node not in lowered.logits, count=count)
        return lowered.emit(op, node, value=lowered.values[node]._replace(dtype=conv.dtype))

    def build(self, site: Site) -> Run:
        (sums,), layers, sigmoid, count = site.inputs, self.layers, self.sigmoid, self.count
        if site.native:
            excite, act = site.kernel, ACTS[self.act]
            return site.computed(lambda env: excite(env[sums], *layers, act, sigmoid, count))
        options = {"act": self.act, "sigmoid": sigmoid, "count": count}
        return site.computed(lambda env: functional.excite(env[sums], *layers, **options))


@dataclass(frozen=True, eq=False)
class Scale(Op):
    """``x * sigmoid(gate)``, before a convolution that does not take the gate along."""

    name = "scale"
    kernel = "se_scale_native_out"
    writes = True
    in_place = True
    placeable = True

    def build(self, site: Site) -> Run:
        x, gate = site.inputs
        if site.native:
            write = site.kernel
            return site.written(lambda env, y: write(env[x], env[gate], None, 0, y))
        return site.written(lambda env, y: functional.se_scale(env[x], env[gate], out=y))
