"""The layout of the maps that callers get: that of the map they gave, as in stock PyTorch.

Kernels want channels_last, and images mostly come contiguous. A module whose inner maps reach no
code but ours (a network, a stage, a block) is sealed: it runs channels_last within, and returns a
dense map in the layout of its input; of modules in modules the outermost does so. Where a hook or a
module of the caller's may see the maps within, each fused call keeps the layout of its input.

No other code runs while a sealed module does. So what its blocks keep is verified once, before.

Under ``torch.compile`` layouts are left to the compiler.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cvkernels import extension
from cvkernels.nn.fused.plan_cache import Guard, guard_of, running
from cvkernels.nn.fused.watched import forbids_kept, hooks_of, why_watched
from cvkernels.nn.training.recompute import recompute_of, with_recompute
from cvkernels.ops.common.layout import format_of, is_nhwc

# Their modules take a map in any layout.
LIBRARIES = ("torch.nn.", "torch.distributed.", "torchvision.", "timm.", "cvkernels.")


def in_layout_of_input(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's ``forward`` that returns a map in the layout of the one it takes."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if running.sealed:
            return forward(self, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, list) and x:
            x = x[0]
        if not _is_map(x):
            return forward(self, *args, **kwargs)
        if why_watched(x) or not (seal := _seal_of(self, x)):
            return like_input(x, forward(self, *args, **kwargs))
        running.sealed, running.verified = True, seal.state
        try:
            y = forward(self, *args, **kwargs)
        finally:
            running.sealed, running.verified = False, None
        return like_input(x, y)

    # torch.compile counts what it compiled by code object: each forward has one of its own.
    run.__code__ = run.__code__.replace(co_name=forward.__name__)
    return run


def like_input(x: Tensor, y: Any) -> Any:
    """y, in the layout of x where both are maps, unless a sealed module is running."""
    if running.sealed or not _is_map(x) or not _is_map(y):
        return y
    copy = y.contiguous(memory_format=format_of(is_nhwc(x) and not x.is_contiguous()))
    if copy is not y and (recompute := recompute_of(y)) is not None:
        return with_recompute(copy, recompute.node, recompute.saved)
    return copy


def is_sealed(module: nn.Module) -> bool:
    """Whether no hook and no module of the caller's sees the maps inside ``module``."""
    return _seal_of(module, None) is not None


def _seal_of(module: nn.Module, x: Tensor | None) -> _Seal | None:
    """The seal of a sealed module, looked over for a call on x."""
    seal = module.__dict__.get("_seal")
    if seal is not None and seal.holds(module, x):
        return seal
    _, *inner = module.modules()
    if any(_may_be_callers(each) for each in inner):
        return None
    seal = module.__dict__["_seal"] = _Seal(module, inner)
    return seal


class _Seal:
    """That a module is sealed, with guards of what is inside it.

    It does not hold the module, which holds it. ``state`` stands for all that the blocks inside
    make plans from, as it is found in one call after the other; None where it is not known.
    """

    def __init__(self, module: nn.Module, inner: list[nn.Module]) -> None:
        self._children = tuple(module._modules.values())
        self._structure = None
        if extension.has("cpu"):
            native = importlib.import_module("cvkernels._C")
            self._structure = native.Guard([(each, (), ("forward",)) for each in inner], (), ())
        # A guard is not worth it where something changes at every call: one is made at the second
        # call in a row that found no change.
        self._guard: Guard | None = None
        self._found: object | None = None
        self._changed = True
        self.state: object | None = None

    def holds(self, module: nn.Module, x: Tensor | None) -> bool:
        """Whether the children, their classes and hooks are the same; renews :attr:`state`."""
        if self._structure is None or self._children != tuple(module._modules.values()):
            return False
        may_keep = x is not None and not forbids_kept(x)
        self.state = self._verified(module, x) if may_keep else None
        return self.state is not None or self._structure.holds()

    def _verified(self, module: nn.Module, x: Tensor) -> object | None:
        if self._guard is None:
            if self._changed:
                self._changed = False
                return None
            modules = [each for each in module.modules() if type(each) is not nn.Linear]
            self._guard, self._found = guard_of(x, modules), object()
        if self._guard is None or not self._guard.holds():
            self._guard, self._found, self._changed = None, None, True
        return self._found


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
