"""batch_norm_act: the contract, the choice of a backend, and the call with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend, Choice
from cvkernels.ops import calls, native
from cvkernels.ops.batch_norm import BatchNormParams
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.batch_norm_act.reference import batch_norm_act_reference
from cvkernels.ops.checks import check_residual, check_vector

ACTS = tuple(passes.ACTS)
DTYPES = native.DTYPES["cpu"]


class BatchNormAct(NamedTuple):
    """What :func:`batch_norm_act` returns."""

    out: Tensor
    mean: Tensor
    var: Tensor


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "none",
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> BatchNormAct:
    """Batch norm in training, with its activation and the shortcut that ends at it:
    ``out = act((x - mean) / sqrt(var + eps) * weight + bias + residual)``, mean and var those of x.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; any strides,
            channels_last and channel slices of a channels_last tensor are fast.
        weight: Tensor[C], any floating dtype; None for ones.
        bias: Tensor[C], any floating dtype; None for zeros.
        eps: added to the variance.
        act: "none", "relu" or "silu".
        residual: Tensor[N, C, H, W] of x's dtype, added before act, which is then "none" or "relu".
        backend: see :mod:`cvkernels.backend`. "auto" runs the native passes on CPU and CUDA
            tensors; the reference runs where the compiled part is missing or has no code for the
            GPU, for float64 on CUDA, for x of other strides than those, for CPU tensors under
            torch.compile, and under a torch.func transform.

    Returns:
        ``(out, mean, var)``: out as x, channels_last where the native passes ran; mean and biased
        variance Tensor[C], float32 (float64 for float64), through which no gradient flows: what
        running statistics are made of. Statistics and arithmetic are in float32 (float64 for
        float64), rounded once. None is a view of x.

    Raises:
        ValueError: a shape or device does not fit, act is not known or does not go with residual,
            or a channel of x has fewer than two elements.
        TypeError: a dtype is not listed above, or residual's is not x's.
        BackendError: the requested backend cannot run this call.
        RuntimeError: from the native passes' gradient under ``create_graph=True``, or where what
            they keep for it was written since.

    Differentiable in x, weight, bias and residual; once, but for the reference. For the gradient
    the native passes keep x and the vectors, and compute what is behind the norm again; of a ReLU
    behind a residual they keep the output.
    Source: Ioffe and Szegedy 2015, arXiv:1502.03167; the shortcut He et al. 2016, arXiv:1512.03385.
    """
    choice = _checked_choice(x, weight, bias, act, residual, backend)
    if choice.backend == "reference":
        return BatchNormAct(*batch_norm_act_reference(x, weight, bias, eps, act, residual))
    if residual is not None and not passes.is_pixel_matrix(residual):
        residual = residual.contiguous(memory_format=torch.channels_last)
    arguments = (x, weight, bias, residual, eps, act)
    if not calls.needs_grad((x, weight, bias, residual)):
        return BatchNormAct(*_forward(*arguments))
    return BatchNormAct(*_BatchNormAct.apply(*arguments))


def choose(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "none",
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Choice:
    """The backend that :func:`batch_norm_act` runs for these arguments, and the rule behind it."""
    return _checked_choice(x, weight, bias, act, residual, backend)


def refuse_create_graph(name: str) -> None:
    """For a backward pass: raise under ``create_graph=True``, with the way out."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} is differentiable once, and this backward pass is run with "
            f"create_graph=True; run the forward pass under cvkernels.backend.use('reference')"
        )


def _checked_choice(x, weight, bias, act, residual, backend) -> Choice:
    if x.dim() != 4 or x.numel() <= x.shape[1]:
        raise ValueError(
            f"batch_norm_act: x must have shape [N, C, H, W] with more than one element per "
            f"channel, got {list(x.shape)}; normalise a single pixel in eval"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"batch_norm_act: x must be float32, float16, bfloat16 or float64, got {x.dtype}"
        )
    if act not in ACTS:
        raise ValueError(f"batch_norm_act: act must be one of {list(ACTS)}, got {act!r}")
    if residual is not None:
        if act == "silu":
            raise ValueError(
                "batch_norm_act: a residual goes with act 'none' or 'relu', got 'silu'"
            )
        check_residual("batch_norm_act", residual, x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_vector("batch_norm_act", name, vector, x.shape[1], x)
    requested = backends.requested(backend, ("native",))
    if requested == "auto" and torch._C._functorch.peek_interpreter_stack() is not None:
        return Choice("reference", "a torch.func transform is active")
    return passes.select(x, requested)


def _forward(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = passes.statistics(x)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    passes.apply(x, BatchNormParams(weight, bias, mean, var, eps), act, out, residual)
    return out, mean, var


class _BatchNormAct(torch.autograd.Function):
    """Saves x, weight, bias, mean and var, and out where it tells what a ReLU let pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, act):
        out, mean, var = _forward(x, weight, bias, residual, eps, act)
        joins = residual is not None and act == "relu"
        ctx.save_for_backward(x, weight, bias, mean, var, *((out,) if joins else ()))
        ctx.mark_non_differentiable(mean, var)
        ctx.eps, ctx.act = eps, act
        return out, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_create_graph("batch_norm_act")
        x, weight, bias, mean, var, *joined = ctx.saved_tensors
        bn = BatchNormParams(weight, bias, mean, var, ctx.eps)
        *needed, needs_residual, _, _ = ctx.needs_input_grad
        if joined:
            grads, grad = joined_backward(grad, x, bn, *joined, needed)
        else:
            grads = norm_backward(grad, x, bn, ctx.act, needed)
        return *grads, grad if needs_residual else None, None, None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def norm_backward(
    grad: Tensor,
    x: Tensor,
    bn: BatchNormParams,
    act: str,
    needed: Sequence[bool],
    out: Tensor | None = None,
) -> Gradients:
    """Gradients in x, weight and bias of ``act(batch_norm(x))``, those of the three needed.

    The first is written to ``out`` where that is given.
    """
    grad = _as_operand(grad, x)
    slope, offset = (passes.vector_like(x, zero=True) for _ in range(2))
    vectors = passes.reduce(grad, x, bn, act, slope, offset)
    return _finished(grad, x, bn, act, (slope, offset), vectors, needed, out)


def joined_backward(
    grad: Tensor,
    x: Tensor,
    bn: BatchNormParams,
    joined: Tensor,
    needed: Sequence[bool],
    out: Tensor | None = None,
) -> tuple[Gradients, Tensor]:
    """As :func:`norm_backward` of ``joined = relu(batch_norm(x) + residual)``, and the residual's
    gradient."""
    grad, masked = _as_operand(grad, x), torch.empty_like(x, memory_format=torch.channels_last)
    slope, offset = (passes.vector_like(x, zero=True) for _ in range(2))
    join = (joined.contiguous(memory_format=torch.channels_last), masked)
    vectors = passes.reduce(grad, x, bn, "relu", slope, offset, join=join)
    return _finished(masked, x, bn, "none", (slope, offset), vectors, needed, out), masked


def _as_operand(grad: Tensor, x: Tensor) -> Tensor:
    grad = grad.to(x.dtype)
    if passes.is_pixel_matrix(grad):
        return grad
    return grad.contiguous(memory_format=torch.channels_last)


def _finished(
    grad: Tensor,
    x: Tensor,
    bn: BatchNormParams,
    act: str,
    through_statistics: tuple[Tensor, Tensor],
    vectors: tuple[Tensor, Tensor],
    needed: Sequence[bool],
    out: Tensor | None,
) -> Gradients:
    d_x = None
    if needed[0]:
        if out is None:
            out = torch.empty_like(x, memory_format=torch.channels_last)
        d_x = passes.input_gradient(grad, x, bn, act, *through_statistics, out)
    return d_x, *(
        d.to(vector.dtype) if vector is not None and need else None
        for d, vector, need in zip(vectors, bn[:2], needed[1:], strict=False)
    )
