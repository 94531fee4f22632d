"""conv_bn_act on CUDA: cuDNN's fused convolution + bias (+ add) + ReLU on folded weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.derived_weights import DerivedWeights, derived
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.norm import fold, sources_of
from cvkernels.ops.conv_bn_act.problem import Parameters, Problem


def why_not(problem: Problem) -> str:
    """Why this backend cannot run ``problem`` on CUDA tensors; empty where it can."""
    if problem.has_prologue:
        return "cuDNN's fused convolution has no prologue (input_bn, input_gate)"
    if problem.has_output_gate:
        return "cuDNN's fused convolution does not multiply its output by gates"
    if problem.projection is not None:
        return "cuDNN's fused convolution adds its residual without a projection"
    if problem.has_out:
        return "cuDNN's fused convolution allocates its output, and cannot write into out"
    if problem.act != "relu":
        return f"cuDNN's fused convolution has no activation but relu, got act={problem.act!r}"
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {problem.dtype} is not float16, bfloat16 or float32"
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is False"
    return ""


def plan(
    problem: Problem, call: Call, parameters: Parameters, like: tuple, cache: DerivedWeights | None
) -> Callable[..., Tensor]:
    """What runs the problem, as (x, residual=None)."""
    weight, bias, bn = parameters[:3]

    def build() -> tuple[Tensor, Tensor]:
        if bn is not None and not backends.lacks_triton("cuda"):
            from cvkernels.ops.conv_bn_act import triton_fold

            return triton_fold.fold(weight, bias, bn)
        folded, shift = fold(weight, bias, bn)
        return folded.contiguous(memory_format=torch.channels_last), shift

    key = ("cudnn", bn and bn.eps)
    folded, shift = derived(cache, key, sources_of(weight, bias, bn), build)
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)

    def run(x, residual=None, input_gate=None, out=None, output_gate=None):
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is None:
            return torch.cudnn_convolution_relu(x, folded, shift, *geometry)
        residual = residual.contiguous(memory_format=torch.channels_last)
        return torch.cudnn_convolution_add_relu(x, folded, residual, 1.0, shift, *geometry)

    return run
