"""Checked calls of the native ops as functions of their data, for who calls them again and again.

They hold the parameters, so they are right while these stay as they are, for data of the same
shapes and dtypes. None where "auto" runs something else than the native op, or autograd has to see
the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels.ops.squeeze_excite import native
from cvkernels.ops.squeeze_excite.excite import choose as choose_excite
from cvkernels.ops.squeeze_excite.layouts import is_nhwc, matrices
from cvkernels.ops.squeeze_excite.op import choose

# (x, residual, out) -> out, or a new tensor where there is none; out is x or residual.
Run = Callable[..., Tensor]


def prepared(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    residual: Tensor | None,
    out_act: str,
) -> Run | None:
    """What runs this call of squeeze_excite on others like x and residual, unchecked."""
    layers = (weight1, bias1, weight2, bias2)
    if choose(x, *layers, act, residual, out_act).backend != "native":
        return None
    dense = tuple([t if t is None else t.detach() for t in matrices(*layers)])
    return functools.partial(_squeeze_excite, dense, act, out_act, x.shape[1] > 1)


def _squeeze_excite(
    layers: tuple,
    act: str,
    out_act: str,
    channels: bool,
    x: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    nhwc = torch.channels_last
    if (
        channels
        and x.is_contiguous(memory_format=nhwc)
        and (residual is None or residual.is_contiguous(memory_format=nhwc))
    ):
        y = torch.empty_like(x, memory_format=nhwc) if out is None else out
        acts = native.ACTS
        native.squeeze_excite_out(x, *layers, acts[act], residual, acts[out_act], y)
        return y
    y = native.squeeze_excite(x, *layers, act, residual, out_act)
    return y if out is None else out.copy_(y)


def prepared_gate(
    x: Tensor,
    sums: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What scales other maps like x, which are channels_last, in place by the gates of their sums.

    For calls of excite with ``count`` and of se_scale.
    """
    layers = (weight1, bias1, weight2, bias2)
    count = x.shape[2] * x.shape[3]
    if not (is_nhwc(x) and x.is_contiguous(memory_format=torch.channels_last)):
        return None
    if choose_excite(sums, *layers, act, count=count).backend != "native":
        return None
    dense = tuple([t if t is None else t.detach() for t in matrices(*layers)])
    return functools.partial(_scale_by_gate, (*dense, native.ACTS[act], False, count))


def _scale_by_gate(arguments: tuple, x: Tensor, sums: Tensor) -> Tensor:
    native.se_scale_out(x, native.excite_of(sums, *arguments), None, 0, x)
    return x
