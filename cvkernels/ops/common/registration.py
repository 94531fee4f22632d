"""How an op is registered with PyTorch: its implementation, its fake and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cvkernels.ops.common.autograd import without_gradient


def register(
    library: torch.library.Library,
    op: str,
    function: Callable[..., Any],
    fake: Callable[..., Any] = lambda *_: None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """``function`` as the op on CPU and CUDA; without a fake it writes, and returns nothing."""
    name = f"cvkernels::{op}"
    for key in ("CPU", "CUDA"):
        library.impl(op, function, key)
    torch.library.register_fake(name, fake, lib=library)
    if backward is None or setup_context is None:
        return

    def set_up(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    backward = without_gradient(backward)
    torch.library.register_autograd(name, backward, setup_context=set_up, lib=library)
