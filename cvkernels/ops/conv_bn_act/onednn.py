"""conv_bn_act on CPU: oneDNN's fused convolution on folded, prepacked weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvkernels.ops.common.derived_weights import DerivedWeights, derived
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.norm import fold, sources_of
from cvkernels.ops.conv_bn_act.problem import Parameters, Problem

# act -> torch's name of oneDNN's post-op, and the scalars it takes
POST_OPS = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
}

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.ops.aten.relu_,
    "relu6": lambda y: torch.ops.aten.hardtanh_(y, 0.0, 6.0),
    "silu": torch.ops.aten.silu_,
}


def fused_add(problem: Problem) -> bool:
    """Whether oneDNN adds the residual. On a one-pixel map torch 2.11 fails to describe it; where
    torch adds it itself, as with groups, it has no sum with a ReLU in 16 bits."""
    adds = problem.dtype == torch.float32 or problem.groups == 1
    return problem.has_residual and problem.P * problem.Q > 1 and adds


def extra_passes(problem: Problem) -> int:
    """Passes over the output after the convolution's own; after an add, torch fuses relu alone."""
    if not problem.has_residual:
        return 0
    if fused_add(problem):
        return int(problem.act not in ("none", "relu"))
    return 1 + (problem.act != "none")


@functools.cache
def lacks(dtype: torch.dtype) -> str:
    """Why oneDNN cannot convolve in ``dtype`` on this processor; empty where it can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this torch has no fused oneDNN convolution"
    if dtype == torch.float32:
        return ""
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ""
    if dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return ""
    return f"oneDNN has no {str(dtype).removeprefix('torch.')} convolution on this processor"


def why_not(problem: Problem) -> str:
    """Why this backend cannot run ``problem`` on CPU tensors; empty where it can."""
    if problem.has_prologue:
        return "oneDNN has no prologue (input_bn, input_gate)"
    if problem.has_output_gate:
        return "oneDNN does not multiply its output by gates"
    if problem.projection is not None:
        return "oneDNN adds its residual without a projection"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    return lacks(problem.dtype)


def plan(
    problem: Problem, call: Call, parameters: Parameters, like: tuple, cache: DerivedWeights | None
) -> Callable[..., Tensor]:
    """What runs the problem, as (x, residual=None, input_gate=None, out=None)."""
    weight, bias, bn = parameters[:3]
    geometry = (problem.padding, problem.stride, problem.dilation, problem.groups)
    size = (problem.N, problem.C, problem.H, problem.W)

    def prepack() -> tuple[Tensor, Tensor]:
        folded, shift = fold(weight, bias, bn)
        with torch.no_grad():
            # In oneDNN's best layout for this input size; without the size it repacks every call.
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the size
            packed = reorder(folded.contiguous().to_mkldnn(), *geometry, size)
        return packed, shift

    key = ("onednn", size, problem.dtype, bn and bn.eps)
    packed, shift = derived(cache, key, sources_of(weight, bias, bn), prepack)
    convolve = _convolve_and_add if fused_add(problem) else _convolve
    act, arguments = problem.act, (packed, shift, *geometry)

    def run(x, residual=None, input_gate=None, out=None, output_gate=None):
        y = convolve(act, arguments, x, residual)
        return y if out is None else out.copy_(y)

    return run


def _convolve(act: str, arguments: tuple, x: Tensor, residual: Tensor | None = None) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    name, scalars = POST_OPS["none" if residual is not None else act]
    y = torch.ops.mkldnn._convolution_pointwise(x, *arguments, name, scalars, "")
    return y if residual is None else IN_PLACE[act](y.add_(residual))


def _convolve_and_add(act: str, arguments: tuple, x: Tensor, residual: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual.contiguous(memory_format=torch.channels_last)
    unary = "relu" if act == "relu" else None
    y = torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, *arguments, "add", 1.0, unary, [], ""
    )
    return y if act in ("none", "relu") else IN_PLACE[act](y)
