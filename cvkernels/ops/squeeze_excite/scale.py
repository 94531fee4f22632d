"""se_scale: the contract, the choice of a backend and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend, Choice
from cvkernels.ops.common.arguments import check_residual
from cvkernels.ops.common.native import REFUSED, at_once
from cvkernels.ops.squeeze_excite import native
from cvkernels.ops.squeeze_excite.checks import (
    OUT_ACTS,
    check_act,
    check_gate,
    check_map,
)
from cvkernels.ops.squeeze_excite.layouts import new_like
from cvkernels.ops.squeeze_excite.outputs import check_out, copies, write
from cvkernels.ops.squeeze_excite.reference import se_scale_reference
from cvkernels.ops.squeeze_excite.select import (
    IMPLEMENTATIONS,
    Traffic,
    nbytes,
    needs_grad,
    registered_backend,
    run,
    select,
)


def se_scale(
    x: Tensor,
    gate: Tensor,
    residual: Tensor | None = None,
    act: str = "none",
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Scale each channel by its gate: ``out = act(x * sigmoid(gate) + residual)``, gate per (n, c).

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; contiguous, channels_last and
            channel slices of a channels_last buffer are fast, other strides are copied first.
        gate: Tensor[N, C], dtype of x or float32. Logits, before the sigmoid.
        residual: Tensor[N, C, H, W], dtype of x, added before the activation; fast in x's layout.
        act: "none", "relu" or "silu".
        out: Tensor[N, C, H, W] to write into, dtype and device of x, any strides; x or residual
            itself (in place) or a tensor that shares no element with an argument. Not
            differentiable.
        backend: see :mod:`cvkernels.backend`. "auto" runs Triton on CUDA tensors and the native op
            on CPU tensors. The reference runs where these are missing, for float64, on CPU where a
            gradient is needed, and for CPU tensors under torch.compile (inductor generates this).

    Returns:
        Tensor[N, C, H, W], dtype of x; channels_last if x's channels have stride 1, else
        contiguous (the reference keeps the layout that PyTorch chooses). ``out`` itself where
        given, else never a view of an argument. Computed in float32 with one rounding at the end.
        NaN and infinity propagate. N = 0 gives an empty output.

    Raises:
        ValueError: a shape, device or act does not fit, x has no channels or no pixels, out
            overlaps an argument in part or itself, or a gradient is needed with out.
        TypeError: dtype not listed above, or dtypes differ.
        BackendError: the requested backend cannot run this call.

    Differentiable in x, gate and residual: once on Triton, else any number of times. Equal inputs
    give equal bits. Source: Hu et al. 2018, arXiv:1709.01507, eq. 4; with the residual, figure 3.
    """
    if out is None and at_once(backend, x, gate, residual):
        try:
            return native.se_scale_of(x, gate, residual, native.ACTS[act])
        except REFUSED:
            pass
    choice = choose(x, gate, residual, act, out=out, backend=backend)

    def compute(out: Tensor | None) -> Tensor:
        if choice.backend == "native":
            return native.se_scale(x, gate, residual, act, out)
        if needs_grad(x, gate, residual) or torch.compiler.is_compiling():
            name = registered_backend(choice, backend)
            return torch.ops.cvkernels.se_scale(x, gate, residual, act, name)
        return triton_se_scale(x, gate, residual, act, out)

    def reference() -> Tensor:
        y = se_scale_reference(x, gate, residual, act)
        return y if out is None else out.copy_(y)

    def traffic() -> Traffic:
        copied = copies(x, residual, out)
        moved = nbytes(x) * copied
        return Traffic(1 + copied, nbytes(x, gate, residual) + moved, nbytes(x) + moved)

    return run("se_scale", choice, lambda: write(out, x, residual, compute), reference, traffic)


def choose(
    x: Tensor,
    gate: Tensor,
    residual: Tensor | None = None,
    act: str = "none",
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Choice:
    """The backend that :func:`se_scale` runs for the same arguments, and the rule that chose it."""
    check_map("se_scale", x)
    check_act("se_scale", "act", act, OUT_ACTS)
    check_gate("se_scale", gate, x)
    if residual is not None:
        check_residual("se_scale", residual, x)
    grad = needs_grad(x, gate, residual)
    if out is not None:
        check_out("se_scale", out, x, grad, {"x": x, "residual": residual, "gate": gate})
    return select("se_scale", x, grad, backends.requested(backend, IMPLEMENTATIONS))


backends.answers("se_scale", choose)


def triton_se_scale(
    x: Tensor, gate: Tensor, residual: Tensor | None, act: str, out: Tensor | None
) -> Tensor:
    if x.is_meta:
        return new_like(x) if out is None else out
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.squeeze_excite import triton_launch

    return triton_launch.se_scale(x, gate, residual, act, out)
