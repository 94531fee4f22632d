"""A checked call of an op, as a function of its data: what a plan is, and where plans are kept."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from cvkernels import record
from cvkernels.backend import in_force
from cvkernels.ops.common.autograd import observed
from cvkernels.ops.common.traffic import Traffic

_recorder = record.current


class Plan:
    """One call of ``op``, all but its data: call it with other data of the same kind.

    Made by the ``plan`` of a public op, which checks the arguments, chooses the backend and holds
    what was derived from the parameters as they were then. A call checks nothing: its tensors must
    have the shapes, strides, dtypes and device of those that the plan was made for, and be present
    where those were, the surroundings (grad mode, autocast, transforms and modes) must be the same,
    and the parameters must not have changed.
    """

    __slots__ = ("_traffic", "backend", "op", "reason", "run")

    def __init__(
        self,
        op: str,
        backend: str,
        reason: str,
        run: Callable[..., Any],
        traffic: Callable[[], Traffic],
    ) -> None:
        self.op = op
        self.backend = backend
        self.reason = reason
        self.run = run
        self._traffic: Callable[[], Traffic] | Traffic = traffic

    @property
    def traffic(self) -> Traffic:
        """What one call moves, by the op's byte model."""
        if not isinstance(self._traffic, Traffic):
            self._traffic = self._traffic()
        return self._traffic

    def __call__(self, *data: Any) -> Any:
        if (recorder := _recorder()) is None:
            return self.run(*data)
        if self.backend == "reference":
            with recorder.fallback(f"{self.op}: {self.reason}"):
                return self.run(*data)
        with recorder.call(self.op, self.backend, self.reason, *self.traffic):
            return self.run(*data)

    def bind(self, operands: Any) -> Plan:
        """The plan with its function's first argument given."""
        run = functools.partial(self.run, operands)
        return Plan(self.op, self.backend, self.reason, run, lambda: self.traffic)

    def __repr__(self) -> str:
        return f"<plan of {self.op}: {self.backend} ({self.reason})>"


class PlanTable:
    """The plans of an op's last kinds of calls, for calls with nothing to fold or pack.

    A key holds all that checks and choice look at: the surroundings of the call, its options, and
    of each tensor everything but its contents. Options are to be exact: 2.0 would be taken for 2.
    """

    CAPACITY = 512

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self.get = self._plans.get

    @staticmethod
    def key(backend: str, tensors: Iterable[Tensor | None], *options: Hashable) -> tuple | None:
        """The key of a call; None where one of its tensors is not exactly a tensor."""
        kinds: list[tuple | None] = []
        for t in tensors:
            if t is None:
                kinds.append(None)
            elif type(t) is Tensor or type(t) is Parameter:
                kinds.append((t.shape, t.stride(), t.dtype, t.device, t.requires_grad))
            else:
                return None
        return (backend, _requested(), _grad_enabled(), observed(), options, *kinds)

    def keep(self, key: Hashable | None, plan: Plan, *tensors: Tensor | None) -> Plan:
        """The plan, kept for calls with this key if all tensors have memory."""
        if key is not None and all(t is None or t.is_cpu or t.is_cuda for t in tensors):
            while len(self._plans) >= self.CAPACITY:
                self._plans.popitem(last=False)
            self._plans[key] = plan
        return plan


_requested, _grad_enabled = in_force, torch.is_grad_enabled


Function = TypeVar("Function", bound=Callable)


def planned_by(plan: Callable[..., Plan]) -> Callable[[Function], Function]:
    """Give a public op its ``plan``."""

    def decorate(function: Function) -> Function:
        function.plan = plan  # type: ignore[attr-defined]
        return function

    return decorate
