"""Squeeze-and-excitation in training, of a map that backward recomputes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from cvkernels import functional
from cvkernels.nn.training import place
from cvkernels.nn.training.recompute import (
    Recompute,
    RecomputeNode,
    recompute_or_saved,
    with_recompute,
)
from cvkernels.ops.common.autograd import autocast_disabled, without_gradient
from cvkernels.ops.common.differentiable import needs_stock
from cvkernels.ops.common.layout import channels_last
from cvkernels.ops.common.recycled import new_map
from cvkernels.ops.squeeze_excite.op import squeeze_excite_kept
from cvkernels.ops.squeeze_excite.reference import squeeze_excite_backward

# Activations behind the sum with a shortcut whose gradient follows from the result.
OUT_ACTS = ("none", "relu")


class _Excited(RecomputeNode):
    """``act(x * sigmoid(gate) + shortcut)``, from what x is computed from, the gate [N, C], and
    what the shortcut is computed from."""

    def __init__(self, source: RecomputeNode, act: str, shortcut: RecomputeNode | None) -> None:
        super().__init__()
        self.source, self.act, self.shortcut = source, act, shortcut
        self.count = source.count + 1 + (0 if shortcut is None else shortcut.count)

    def compute(self, saved: Sequence[Tensor]) -> Tensor:
        of_x, gate, of_shortcut = self.divide(saved)
        residual = None if self.shortcut is None else self.shortcut.value(of_shortcut)
        x = self.source.value(of_x)
        out = new_map(x)
        return functional.se_scale(x, gate, residual, self.act, out=out)

    def divide(self, saved: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor, Sequence[Tensor]]:
        """What x is computed from, the gate, what the shortcut is computed from."""
        count = self.source.count
        return saved[:count], saved[count], saved[count + 1 :]


class _Call(NamedTuple):
    """What the op takes beside the tensors that gradients are needed in."""

    # What x and the residual are computed from.
    of_x: tuple[Tensor, ...]
    of_residual: tuple[Tensor, ...]
    node: _Excited
    act: str


def squeeze_excite(
    x: Tensor, recompute: Recompute,
    layers: tuple[Tensor, Tensor | None, Tensor, Tensor | None, str],
    residual: Tensor | None = None, out_act: str = "none",
) -> Tensor:  # fmt: skip
    """``functional.squeeze_excite`` of an x that has ``recompute``: autograd does not keep x.

    It keeps the gates and the means, and a residual that is not recomputed. The result is.
    """
    *tensors, act = layers
    shortcut = None if residual is None else recompute_or_saved(residual)
    node = _Excited(recompute.node, out_act, None if shortcut is None else shortcut.node)
    call = _Call(recompute.saved, () if shortcut is None else shortcut.saved, node, act)
    out, saved = place.apply(_Excite, x, residual, call, *tensors)
    return with_recompute(out, node, saved)


class _Excite(Function):
    """Saves x's place, what x is computed from, the layers, means and gate; for a ReLU what the
    residual is computed from, too. Returns what the result is computed from with it.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, residual: Tensor | None, call: _Call, *layers: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        ctx.set_materialize_grads(False)
        node = call.node
        with autocast_disabled(x):
            out, mean, gate = squeeze_excite_kept(x, layers, call.act, residual, node.act)
        of_join = call.of_residual if node.act == "relu" else ()
        linked = x if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(linked, mean, *layers, *call.of_x, gate, *of_join)
        ctx.node, ctx.act = node, call.act
        return out, (*call.of_x, gate, *call.of_residual)

    @staticmethod
    @without_gradient
    def backward(ctx: FunctionCtx, grad: Tensor, _) -> tuple:
        node = ctx.node
        linked, mean, *tensors = ctx.saved_tensors
        layers, saved = tensors[:4], tensors[4:]
        of_x, gate, _ = node.divide(saved)
        needs_x, needs_residual, *_ = ctx.needs_input_grad
        with autocast_disabled(gate):
            out = node.value(saved) if node.act == "relu" else None
            x = node.source.value(of_x)
            node.drop()
            if needs_stock(grad):
                x = place.filled(linked, x.detach().clone())
            else:
                grad = channels_last(grad.to(x.dtype))
            d_x, d_layers, d_residual = squeeze_excite_backward(
                grad, x, layers, mean, gate, None, out, ctx.act, node.act, needs_x,
            )  # fmt: skip
        return d_x, d_residual if needs_residual else None, None, *d_layers
