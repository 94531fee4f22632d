"""The registered ops: cvkernels::se_scale, its parts, the block, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels.ops.squeeze_excite import gradients, native
from cvkernels.ops.squeeze_excite.excite import triton_excite, triton_limit
from cvkernels.ops.squeeze_excite.gradients import accumulator
from cvkernels.ops.squeeze_excite.layouts import new_like, promised
from cvkernels.ops.squeeze_excite.op import triton_squeeze_excite
from cvkernels.ops.squeeze_excite.reference import (
    excite_reference,
    se_scale_reference,
    squeeze_reference,
)
from cvkernels.ops.squeeze_excite.scale import triton_se_scale
from cvkernels.ops.squeeze_excite.select import select
from cvkernels.ops.squeeze_excite.squeeze import triton_squeeze

_LAYERS = "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str act"
SCHEMAS = (
    "squeeze(Tensor x, str backend) -> Tensor",
    f"excite(Tensor pooled, {_LAYERS}, bool sigmoid, int count, str backend) -> Tensor",
    "se_scale(Tensor x, Tensor gate, Tensor? residual, str act, str backend) -> Tensor",
    f"squeeze_excite(Tensor x, {_LAYERS}, Tensor? residual, str out_act, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    "se_scale_backward(Tensor grad, Tensor x, Tensor gate, Tensor? residual, Tensor? out, "
    "str act, bool input_grad, str backend) -> (Tensor, Tensor, Tensor)",
    "se_scale_shifted(Tensor x, Tensor gate, Tensor shift, str backend) -> Tensor",
)

library = torch.library.Library("cvkernels", "FRAGMENT")
for schema in SCHEMAS:
    library.define(schema)


def _runs(op: str, x: Tensor, backend: str, triton_limit: str = "") -> str:
    return select(op, x, False, backend, triton_limit).backend


def _squeeze(x, backend):
    name = _runs("squeeze", x, backend)
    if name == "reference":
        return squeeze_reference(x)
    return triton_squeeze(x) if name == "triton" else native.squeeze(x)


def _excite(pooled, weight1, bias1, weight2, bias2, act, sigmoid, count, backend):
    layers, count = (weight1, bias1, weight2, bias2), count or None
    name = _runs("excite", pooled, backend, triton_limit(weight1))
    if name == "reference":
        return excite_reference(pooled, *layers, act, sigmoid=sigmoid, count=count)
    run = triton_excite if name == "triton" else native.excite
    return run(pooled, *layers, act, sigmoid, count)


def _se_scale(x, gate, residual, act, backend):
    name = _runs("se_scale", x, backend)
    if name == "reference":
        return promised(se_scale_reference(x, gate, residual, act), x)
    run = triton_se_scale if name == "triton" else native.se_scale
    return promised(run(x, gate, residual, act, None), x)


def _squeeze_excite(x, weight1, bias1, weight2, bias2, act, residual, out_act, backend):
    layers = (weight1, bias1, weight2, bias2)
    name = _runs("squeeze_excite", x, backend, triton_limit(weight1))
    if name == "triton":
        out, mean, gate = triton_squeeze_excite(
            x, *layers, act, residual, out_act, None, keep_mean=True
        )
    elif name == "native" and x.dtype == torch.float32:
        mean = native.squeeze(x)
        gate = native.excite(mean, *layers, act, False, None)
        out = native.se_scale(x, gate, residual, out_act)
    else:
        mean = x.mean((2, 3), dtype=accumulator(x.dtype))
        gate = excite_reference(mean, *layers, act)
        out = se_scale_reference(x, gate, residual, out_act)
    return promised(out, x), mean, gate


def _se_scale_backward(grad, x, gate, residual, out, act, input_grad, backend):
    arguments = (grad, x, gate, residual, out, act, input_grad)
    name = _runs("se_scale", x, backend)
    if name == "triton":
        from cvkernels.ops.squeeze_excite import triton_launch

        dx, d_gate, dz = triton_launch.se_scale_backward(*arguments)
    elif name == "native" and native.has_gradient(x, act):
        dx, d_gate, dz = native.backward(grad, x, gate, out, act, input_grad)
    else:
        dx, d_gate, dz = gradients.se_scale_backward(*arguments)
    made = [promised(d, x) if d.dim() == 4 else d for d in (dx, dz)]
    return made[0], d_gate, made[1]


def _se_scale_shifted(x, gate, shift, backend):
    name = _runs("se_scale", x, backend)
    if name == "triton":
        from cvkernels.ops.squeeze_excite import triton_launch

        y = triton_launch.se_scale(x, gate, None, "none", shift=shift.contiguous())
    elif name == "native" and native.has_gradient(x, "none"):
        y = native.scale_shifted(x, torch.sigmoid(gate.float()), shift.float())
    else:
        scale = torch.sigmoid(gate)[:, :, None, None]
        y = (x * scale + shift[:, :, None, None]).to(x.dtype)
    return promised(y, x)


for key in ("CPU", "CUDA"):
    library.impl("squeeze", _squeeze, key)
    library.impl("excite", _excite, key)
    library.impl("se_scale", _se_scale, key)
    library.impl("squeeze_excite", _squeeze_excite, key)
    library.impl("se_scale_backward", _se_scale_backward, key)
    library.impl("se_scale_shifted", _se_scale_shifted, key)


def _fake(op: str):
    return torch.library.register_fake(f"cvkernels::{op}", lib=library)


@_fake("squeeze")
def _(x, backend):
    return x.new_empty(x.shape[:2])


@_fake("excite")
def _(pooled, weight1, bias1, weight2, bias2, act, sigmoid, count, backend):
    return pooled.new_empty(pooled.shape, dtype=weight1.dtype if count else pooled.dtype)


@_fake("se_scale")
def _(x, gate, residual, act, backend):
    return new_like(x)


@_fake("squeeze_excite")
def _(x, weight1, bias1, weight2, bias2, act, residual, out_act, backend):
    gate = x.new_empty(x.shape[:2], dtype=accumulator(x.dtype))
    return new_like(x), gate, torch.empty_like(gate)


@_fake("se_scale_backward")
def _(grad, x, gate, residual, out, act, input_grad, backend):
    nothing = x.new_empty(0)
    dz = x.new_empty(0) if act == "none" else new_like(x)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return new_like(x) if input_grad else nothing, d_gate, dz


@_fake("se_scale_shifted")
def _(x, gate, shift, backend):
    return new_like(x)


def _squeeze_context(ctx, inputs, output):
    x, _ = inputs
    ctx.shape = x.shape


def _squeeze_grad(ctx, grad):
    pixels = ctx.shape[2] * ctx.shape[3]
    return (grad / pixels)[:, :, None, None].expand(ctx.shape), None


def _excite_context(ctx, inputs, output):
    *tensors, ctx.act, ctx.sigmoid, ctx.count, _ = inputs
    ctx.save_for_backward(*tensors, output if ctx.sigmoid else None)


def _excite_grad(ctx, grad):
    pooled, *layers, out = ctx.saved_tensors
    dtype = accumulator(layers[0].dtype)
    if ctx.sigmoid:
        out = out.to(dtype)
        grad = grad.to(dtype) * out * (1 - out)
    count = ctx.count or 1
    d_mean, *d_layers = gradients.excite_backward(grad, pooled.to(dtype) / count, *layers, ctx.act)
    return (d_mean / count).to(pooled.dtype), *d_layers, None, None, None, None


def _kept(act: str, residual: Tensor | None, out: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(residual, out), as far as the gradient of act needs them."""
    return residual if act == "silu" else None, out if act == "relu" else None


def _se_scale_context(ctx, inputs, output):
    x, gate, residual, ctx.act, ctx.backend = inputs
    ctx.save_for_backward(x, gate, *_kept(ctx.act, residual, output))
    ctx.has_residual = residual is not None


def _se_scale_grad(ctx, grad):
    x, gate, residual, out = ctx.saved_tensors
    dx, d_gate, dz = torch.ops.cvkernels.se_scale_backward(
        grad, x, gate, residual, out, ctx.act, ctx.needs_input_grad[0], ctx.backend
    )
    d_residual = None
    if ctx.has_residual:
        d_residual = grad if ctx.act == "none" else dz
    return dx if ctx.needs_input_grad[0] else None, d_gate, d_residual, None, None


def _squeeze_excite_context(ctx, inputs, output):
    x, *layers, ctx.act, residual, ctx.out_act, ctx.backend = inputs
    out, mean, gate = output
    ctx.save_for_backward(x, *layers, mean, gate, *_kept(ctx.out_act, residual, out))
    ctx.mark_non_differentiable(mean, gate)
    ctx.has_residual = residual is not None


def _squeeze_excite_grad(ctx, grad, *_):
    x, *layers, mean, gate, residual, out = ctx.saved_tensors
    dx, d_layers, dz = gradients.squeeze_excite_backward(
        grad, x, layers, mean, gate, residual, out, ctx.act, ctx.out_act,
        ctx.needs_input_grad[0], ctx.backend,
    )  # fmt: skip
    return dx, *d_layers, None, dz if ctx.has_residual else None, None, None


for op, backward, context in (
    ("squeeze", _squeeze_grad, _squeeze_context),
    ("excite", _excite_grad, _excite_context),
    ("se_scale", _se_scale_grad, _se_scale_context),
    ("squeeze_excite", _squeeze_excite_grad, _squeeze_excite_context),
):
    torch.library.register_autograd(
        f"cvkernels::{op}", backward, setup_context=context, lib=library
    )
