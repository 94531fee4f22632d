"""What a running ``explain`` sees of the calls: one record per op, with its layer, choice and cost.

Ops report to the active recorder with :meth:`Recorder.call`; without one, reporting costs one
context variable read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """One op as it ran, or as it would run on the planned device.

    ``bytes_read`` and ``bytes_written`` are the compulsory traffic: every element that the op needs
    once, whatever a cache would save or cost. ``kernels`` counts device launches. ``predicted_us``
    is of a frozen plan for a GPU that the time model knows, ``bound`` what it says takes longest.
    """

    layer: str
    op: str
    backend: str
    reason: str
    kernels: int
    bytes_read: int
    bytes_written: int
    predicted_us: float | None = None
    bound: str = ""


class Recorder:
    """Collects :class:`Call` records.

    ``names`` maps ``id(module)`` to the layer's name; ``meta_device`` is the device that meta
    tensors stand for.
    """

    def __init__(self, names: dict[int, str] | None = None, meta_device: str = "cuda") -> None:
        self.names = names or {}
        self.meta_device = meta_device
        self.calls: list[Call] = []
        self.layer = ""
        self.reason = ""
        self._inside_op = False
        self._inside_group = False

    def enter_module(self, module: object, args: object) -> None:
        """A module's forward begins: what follows belongs to it (a global forward pre-hook)."""
        self.layer = self.names.get(id(module), self.layer)

    def leave_module(self, module: nn.Module, args: object, output: object) -> None:
        """A module's forward ended with ``output`` (a global forward hook)."""

    def observe(self, module: object, output: Tensor) -> None:
        """The group of modules that ``module`` leads computed ``output``."""

    def owns(self, hook: object) -> bool:
        """Whether a global module hook is this recorder's own."""
        return hook in (self.enter_module, self.leave_module)

    @property
    def inside_op(self) -> bool:
        """True while a recorded op runs: what it does inside is not counted again."""
        return self._inside_op

    @contextlib.contextmanager
    def call(
        self, op: str, backend: str, reason: str, kernels: int, bytes_read: int, bytes_written: int
    ) -> Iterator[None]:
        """Record one op; wraps its execution, so that its inner aten calls are not counted too."""
        if self._inside_op:
            yield
            return
        self.calls.append(
            Call(self.layer, op, backend, reason, kernels, int(bytes_read), int(bytes_written))
        )
        self._inside_op = True
        try:
            yield
        finally:
            self._inside_op = False

    @contextlib.contextmanager
    def fallback(self, reason: str) -> Iterator[None]:
        """Give the aten ops run inside the block ``reason``: why no fused op ran in their place."""
        outer, self.reason = self.reason, self.reason or reason
        try:
            yield
        finally:
            self.reason = outer

    @contextlib.contextmanager
    def group(self, leader: object, reason: str) -> Iterator[None]:
        """What runs inside the block is the group of modules that ``leader`` leads.

        ``reason`` is why they run as modules; empty where they run as an op.
        """
        outer = self.layer
        self.enter_module(leader, None)
        self._inside_group = True
        try:
            with self.fallback(reason):
                yield
        finally:
            self._inside_group = False
            self.layer = outer


_active: ContextVar[Recorder | None] = ContextVar("cvkernels_recorder", default=None)
# As :func:`active`; not for traced code.
current = _active.get

# The context of a call that no ``explain`` sees.
UNSEEN = (_active, None)


def active() -> Recorder | None:
    """The recorder of the ``explain`` that is running, or None; None under torch.compile."""
    return None if torch.compiler.is_compiling() else _active.get()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Do not record what runs inside the block: one-time work whose result is cached."""
    if (recorder := active()) is None:
        yield
        return
    outer, recorder._inside_op = recorder._inside_op, True
    try:
        yield
    finally:
        recorder._inside_op = outer


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Make ``recorder`` the active one inside the ``with`` block."""
    token = _active.set(recorder)
    try:
        yield recorder
    finally:
        _active.reset(token)
