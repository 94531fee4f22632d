"""The launches of a plan, collected where they would run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cvkernels.ops.common.triton_launch import Launch


class Launched(NamedTuple):
    """One launch of a Triton kernel, and the operands that it was given."""

    launch: Launch
    operands: tuple[Any, ...]


class _Collecting(threading.local):
    """Of this thread: the launches that are collected in place of being made."""

    found: list[Launched] | None = None


collected = _Collecting()


@contextlib.contextmanager
def collecting() -> Iterator[list[Launched]]:
    """Launches of this thread go into a list and compute nothing.

    A plan for the meta device that is made within has its launches too; others have none.
    """
    outer, collected.found = collected.found, []
    try:
        yield collected.found
    finally:
        collected.found = outer
