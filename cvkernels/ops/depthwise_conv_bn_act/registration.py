"""The registered ops cvkernels::depthwise_conv_bn_act and ::depthwise_conv_bn_act_squeeze."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.conv_bn_act.gradients import conv_bn_act_backward
from cvkernels.ops.depthwise_conv_bn_act.op import execute, run_reference, select
from cvkernels.ops.depthwise_conv_bn_act.problem import problem_of, sums_dtype

ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, float bn_eps, "
    "int[2] stride, int[2] padding, int[2] dilation, str act, str backend"
)
NAMES = [argument.split()[1] for argument in ARGUMENTS.split(", ")]

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(f"depthwise_conv_bn_act({ARGUMENTS}) -> Tensor")
library.define(f"depthwise_conv_bn_act_squeeze({ARGUMENTS}) -> (Tensor, Tensor)")


def _unflatten(flat: tuple) -> tuple[tuple, tuple, str, str]:
    """(tensors, geometry, act, backend) of the flat arguments."""
    bn = BatchNormParams(*flat[3:8])
    tensors = (*flat[:3], None if bn[:4] == (None,) * 4 else bn)
    return tensors, tuple(tuple(pair) for pair in flat[8:11]), flat[11], flat[12]


def _compute(flat: tuple, squeeze: bool) -> tuple[Tensor, Tensor | None]:
    tensors, geometry, act, backend = _unflatten(flat)
    problem = problem_of(*tensors, *geometry, act, squeeze)
    choice = select(problem, tensors[0], False, backend)
    if choice.backend != "reference":
        return execute(problem, choice, tensors)
    result = run_reference(tensors, geometry, act, squeeze, choice.reason)
    out, sums = result if squeeze else (result, None)
    # The strides that the fake promises, whatever PyTorch chose.
    promised = torch.empty(out.shape, device="meta", memory_format=torch.channels_last).stride()
    if out.stride() != promised:
        out = out.clone(memory_format=torch.channels_last)
    return out, sums


def _depthwise_conv_bn_act(*flat) -> Tensor:
    return _compute(flat, False)[0]


def _depthwise_conv_bn_act_squeeze(*flat) -> tuple[Tensor, Tensor]:
    return _compute(flat, True)


for key in ("CPU", "CUDA"):
    library.impl("depthwise_conv_bn_act", _depthwise_conv_bn_act, key)
    library.impl("depthwise_conv_bn_act_squeeze", _depthwise_conv_bn_act_squeeze, key)


def _fake(*flat) -> Tensor:
    x, weight = flat[:2]
    P, Q = (
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, taps, s, p, d in zip(x.shape[2:], weight.shape[2:], *flat[8:11], strict=True)
    )
    shape = (*x.shape[:2], P, Q)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_squeeze(*flat) -> tuple[Tensor, Tensor]:
    x = flat[0]
    return _fake(*flat), torch.empty(x.shape[:2], dtype=sums_dtype(x.dtype), device=x.device)


torch.library.register_fake("cvkernels::depthwise_conv_bn_act", _fake, lib=library)
torch.library.register_fake("cvkernels::depthwise_conv_bn_act_squeeze", _fake_squeeze, lib=library)


def _setup_context(ctx, inputs, output):
    named = dict(zip(NAMES, inputs, strict=True))
    ctx.named = {k: v for k, v in named.items() if not isinstance(v, Tensor)}
    kept = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    if named["act"] in ("relu", "relu6"):
        kept["out"] = output if isinstance(output, Tensor) else output[0]
    ctx.kept = list(kept)
    ctx.save_for_backward(*kept.values())
    # PyTorch's wrapper appends an argument of its own.
    ctx.needs = dict(zip(NAMES, ctx.needs_input_grad, strict=False))


def _backward(ctx, grad, grad_sums=None):
    named = {**ctx.named, **dict(zip(ctx.kept, ctx.saved_tensors, strict=True))}
    (x, weight, bias, bn), geometry, act, _ = _unflatten(tuple(named.get(n) for n in NAMES))
    if grad_sums is not None:
        grad = (grad + grad_sums[:, :, None, None]).to(x.dtype)
    grads = conv_bn_act_backward(
        grad, x, weight, bias, bn or BatchNormParams(), (*geometry, x.shape[1]), act, None, None,
        None, named.get("out"),
    )  # fmt: skip
    return tuple(grads.get(name) if ctx.needs[name] else None for name in NAMES)


for name in ("depthwise_conv_bn_act", "depthwise_conv_bn_act_squeeze"):
    torch.library.register_autograd(
        f"cvkernels::{name}", _backward, setup_context=_setup_context, lib=library
    )
