"""Gradients that are differentiable themselves, or come in a batch: by stock operations.

The kernels' gradients are for a plain backward pass. Under ``create_graph=True``, and for a batch
of gradients (``is_grads_batched=True``), a block is computed again by stock operations, which
autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def stock_gradients(
    compute: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of ``compute(*inputs)`` in those inputs that ``needs`` names.

    Under ``create_graph=True`` they are differentiable in the inputs and in ``grads``.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: what else an input is used for, before or behind the block, does not count here.
        inputs = [
            t if t is None else t.view_as(t) if t.requires_grad == need
            else t.detach().requires_grad_(need)
            for t, need in zip(inputs, needs, strict=True)
        ]  # fmt: skip
        outs = compute(*inputs)
    ends = [
        (out, grad)
        for out, grad in zip(outs, grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    if not ends:
        return [None] * len(inputs)
    outs, grads = zip(*ends, strict=True)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(outs, wanted, grads, create_graph=graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
