"""Squeeze-and-excitation: as a whole, and in parts around a depthwise convolution."""

from __future__ import annotations

from dataclasses import replace
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

    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    act: str

    @property
    def layers(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Weights, as matrices, and biases."""
        return (self.weight1.flatten(1), self.bias1, self.weight2.flatten(1), self.bias2)


class SqueezeExcite(
    _Layers, name="se", kernel="squeeze_excite_native_out",
    writes=True, in_place=True, placeable=True,
):  # fmt: skip
    """``out_act(x * sigmoid(fc2(act(fc1(mean of x)))) + residual)``."""

    out_act: str = "none"
    roles: tuple[str, ...] = ("x",)

    @property
    def is_plain(self) -> bool:
        """Whether nothing follows yet."""
        return self.out_act == "none" and "residual" not in self.roles

    def build(self, site: Site) -> Run:
        x, residual = site.role("x"), site.role("residual")
        layers, act, out_act = self.layers, self.act, self.out_act
        if (write := site.kernel) is not None:
            act, out_act = ACTS[act], ACTS[out_act]
            return site.written(
                lambda env, y: write(env[x], *layers, act, env[residual], out_act, y)
            )
        excite = functional.squeeze_excite
        return site.written(
            lambda env, y: excite(env[x], *layers, act, env[residual], out_act, out=y)
        )


class Excite(_Layers, name="excite", kernel="excite_native", kept=True):
    """The gates from sums over ``count`` pixels; logits, where the step after it has a sigmoid."""

    sigmoid: bool = True
    count: int = 1

    def lower(self, node: Node, lowered: Lowered) -> Step:
        conv = lowered.of[node.inputs[0]].inputs[0].value
        count = conv.shape[2] * conv.shape[3]
        op = replace(self, sigmoid=node not in lowered.logits, count=count)
        return lowered.emit(op, node, value=lowered.values[node]._replace(dtype=conv.dtype))

    def build(self, site: Site) -> Run:
        (sums,), layers, sigmoid, count = site.inputs, self.layers, self.sigmoid, self.count
        if (excite := site.kernel) is not None:
            act = ACTS[self.act]
            return site.computed(lambda env: excite(env[sums], *layers, act, sigmoid, count))
        options = {"act": self.act, "sigmoid": sigmoid, "count": count}
        return site.computed(lambda env: functional.excite(env[sums], *layers, **options))


class Scale(
    Op, name="scale", kernel="se_scale_native_out", writes=True, in_place=True, placeable=True
):
    """``x * sigmoid(gate)``, before a convolution that does not take the gate along."""

    def build(self, site: Site) -> Run:
        x, gate = site.inputs
        if (write := site.kernel) is not None:
            return site.written(lambda env, y: write(env[x], env[gate], None, 0, y))
        return site.written(lambda env, y: functional.se_scale(env[x], env[gate], out=y))
