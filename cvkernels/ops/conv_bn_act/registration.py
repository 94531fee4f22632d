"""The registered ops cvkernels::conv_bn_act and ::conv_bn_act_out."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.conv_bn_act.checks import problem_of
from cvkernels.ops.conv_bn_act.gradients import conv_bn_act_backward
from cvkernels.ops.conv_bn_act.op import execute, run_reference, select
from cvkernels.ops.conv_bn_act.problem import Problem

ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, float bn_eps, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str act, Tensor? residual, "
    "Tensor? in_weight, Tensor? in_bias, Tensor? in_mean, Tensor? in_var, float in_eps, "
    "Tensor? gate, str backend"
)
NAMES = [argument.split()[1] for argument in ARGUMENTS.split(", ")]

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(f"conv_bn_act({ARGUMENTS}) -> Tensor")
library.define(f"conv_bn_act_out({ARGUMENTS}, Tensor(a!) out) -> ()")


def _unflatten(flat: tuple) -> tuple[tuple, tuple, str, str]:
    """(tensors, geometry, act, backend) of the flat arguments."""
    x, weight, bias = flat[:3]
    bn, input_bn = BatchNormParams(*flat[3:8]), BatchNormParams(*flat[14:19])
    stride, padding, dilation, groups, act, residual = flat[8:14]
    none = (None,) * 4
    tensors = (
        x,
        weight,
        bias,
        None if bn[:4] == none else bn,
        residual,
        None if input_bn[:4] == none else input_bn,
        flat[19],
    )
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return tensors, geometry, act, flat[20]


def _problem(tensors: tuple, geometry: tuple, act: str, out: Tensor | None) -> Problem:
    x, weight, bias, bn, residual, input_bn, gate = tensors
    return problem_of(x, weight, bias, bn, *geometry, act, residual, input_bn, gate, out)


def _compute(flat: tuple, out: Tensor | None) -> Tensor:
    tensors, geometry, act, backend = _unflatten(flat)
    problem = _problem(tensors, geometry, act, out)
    choice = select(problem, tensors[0], False, backend)
    if choice.backend == "reference":
        return run_reference(tensors, geometry, act, out, choice.reason)
    return execute(problem, choice, tensors, out)


def _conv_bn_act(*flat) -> Tensor:
    y = _compute(flat, None)
    # The strides that the fake promises, whatever the backend returned.
    promised = torch.empty(y.shape, device="meta", memory_format=torch.channels_last).stride()
    return y if y.stride() == promised else y.clone(memory_format=torch.channels_last)


def _conv_bn_act_out(*flat_and_out) -> None:
    _compute(flat_and_out[:-1], flat_and_out[-1])


for key in ("CPU", "CUDA"):
    library.impl("conv_bn_act", _conv_bn_act, key)
    library.impl("conv_bn_act_out", _conv_bn_act_out, key)


@torch.library.register_fake("cvkernels::conv_bn_act", lib=library)
def _(*flat):
    x, weight = flat[:2]
    stride, padding, dilation = flat[8:11]
    P, Q = (
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, taps, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    shape = (x.shape[0], weight.shape[0], P, Q)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("cvkernels::conv_bn_act_out", lib=library)
def _(*flat_and_out):
    return None


def _setup_context(ctx, inputs, output):
    named = dict(zip(NAMES, inputs, strict=True))
    act = named["act"]
    ctx.named = {k: v for k, v in named.items() if not isinstance(v, Tensor)}
    kept = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    if act != "silu":
        kept.pop("residual", None)
    if act in ("relu", "relu6"):
        kept["out"] = output
    ctx.kept = list(kept)
    ctx.save_for_backward(*kept.values())
    # PyTorch's wrapper appends an argument of its own.
    ctx.needs = dict(zip(NAMES, ctx.needs_input_grad, strict=False))


def _backward(ctx, grad):
    named = {**ctx.named, **dict(zip(ctx.kept, ctx.saved_tensors, strict=True))}
    flat = tuple(named.get(name) for name in NAMES)
    (x, weight, bias, bn, residual, input_bn, gate), geometry, act, _ = _unflatten(flat)
    grads = conv_bn_act_backward(
        grad, x, weight, bias, bn or BatchNormParams(), geometry, act, residual, input_bn, gate,
        named.get("out"),
    )  # fmt: skip
    return tuple(grads.get(name) if ctx.needs[name] else None for name in NAMES)


torch.library.register_autograd(
    "cvkernels::conv_bn_act", _backward, setup_context=_setup_context, lib=library
)
