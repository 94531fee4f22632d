"""The plans of a block's calls, kept while all that they were made from stays the same.

A network whose inner maps reach no code but ours (:mod:`.caller_layout`) is looked over once a
call, for all of its blocks; a block that is called by other code looks itself over.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from cvkernels import extension
from cvkernels.nn.fused.watched import (
    SHADOWS,
    STOCK_CODE,
    forbids_kept,
    why_replaced,
    why_written_unseen,
)
from cvkernels.ops.common.contents import Contents
from cvkernels.ops.common.norm import BATCH_NORMS

# Shapes of data per cache, as many as a convolution keeps folded weights for.
CAPACITY = 4
# What modules compute by, but for their tensors and children.
OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    **dict.fromkeys(BATCH_NORMS, ("training", "eps")),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.MaxPool2d: (
        "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices",
    ),
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Identity, nn.Sequential), ("training",)
    ),
}  # fmt: skip
# An activation may stand in a block as a function, which has no options.
Part = nn.Module | Callable | None


class Running(threading.local):
    """What is known of the call that this thread runs.

    Attributes:
        sealed: a module runs whose inner maps reach no code but ours.
        verified: stands for the state in which the guard of all its modules found them, in a call
            that may run kept plans; else None.
    """

    sealed: bool = False
    verified: object | None = None


running = Running()


class Guard:
    """Whether modules are what they were when this was made.

    What counts is each module's class, options, hooks and children, the code of PyTorch's that an
    op stands for, and each floating tensor: the object, its memory, sizes and version and, on CPU,
    a sample of its contents (:mod:`cvkernels.ops.common.contents`).
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        tensors = {
            id(t): t
            for module in modules
            for t in (*module._parameters.values(), *module._buffers.values())
            if t is not None and t.is_floating_point()
        }
        # Keeps the memory alive: no other tensor comes to its address.
        self._held = [t.detach() for t in tensors.values()]
        entries = [(module, _options_of(module), SHADOWS) for module in modules]
        code = [(owner, name) for owner, name, _ in STOCK_CODE]
        code += [(kind, "forward") for kind in {type(module) for module in modules}]
        native = importlib.import_module("cvkernels._C")
        self._same = native.Guard(entries, code, list(tensors.values())).holds
        # What was running when this guard last held: while that is the same, it holds.
        self.verified: object | None = None
        self._digest, self._kept = None, None
        if all(t.is_cpu for t in self._held):
            self._digest = Contents(self._held).digest
            self._kept = self._digest()

    def holds(self) -> bool:
        return self._same() and (self._digest is None or self._digest() == self._kept)


def guard_of(x: Tensor, modules: Sequence[nn.Module]) -> Guard | None:
    """A guard of the modules that a plan for x bypasses; None where no plan may be kept."""
    if type(x) is not Tensor or forbids_kept(x) or not extension.has("cpu"):
        return None
    if why_replaced() or why_written_unseen(modules):
        return None
    return Guard(modules)


def _options_of(module: nn.Module) -> tuple[str, ...]:
    names = OPTIONS.get(type(module))
    return names or tuple(name for name in module.__dict__ if name[0] != "_")


class PlanCache:
    """Plans by the modules, shapes, strides and dtypes of their calls, each with its guard."""

    def __init__(self) -> None:
        self._kept: dict[tuple, tuple[Guard, Any]] = {}

    def get(self, x: Tensor, parts: tuple = (), *others: Tensor | None) -> Any:
        """The plan for data like x and the others, if it may run this call; else None.

        ``parts`` are what else a plan depends on: modules, which its guard keeps alive, activation
        functions, sizes.
        """
        kept = self._kept.get(_key(x, parts, others)) if self._kept else None
        if kept is None:
            return None
        guard, plan = kept
        verified = running.verified
        if verified is None or guard.verified is not verified:
            if forbids_kept(x) or not guard.holds():
                return None
            guard.verified = verified
        return plan

    def keep(
        self, guard: Guard, plan: Any, x: Tensor, parts: tuple = (), *others: Tensor | None
    ) -> None:
        """Keep a plan for data like x and the others; ``guard`` is older than the plan."""
        key = _key(x, parts, others)
        if key not in self._kept:
            while len(self._kept) >= CAPACITY:
                self._kept.pop(next(iter(self._kept)), None)
        self._kept[key] = (guard, plan)


def _key(x: Tensor, parts: tuple, others: tuple[Tensor | None, ...]) -> tuple:
    if not others:
        return type(x), x.device, x.dtype, x.shape, x.stride(), parts
    kinds = [t if t is None else (type(t), t.device, t.dtype, t.shape, t.stride()) for t in others]
    return type(x), x.device, x.dtype, x.shape, x.stride(), parts, *kinds
