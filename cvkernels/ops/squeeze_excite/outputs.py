"""The ``out`` of se_scale and squeeze_excite: its checks, and writing into it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels.ops.common.aliasing import overlap, same_view
from cvkernels.ops.squeeze_excite.layouts import fits, is_nhwc


def check_out(
    op: str, out: Tensor, x: Tensor, grad: bool, inputs: dict[str, Tensor | None]
) -> None:
    """out may be the very elements of x or of residual, and else none of any input's."""
    if out.shape != x.shape:
        raise ValueError(f"{op}: out must have x's shape, {list(x.shape)}, got {list(out.shape)}")
    if out.dtype != x.dtype:
        raise TypeError(f"{op}: out must have x's dtype, {x.dtype}, got {out.dtype}")
    if out.device != x.device:
        raise ValueError(f"{op}: out must be on x's device, {x.device}, got {out.device}")
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"{op}: out must not overlap itself, got strides {list(out.stride())}; "
            f"write into a tensor that is not expanded"
        )
    if grad or (torch.is_grad_enabled() and out.requires_grad):
        raise ValueError(
            f"{op}: out= is not differentiable, and an argument requires a gradient; "
            f"call it under torch.no_grad(), or leave out= away"
        )
    # A traced tensor has no storage to ask about.
    if torch.compiler.is_compiling():
        return
    for name, tensor in inputs.items():
        if tensor is None or not overlap(tensor, out):
            continue
        if name in ("x", "residual") and same_view(tensor, out):
            continue  # each element is read before it is written
        raise ValueError(
            f"{op}: out overlaps {name}: elements would be read after they are written; "
            f"write into another tensor, or into exactly the elements of x or residual"
        )


def write(
    out: Tensor | None, x: Tensor, residual: Tensor | None, compute: Callable[..., Tensor]
) -> Tensor:
    """``compute(out)``; its result copied into out where the kernels cannot write that directly."""
    if out is None:
        return compute(None)
    direct = all(t is None or fits(t, is_nhwc(x)) for t in (x, residual, out))
    tracing = torch.compiler.is_compiling()  # its graph knows that out changes
    if not direct or tracing:
        return out.copy_(compute(None))
    if torch.is_grad_enabled() and not out.is_inference():
        # Whoever saved out for a backward must hear that it changed.
        torch.autograd.graph.increment_version(out)
    return compute(out)


def copies(x: Tensor, residual: Tensor | None, out: Tensor | None) -> int:
    """How many maps are copied around the kernels, each of x's size."""
    nhwc = is_nhwc(x)
    around = sum(t is not None and not fits(t, nhwc) for t in (x, residual))
    return around + (out is not None and bool(around or not fits(out, nhwc)))
