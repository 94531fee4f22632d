"""The compiled depthwise_conv_bn_act: csrc/depthwise_conv_bn_act/cpu.cpp, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common import native
from cvkernels.ops.common.activation import code
from cvkernels.ops.common.derived_weights import DerivedWeights, derived
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.norm import BatchNormParams, scale_shift, sources_of
from cvkernels.ops.common.recycled import maker
from cvkernels.ops.conv_bn_act.problem import Parameters, Problem
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 16  # channels that the compiled op takes at once

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    "depthwise_conv_bn_act_native(Tensor x, Tensor weight, Tensor affine, int kernel, int stride, "
    "int padding_h, int padding_w, int spread, int act, Tensor(a!) out, Tensor(b!)? sums) -> ()"
)
library.define(
    "depthwise_conv_bn_act_native_weight_gradient(Tensor grad, Tensor x, int kernel, int stride, "
    "int padding_h, int padding_w, Tensor(a!) out) -> ()"
)
extension.load()

convolve = torch.ops.cvkernels.depthwise_conv_bn_act_native.default
weight_gradient_of = torch.ops.cvkernels.depthwise_conv_bn_act_native_weight_gradient.default

for _name in ("", "_weight_gradient"):
    native.writes(library, f"depthwise_conv_bn_act_native{_name}")


def lacks(dtype: torch.dtype, kernel: tuple[int, int], stride: tuple, dilation: tuple) -> str:
    """Why there is no such native convolution; empty where there is one."""
    if dtype not in DTYPES:
        return f"the native implementation has no {dtype}"
    strides = ((1, 1), (2, 2))
    if kernel not in ((3, 3), (5, 5)) or stride not in strides or dilation != (1, 1):
        return "the native implementation has 3x3 and 5x5 kernels of stride 1 and 2, not dilated"
    return "" if extension.has("cpu") else extension.status()["cpu"].reason


def why_not(problem: DepthwiseProblem | Problem, device: str) -> str:
    """Why the compiled op cannot run ``problem`` on ``device``; empty where it can."""
    if device != "cpu":
        return f"the native implementation needs CPU tensors, got {device}"
    return lacks(problem.dtype, (problem.R, problem.S), problem.stride, problem.dilation)


def plan(
    problem: DepthwiseProblem, call: Call, parameters: Parameters, like: tuple,
    cache: DerivedWeights | None,
) -> Callable[..., tuple[Tensor, Tensor | None]]:  # fmt: skip
    """What runs the problem, as x -> (out, sums or None); ``once``, they may be given after x."""
    weight, bias, bn = parameters[:3]
    key, sources = ("native", bn and bn.eps), sources_of(weight, bias, bn)
    taps, affine = derived(cache, key, sources, lambda: pack(weight, bias, bn))
    options = (problem.R, problem.stride[0], *problem.padding, 1, code(problem.act))
    size = (problem.N, problem.P, problem.Q, problem.C)
    squeeze = problem.squeeze

    def run(x, out=None, sums=None):
        out = x.new_empty(size).permute(0, 3, 1, 2) if out is None else out
        if squeeze and sums is None:
            sums = x.new_empty((size[0], size[3]), dtype=torch.float32)
        convolve(x, taps, affine, *options, out.permute(0, 2, 3, 1), sums)
        return out, sums

    if not native.directs(call):
        return run
    x, out, sums = call.x, call.x.new_empty(size), None
    if squeeze:
        sums = x.new_empty((size[0], size[3]), dtype=torch.float32)
    work = native.direct(lambda: convolve(x, taps, affine, *options, out, sums))
    weights = (taps.data_ptr(), affine.data_ptr())
    new_out = maker(out.permute(0, 3, 1, 2))
    new_sums = None if sums is None else maker(sums)

    def run_directly(x):
        out = new_out()
        if new_sums is None:
            work(x.data_ptr(), *weights, out.data_ptr(), 0)
            return out, None
        sums = new_sums()
        work(x.data_ptr(), *weights, out.data_ptr(), sums.data_ptr())
        return out, sums

    run_directly.held = (taps, affine)  # type: ignore[attr-defined]  # the memory at its addresses
    return run_directly


def pack(weight: Tensor, bias: Tensor | None, bn: BatchNormParams | None) -> tuple[Tensor, Tensor]:
    """weight as [C/16, R, S, 16], and scale and shift of bias and norm as [2, C/16, 16]; float32.

    Scale and shift are computed in float64. The scale is not folded into the weights: applying it
    costs no instruction, and folding would cost a rounding. Channels past C are zero.
    """
    with torch.no_grad():
        past = (0, -weight.shape[0] % BLOCK)
        taps = F.pad(weight.flatten(1).float().t(), past).view(*weight.shape[2:], -1, BLOCK)
        affine = torch.stack(scale_shift(bias, bn, weight, torch.float64))
        affine = F.pad(affine, past).view(2, -1, BLOCK)
        return taps.permute(2, 0, 1, 3).contiguous(), affine.float()
