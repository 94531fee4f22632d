"""Gradients that are differentiable themselves, or come in a batch: by stock operations.

The kernels' gradients are for a plain backward pass. Under ``create_graph=True``, and for a batch
of gradients (``is_grads_batched=True``), a block is computed again by stock operations, which
autograd differentiates.
"""

from __future__ import annotations

import torch
from torch import Tensor

_functorch = torch._C._functorch


def needs_stock(*grads: Tensor | None) -> bool:
    """Whether a backward pass with these gradients is more than the kernels can do."""
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return any(
        grad is not None
        and (
            _functorch.is_functorch_wrapped_tensor(grad) or _functorch.is_legacy_batchedtensor(grad)
        )
        for grad in grads
    )
