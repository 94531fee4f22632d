"""squeeze_excite: squeeze, excite and scale as one call."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend, Choice
from cvkernels.ops.common.arguments import check_residual
from cvkernels.ops.common.native import REFUSED, at_once
from cvkernels.ops.squeeze_excite import native, tiles
from cvkernels.ops.squeeze_excite.checks import (
    ACTS,
    OUT_ACTS,
    check_act,
    check_layers,
    check_map,
    parameter_dtypes,
)
from cvkernels.ops.squeeze_excite.excite import triton_limit
from cvkernels.ops.squeeze_excite.layouts import new_like
from cvkernels.ops.squeeze_excite.outputs import check_out, copies, write
from cvkernels.ops.squeeze_excite.reference import squeeze_excite_reference
from cvkernels.ops.squeeze_excite.select import (
    IMPLEMENTATIONS,
    Traffic,
    nbytes,
    needs_grad,
    registered_backend,
    run,
    select,
)


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "relu",
    residual: Tensor | None = None,
    out_act: str = "none",
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The whole block: ``out = out_act(x * sigmoid(logits)[:, :, None, None] + residual)``.

    ``logits = excite(squeeze(x), weight1, bias1, weight2, bias2, act)``. On CUDA three launches,
    or one: where x is channels_last with at least 66 images of at most 208 KiB and R is at most
    128, a program makes a whole image while it is in its SM's caches. On CPU one pass per image, or
    per few small ones, while they are in the cache; outputs of 8 MB and more are written past it.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; contiguous, channels_last and
            channel slices of a channels_last buffer are fast, other strides are copied first.
        weight1: Tensor[R, C], or the weight [R, C, 1, 1] of a 1x1 convolution; dtype of x, or
            float32 beside a half dtype. All parameters have one dtype.
        bias1: Tensor[R].
        weight2: Tensor[C, R] or [C, R, 1, 1].
        bias2: Tensor[C].
        act: "relu" or "silu", between the layers.
        residual: Tensor[N, C, H, W], dtype of x, added before out_act; fast in x's layout.
        out_act: "none", "relu" or "silu".
        out: as of :func:`se_scale`; it may be x itself.
        backend: see :mod:`cvkernels.backend`; the rule is that of :func:`se_scale`. With R over
            512, "auto" runs the reference on CUDA; the library's networks have at most 160.

    Returns:
        Tensor[N, C, H, W], as :func:`se_scale`. The fused backends keep means and logits in
        float32.

    Raises:
        ValueError: a shape, device or activation does not fit, x has no channels or no pixels, out
            overlaps an argument in part or itself, or a gradient is needed with out.
        TypeError: dtype not listed above, or dtypes differ.
        BackendError: the requested backend cannot run this call.

    Differentiable in x, residual and every parameter: once on Triton, else any number of times.
    Equal inputs give equal bits. Source: Hu et al. 2018, arXiv:1709.01507, figures 2 and 3.
    """
    layers = (weight1, bias1, weight2, bias2)
    if out is None and at_once(backend, x, residual, *layers):
        try:
            acts = native.ACTS
            return native.squeeze_excite_of(x, *layers, acts[act], residual, acts[out_act])
        except REFUSED:
            pass
    choice = choose(x, *layers, act, residual, out_act, out=out, backend=backend)

    def compute(out: Tensor | None) -> Tensor:
        if choice.backend == "native":
            return native.squeeze_excite(x, *layers, act, residual, out_act, out)
        if needs_grad(x, residual, *layers) or torch.compiler.is_compiling():
            name = registered_backend(choice, backend)
            op = torch.ops.cvkernels.squeeze_excite
            return op(x, *layers, act, residual, out_act, name)[0]
        return triton_squeeze_excite(x, *layers, act, residual, out_act, out)[0]

    def reference() -> Tensor:
        y = squeeze_excite_reference(x, *layers, act, residual, out_act)
        return y if out is None else out.copy_(y)

    def traffic() -> Traffic:
        return _traffic(choice, x, layers, residual, copies(x, residual, out))

    def fused() -> Tensor:
        return write(out, x, residual, compute)

    return run("squeeze_excite", choice, fused, reference, traffic)


def squeeze_excite_kept(
    x: Tensor,
    layers: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    act: str,
    residual: Tensor | None,
    out_act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`squeeze_excite` with the means and the logits; autograd does not see it."""
    with torch.no_grad():
        choice = choose(x, *layers, act, residual, out_act)

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            op = torch.ops.cvkernels.squeeze_excite
            return op(x, *layers, act, residual, out_act, choice.backend)

        def traffic() -> Traffic:
            return _traffic(choice, x, layers, residual, copies(x, residual, None))

        return run("squeeze_excite", choice, compute, compute, traffic)


def _traffic(
    choice: Choice, x: Tensor, layers: tuple, residual: Tensor | None, copied: int
) -> Traffic:
    three = choice.backend == "triton" and not tiles.one_launch(x, layers[0].shape[0])
    passes = 2 if three else 1
    moved = nbytes(x) * copied
    between = 2 * 4 * x.shape[0] * x.shape[1] if three else 0
    return Traffic(
        (3 if three else 1) + copied,
        passes * nbytes(x) + nbytes(residual, *layers) + between + moved,
        nbytes(x) + between + moved,
    )


def choose(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "relu",
    residual: Tensor | None = None,
    out_act: str = "none",
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Choice:
    """The backend that :func:`squeeze_excite` runs for the same arguments, and why."""
    op = "squeeze_excite"
    layers = (weight1, bias1, weight2, bias2)
    check_map(op, x)
    check_act(op, "act", act, ACTS)
    check_act(op, "out_act", out_act, OUT_ACTS)
    check_layers(op, *layers, x.shape[1], x, parameter_dtypes(x.dtype))
    if residual is not None:
        check_residual(op, residual, x)
    grad = needs_grad(x, residual, *layers)
    if out is not None:
        names = ("weight1", "bias1", "weight2", "bias2")
        inputs = {"x": x, "residual": residual, **dict(zip(names, layers, strict=True))}
        check_out(op, out, x, grad, inputs)
    requested = backends.requested(backend, IMPLEMENTATIONS)
    return select(op, x, grad, requested, triton_limit(weight1))


backends.answers("squeeze_excite", choose)


def triton_squeeze_excite(
    x: Tensor, *arguments, keep_mean: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, the means where they are kept, the logits)."""
    if x.is_meta:
        *_, out = arguments
        gate = x.new_empty(x.shape[:2], dtype=torch.float32)
        return new_like(x) if out is None else out, gate, torch.empty_like(gate)
    from cvkernels.ops.squeeze_excite import triton_launch

    return triton_launch.squeeze_excite(x, *arguments, keep_mean=keep_mean)
