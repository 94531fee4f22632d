"""Batch norm in inference as an op's operand: checked, and as the vectors that native ops read."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels.ops.common.norm import BatchNormParams

NO_VECTORS = (None, None, None, None, 0.0)
ARGUMENTS = "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps"


def vectors_of(bn: BatchNormParams | None, x: Tensor) -> BatchNormParams | None:
    """bn with vectors of one dtype, x's or the one that x is computed in, contiguous."""
    if bn is None:
        return None
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    kinds = {vector.dtype for vector in bn[:4] if vector is not None}
    kind = x.dtype if kinds == {x.dtype} else wide
    return BatchNormParams(
        *(None if vector is None else vector.to(kind).contiguous() for vector in bn[:4]), bn.eps
    )


def vector_bytes(bn: BatchNormParams | None) -> int:
    vectors = () if bn is None else bn[:4]
    return sum(v.numel() * v.element_size() for v in vectors if v is not None)


def needs_grad(*parts: Tensor | BatchNormParams | None) -> bool:
    """Whether autograd has to see an op on these."""
    if not torch.is_grad_enabled():
        return False
    tensors = (t for part in parts for t in (part[:4] if isinstance(part, tuple) else (part,)))
    return any(t.requires_grad for t in tensors if t is not None)
