"""What a call has to know beside its arguments: autograd's and autocast's part in it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvkernels.ops.common import flops
from cvkernels.ops.common.norm import BatchNormParams


def tensors_of(*parts: Tensor | BatchNormParams | None) -> list[Tensor]:
    """The tensors that are there of these, and of the norms."""
    flat = [t for part in parts for t in (part[:4] if isinstance(part, tuple) else (part,))]
    return [t for t in flat if t is not None]


def needs_grad(*parts: Tensor | BatchNormParams | None) -> bool:
    """Whether autograd has to see an op on these."""
    if not torch.is_grad_enabled():
        return False
    for part in parts:
        for t in part[:4] if isinstance(part, tuple) else (part,):
            if t is not None and t.requires_grad:
                return True
    return False


def autocast_dtype(x: Any) -> torch.dtype | None:
    """The dtype that autocast converts this call's operands to; None where it leaves them alone."""
    if not isinstance(x, Tensor):  # is refused when it is checked
        return None
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


def to_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def mark_written(out: Tensor) -> None:
    """Tell autograd that an op wrote into ``out``, which a backward pass may have saved.

    A graph under torch.compile knows by the op's schema.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)


def without_gradient(backward: Callable) -> Callable:
    """A backward pass that gives no gradients where none comes, as PyTorch's own functions.

    A gradient of zeros would let weight decay move a head that the loss leaves out. The forward
    pass must ask for it by ``ctx.set_materialize_grads(False)``.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    return run


def transformed() -> bool:
    """Whether a transform, mode or tracer would lose what runs past PyTorch's dispatcher."""
    return _transform() is not None or has_dispatch_modes() or _tracer()


def has_dispatch_modes() -> bool:
    """Whether a mode sees each operator; those that count operations learn the compiled ops'."""
    return _dispatch_modes() > 0 and flops.tell()


def observed() -> bool:
    """Whether PyTorch's dispatcher has to see the ops: :func:`transformed`, or by a profiler."""
    return transformed() or _function_mode() or _profiler()


_transform = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_tracer = torch._C._is_tracing
_profiler = torch.autograd._profiler_enabled
