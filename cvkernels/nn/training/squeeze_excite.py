"""Squeeze-and-excitation in training, of a map that backward computes again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from cvkernels import functional
from cvkernels.nn.training.dense_block import as_it_is
from cvkernels.nn.training.recompute import (
    Node,
    Recipe,
    channels_last,
    new_map,
    recipe_or_itself,
    refuse,
    with_recipe,
)
from cvkernels.ops.squeeze_excite import gradients
from cvkernels.ops.squeeze_excite.op import squeeze_excite_kept

# Activations behind the sum with a shortcut whose gradient the result tells.
OUT_ACTS = ("none", "relu")


class _Excited(Node):
    """``act(x * sigmoid(gate) + shortcut)``, from what x is computed from, the gate [N, C], and
    what the shortcut is computed from."""

    def __init__(self, source: Node, act: str, shortcut: Node | None) -> None:
        super().__init__()
        self.source, self.act, self.shortcut = source, act, shortcut
        self.leaves = source.leaves + 1 + (0 if shortcut is None else shortcut.leaves)

    def compute(self, leaves: Sequence[Tensor]) -> Tensor:
        of_x, gate, others = _divided(leaves, self.source.leaves)
        residual = None if self.shortcut is None else self.shortcut.value(others)
        x = self.source.value(of_x)
        out = new_map(x, x.shape)
        return functional.se_scale(x, gate, residual, self.act, out=out)


def _divided(leaves: Sequence[Tensor], count: int) -> tuple[Sequence[Tensor], Tensor, Sequence]:
    return leaves[:count], leaves[count], leaves[count + 1 :]


class _Call(NamedTuple):
    """What the op does beside its tensors."""

    # What x and the residual are computed from.
    of_x: tuple[Tensor, ...]
    of_residual: tuple[Tensor, ...]
    node: _Excited
    act: str
    # Receives the gate.
    gates: list[Tensor]


def squeeze_excite(
    x: Tensor,
    recipe: Recipe,
    layers: tuple[Tensor, Tensor | None, Tensor, Tensor | None, str],
    residual: Tensor | None = None,
    out_act: str = "none",
) -> Tensor:
    """``functional.squeeze_excite`` of an x that has ``recipe``: autograd does not keep x.

    It keeps the gates and the means, and a residual that has no recipe. The result has a recipe.
    """
    *tensors, act = layers
    shortcut = None if residual is None else recipe_or_itself(residual)
    node = _Excited(recipe.node, out_act, None if shortcut is None else shortcut.node)
    others = () if shortcut is None else shortcut.leaves
    call = _Call(recipe.leaves, others, node, act, [])
    out = _Excite.apply(x, residual, call, *tensors)
    return with_recipe(out, node, (*recipe.leaves, *call.gates, *others))


class _Excite(Function):
    """Saves what x is computed from, the layers, means and gate; for a ReLU what the residual is
    computed from, too.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, residual: Tensor | None, call: _Call, *layers: Tensor | None
    ) -> Tensor:
        node = call.node
        with as_it_is(x):
            out, mean, gate = squeeze_excite_kept(x, layers, call.act, residual, node.act)
        call.gates.append(gate)
        of_join = call.of_residual if node.act == "relu" else ()
        ctx.save_for_backward(mean, *layers, *call.of_x, gate, *of_join)
        ctx.node, ctx.act = node, call.act
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        refuse(grad)
        node = ctx.node
        mean, *saved = ctx.saved_tensors
        layers, leaves = saved[:4], saved[4:]
        of_x, gate, _ = _divided(leaves, node.source.leaves)
        needs_x, needs_residual, *_ = ctx.needs_input_grad
        with as_it_is(gate):
            out = node.value(leaves) if node.act == "relu" else None
            x = node.source.value(of_x)
            node.drop()
            d_x, d_layers, d_residual = gradients.squeeze_excite_backward(
                channels_last(grad.to(x.dtype)), x, layers, mean, gate, None, out, ctx.act,
                node.act, needs_x,
            )  # fmt: skip
        return d_x, d_residual if needs_residual else None, None, *d_layers
