"""What an op has to know about a call beside its sizes: autograd's and autocast's part in it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from cvkernels.ops.common.norm import BatchNormParams


def needs_grad(tensors: tuple) -> bool:
    """Whether autograd has to see this call."""
    if not torch.is_grad_enabled():
        return False
    return any(
        t.requires_grad for part in tensors for t in _tensors_of(part) if isinstance(t, Tensor)
    )


def _tensors_of(part: Tensor | BatchNormParams | None) -> tuple:
    return tuple(part) if isinstance(part, BatchNormParams) else (part,)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast converts this call's operands to; None where it leaves them alone."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution takes x: the one autocast converts it to, or its own."""
    return autocast_dtype(x) or x.dtype


def autocast_disabled(x: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on x's device, for operands that have their dtypes already."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
