"""What a layer that grows a buffer remembers of its last calls on CPU.

A batch of one spends as long in Python as in a small convolution; the checks of a layer's modules
and parameters all come out as they did a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cvkernels import backend, record
from cvkernels.nn.fused.plan_cache import CAPACITY, stamp_of


class Verdict:
    """That a tree of modules may be bypassed, and what runs it, while nothing in it changes.

    What counts is each module's class, hooks and options, and each tensor's memory and version.
    """

    def __init__(self) -> None:
        self._stamp: tuple | None = None
        self._runs: dict[tuple, Any] = {}
        # Keeps the parameters' memory alive: no other tensor can come to its address.
        self._held: list[Tensor] = []

    def why_not(self, module: nn.Module, check: Callable[[], str]) -> str:
        """``check()``, or its last answer if that was empty and still stands."""
        stamp = stamp_of(module)
        if stamp is not None and stamp == self._stamp:
            return ""
        self._runs.clear()
        self._stamp = None
        if not (reason := check()) and stamp is not None:
            self._stamp = stamp
            self._held = [t.detach() for t in (*module.parameters(), *module.buffers())]
        return reason

    def recall(self, buffer: Tensor) -> Any:
        """What :meth:`keep` kept for buffers like this one; None if nothing may be used."""
        if self._stamp is None or not _plain(buffer):
            return None
        return self._runs.get((buffer.dtype, buffer.shape))

    def keep(self, buffer: Tensor, prepare: Callable[[], Any]) -> None:
        """Keep what ``prepare()`` gives for buffers like this one."""
        if self._stamp is None or not _plain(buffer):
            return
        while len(self._runs) >= CAPACITY:
            self._runs.pop(next(iter(self._runs)))
        self._runs[buffer.dtype, buffer.shape] = prepare()


def _plain(buffer: Tensor) -> bool:
    """Whether the call is on CPU, with no autograd, autocast, observer or request around it."""
    return (
        buffer.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and record.active() is None
        and backend.requested("auto", backend.NAMES) == "auto"
    )
