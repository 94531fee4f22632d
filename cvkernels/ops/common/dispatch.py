"""Which implementation of an op runs a call: the first of the op's table that can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import record
from cvkernels.backend import BackendError, Choice
from cvkernels.ops.common import autograd
from cvkernels.ops.common.launches import collected


class Call(NamedTuple):
    """What an implementation is chosen by beside the problem: read once, when a call is planned."""

    x: Tensor  # an example of the first argument
    device: str  # the device type it is planned for: CUDA for meta tensors under explain
    requested: str
    grad: bool = False
    autocast: torch.dtype | None = None
    # Whether the plan is for this one call: then nothing is prepared that pays off in the next.
    once: bool = False

    @property
    def automatic(self) -> bool:
        return self.requested == "auto"

    @property
    def computes_nothing(self) -> bool:
        """Whether its plan has no launches: on the meta device, unless they are collected."""
        return self.x.is_meta and collected.found is None


class Implementation(NamedTuple):
    """One way to run an op.

    ``why_not(problem, call)`` is the reason why it cannot run a call, empty where it can;
    ``plan(problem, call, *operands)`` gives the function of the data that runs it. ``reason`` is
    why "auto" chooses it, ``device`` where "auto" considers it: "cpu", "cuda" (whatever is not on a
    CPU), or "" for both; None for what is known by name alone.
    """

    name: str
    why_not: Callable[[Any, Call], str]
    plan: Callable[..., Callable]
    reason: str | Callable[[Any, Call], str] = ""
    device: str | None = ""

    def build(self, *arguments: Any) -> Callable:
        """``plan(*arguments)``; what it derives is kept, so ``explain`` does not count it."""
        if record.active() is None:
            return self.plan(*arguments)
        with record.paused():
            return self.plan(*arguments)


class Table:
    """The implementations of ``op`` in the order in which "auto" considers them."""

    def __init__(self, op: str, *implementations: Implementation) -> None:
        self.op = op
        self.implementations = implementations
        fused = (i.name for i in implementations if i.name != "reference" and i.device is not None)
        # What ``backend.use`` binds the op to.
        self.names = tuple(dict.fromkeys(fused))


def reference(plan: Callable[..., Callable]) -> Implementation:
    """The last entry of every table: it runs whatever the others refuse, for their reason."""
    return Implementation("reference", lambda problem, call: "", plan)


def call_of(
    x: Tensor,
    tensors: Sequence,
    table: Table,
    backend: str,
    once: bool = False,
    autocast: torch.dtype | None = None,
) -> Call:
    """The call on x of an op in ``tensors``, whose arguments are checked."""
    requested = backends.requested(backend, table.names, table.op)
    grad = autograd.needs_grad(*tensors)
    return Call(x, backends.device_type(x), requested, grad, autocast, once)


def choose(table: Table, problem: Any, call: Call) -> tuple[Implementation, Choice]:
    """The requested implementation of a checked call, or the first that can run it.

    Raises:
        BackendError: the requested one cannot run the call.
    """
    if not call.automatic:
        return _requested(table, problem, call)
    reason = ""
    for implementation in table.implementations:
        if implementation.device is None:
            continue
        if implementation.device and (implementation.device == "cpu") != (call.device == "cpu"):
            continue
        if refused := implementation.why_not(problem, call):
            reason = refused
            continue
        why = implementation.reason or reason
        return implementation, Choice(
            implementation.name, why if isinstance(why, str) else why(problem, call)
        )
    raise AssertionError(f"{table.op}: the table has no reference")


def _requested(table: Table, problem: Any, call: Call) -> tuple[Implementation, Choice]:
    op, name = table.op, call.requested
    for implementation in table.implementations:
        if implementation.name == name:
            break
    else:
        known = ", ".join(f"'{known}'" for known in ("auto", *table.names))
        raise BackendError(f"{op}: there is no backend {name!r}; use {known} or 'reference'")
    if reason := implementation.why_not(problem, call):
        raise BackendError(refusal(op, name, reason))
    return implementation, Choice(name, "requested")


def refusal(op: str, name: str, reason: str) -> str:
    return (
        f"{op}: backend {name!r} cannot run this call: {reason}; use backend='auto' or 'reference'"
    )
