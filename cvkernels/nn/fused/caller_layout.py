"""The layout of the maps that callers get: that of the map they gave, as in stock PyTorch.

Kernels want channels_last, and images mostly come contiguous. A module whose inner maps reach no
code but ours (a network, a stage, a block) runs channels_last within, and returns a dense map in
the layout of its input; of modules in modules the outermost does so. Where a hook or a module of
the caller's may see the maps within, each fused call keeps the layout of its input.

Under ``torch.compile`` layouts are left to the compiler.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvkernels import extension
from cvkernels.nn.fused.watched import hooks_of, why_watched
from cvkernels.ops.common.layout import format_of, is_nhwc

# Their modules take a map in any layout.
LIBRARIES = ("torch.nn.", "torch.distributed.", "torchvision.", "timm.", "cvkernels.")


class _Running(threading.local):
    # Whether a module runs whose inner maps reach no code but ours.
    sealed = False


_running = _Running()


class _Seal(NamedTuple):
    """A module that was found sealed; a guard of what is inside it."""

    children: tuple[nn.Module | None, ...]
    guard: Any

    def holds(self, module: nn.Module) -> bool:
        return self.children == tuple(module._modules.values()) and self.guard.holds()


def in_layout_of_input(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's ``forward`` that returns a map in the layout of the one it takes."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _running.sealed:
            return forward(self, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, list) and x:
            x = x[0]
        if not _is_map(x):
            return forward(self, *args, **kwargs)
        if why_watched(x) or not is_sealed(self):
            return like_input(x, forward(self, *args, **kwargs))
        _running.sealed = True
        try:
            y = forward(self, *args, **kwargs)
        finally:
            _running.sealed = False
        return like_input(x, y)

    return run


def like_input(x: Tensor, y: Any) -> Any:
    """y, in the layout of x where both are maps, unless a sealed module is running."""
    if _running.sealed or not _is_map(x) or not _is_map(y):
        return y
    layout = format_of(is_nhwc(x) and not x.is_contiguous())
    return y.contiguous(memory_format=layout)


def is_sealed(module: nn.Module) -> bool:
    """Whether no hook and no module of the caller's sees the maps inside ``module``.

    Not asked again while its children, their classes and hooks are the same.
    """
    seal = module.__dict__.get("_seal")
    if seal is not None and seal.holds(module):
        return True
    _, *inner = module.modules()
    if any(_may_be_callers(each) for each in inner):
        return False
    if extension.has("cpu"):
        native = importlib.import_module("cvkernels._C")
        guard = native.Guard([(each, (), ("forward",)) for each in inner], (), ())
        module.__dict__["_seal"] = _Seal(tuple(module._modules.values()), guard)
    return True


def _may_be_callers(module: nn.Module) -> bool:
    """Whether it is, or has, code of neither PyTorch's nor the model libraries'."""
    return (
        "forward" in module.__dict__
        or not type(module).__module__.startswith(LIBRARIES)
        or not all(map(_is_pytorchs, hooks_of(module)))
    )


def _is_pytorchs(hook: Callable) -> bool:
    """Whether it is a hook that shards, prunes or normalises weights."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.")


def _is_map(x: Any) -> bool:
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
    )
