"""A checked call of an op, as a function of its data: what a plan is, and where plans are kept."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from cvkernels import record
from cvkernels.backend import in_force
from cvkernels.ops.common import autograd
from cvkernels.ops.common.autograd import observed, tensors_of
from cvkernels.ops.common.dispatch import Call, Implementation, Table, choose
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.common.work import GPU, Work, streaming


class Plan:
    """One call of ``op``, all but its data: call it with other data of the same kind.

    Made by the ``plan`` of a public op, which checks the arguments, chooses the backend and holds
    what was derived from the parameters as they were then, which must not have changed.

    Raises:
        ValueError: an argument has another shape, other strides, another dtype or device than the
            one that the plan was made for, or is present where that was not; a gradient is needed,
            or a transform, dispatch mode or tracer is active, and the plan was made without.
    """

    __slots__ = ("_expected", "_traffic", "_work", "backend", "op", "reason", "run")

    def __init__(
        self,
        op: str,
        backend: str,
        reason: str,
        run: Callable[..., Any],
        traffic: Callable[[], Traffic] | Traffic,
        work: Callable[[GPU], tuple[Work, ...]] | None = None,
    ) -> None:
        self.op = op
        self.backend = backend
        self.reason = reason
        self.run = run  # checks nothing, and is not seen by a running explain
        self._traffic = traffic
        self._work = work
        self._expected: _Expected | None = None

    @property
    def traffic(self) -> Traffic:
        """What one call moves, by the op's byte model."""
        if not isinstance(self._traffic, Traffic):
            self._traffic = self._traffic()
        return self._traffic

    def work(self, gpu: GPU) -> tuple[Work, ...]:
        """What its launches do on ``gpu``: as the op describes it, else its traffic alone."""
        described = self._work(gpu) if self._work is not None else ()
        return described or streaming(self.traffic)

    def expecting(self, call: Call, held: Iterable = (), **examples: Tensor | None) -> Plan:
        """The plan, called with data like ``examples``; ``held`` are its parameters.

        A plan for one call is called with its examples, by the op.
        """
        if not call.once:
            kinds = [_kind(t) for t in examples.values()]
            learns = any(t.requires_grad for t in tensors_of(*held))
            transformed = autograd.transformed()
            self._expected = _Expected(tuple(examples), kinds, call.grad, learns, transformed)
        return self

    def __call__(self, *data: Any) -> Any:
        if self._expected is not None:
            self._check(self._expected, data)
        return self.recorded(*data)

    def recorded(self, *data: Any) -> Any:
        """``run``, seen by a running ``explain``."""
        if (recorder := record.active()) is None:
            return self.run(*data)
        if self.backend == "reference":
            with recorder.fallback(f"{self.op}: {self.reason}"):
                return self.run(*data)
        with recorder.call(self.op, self.backend, self.reason, *self.traffic):
            return self.run(*data)

    def _check(self, expected: _Expected, data: tuple) -> None:
        op, given = self.op.removesuffix("_forward"), [_kind(t) for t in data]
        given += [None] * (len(expected.kinds) - len(given))
        if given != expected.kinds:
            names = expected.names
            if len(given) > len(names):
                raise TypeError(f"{op}: the plan takes {', '.join(names)}, got {len(given)}")
            for name, kind, other in zip(names, expected.kinds, given, strict=True):
                if kind != other:
                    raise ValueError(
                        f"{op}: the plan is for {name} = {_shown(kind)}, got {_shown(other)}; "
                        f"make a plan for it with {op}.plan"
                    )
        if self.backend == "reference" or expected.grad:
            return
        if (expected.learns and _grad_enabled()) or autograd.needs_grad(*data):
            raise ValueError(
                f"{op}: the plan was made where no gradient was needed, and one is; make a plan "
                f"for it with {op}.plan, or call this one under torch.no_grad()"
            )
        if autograd.transformed() and not expected.transformed:
            raise ValueError(
                f"{op}: a transform, dispatch mode or tracer is active, and the plan was made "
                f"without; make a plan under it with {op}.plan"
            )

    def bind(self, operands: Any) -> Plan:
        """The plan with its function's first argument given."""
        run = functools.partial(self.run, operands)
        return Plan(self.op, self.backend, self.reason, run, self._traffic, self._work)

    def __repr__(self) -> str:
        return f"<plan of {self.op}: {self.backend} ({self.reason})>"


class _Expected(NamedTuple):
    """What a plan was made for."""

    names: tuple[str, ...]
    kinds: list[tuple | None]
    grad: bool
    learns: bool  # whether a parameter requires a gradient
    transformed: bool


def _kind(t: Any) -> tuple | None:
    """All of a tensor that a plan depends on."""
    if not isinstance(t, Tensor):
        return t if t is None else (type(t),)
    kind = Tensor if type(t) is Parameter else type(t)
    if not _dense(t):
        return kind, t.layout
    return kind, t.shape, t.stride(), t.dtype, t.device


def _shown(kind: tuple | None) -> str:
    if kind is None or len(kind) < 3:
        return "None" if kind is None else kind[0].__name__
    name, shape, stride, dtype, device = kind
    return f"{name.__name__}{list(shape)} of strides {list(stride)}, {dtype} on {device}"


class PlanTable:
    """The plans of an op's last kinds of calls, for calls with nothing to fold or pack.

    A key holds all that checks and choice look at: the surroundings of the call, its options, and
    of each tensor everything but its contents. Options are to be exact: 2.0 would be taken for 2.
    """

    CAPACITY = 512

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()

    def get(self, key: Hashable | None) -> Any:
        try:
            return self._plans.get(key)
        except TypeError:  # an option that cannot be hashed, which is refused or is planned anew
            return None

    @staticmethod
    def key(backend: str, tensors: Iterable[Tensor | None], *options: Hashable) -> tuple | None:
        """The key of a call; None where one of its tensors is not exactly a dense tensor."""
        grad = _grad_enabled()
        parts: list[Hashable] = [options, backend, _requested(), grad, observed()]
        for t in tensors:
            if t is None:
                parts.append(None)
            elif type(t) is not Tensor and type(t) is not Parameter or not _dense(t):
                return None
            elif grad:
                parts += (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
            else:
                parts += (t.shape, t.stride(), t.dtype, t.device)
        return tuple(parts)

    @staticmethod
    def key_of_one(backend: str, x: Tensor, options: Hashable) -> tuple | None:
        """:meth:`key` of a call on one tensor, where every attribute that is read counts."""
        if type(x) is not Tensor and type(x) is not Parameter or not _dense(x):
            return None
        return (
            options, backend, _requested(), _grad_enabled() and x.requires_grad,
            # observed(), whose call would cost as much as all of these
            _transform() or _dispatch_modes() and has_dispatch_modes() or _tracer()
            or _function_mode() or _profiler(),
            x.shape, x.stride(), x.dtype, x.device,
        )  # fmt: skip

    def keep(self, key: Hashable | None, plan: Plan, *tensors: Tensor | None) -> Plan:
        """The plan, kept for calls with this key if all tensors have memory."""
        if key is not None and all(t is None or t.is_cpu or t.is_cuda for t in tensors):
            while len(self._plans) >= self.CAPACITY:
                self._plans.popitem(last=False)
            with contextlib.suppress(TypeError):  # see get
                self._plans[key] = plan
        return plan


def _dense(t: Tensor) -> bool:
    """Whether its elements are what is in its memory."""
    return t.layout is _STRIDED and not t.is_neg()


_STRIDED = torch.strided
_requested, _grad_enabled = in_force, torch.is_grad_enabled
_transform, _dispatch_modes = autograd._transform, autograd._dispatch_modes
has_dispatch_modes = autograd.has_dispatch_modes
_tracer, _function_mode = autograd._tracer, autograd._function_mode
_profiler = autograd._profiler


def plan_of(
    table: Table,
    problem: Any,
    call: Call,
    operands: tuple,
    traffic: Callable[[str], Traffic],
    registered: Callable[[str], Callable[..., Any]] | None = None,
    implementation: Implementation | None = None,
    work: Callable[[str, GPU], tuple[Work, ...]] | None = None,
) -> Plan:
    """The plan of a checked call, by the table, or by one implementation of it that is given.

    ``traffic`` and ``work`` are of the implementation's name. ``registered`` gives the function
    that calls the registered op, for an implementation by name: it runs where a gradient is needed,
    and in a graph under torch.compile, which chooses when it runs.
    """
    reason = "requested"
    if implementation is None:
        implementation, (_, reason) = choose(table, problem, call)
    name = implementation.name
    compiling = torch.compiler.is_compiling()
    if registered is not None and name != "reference" and (call.grad or compiling):
        run = registered(call.requested if compiling else name)
    else:
        run = implementation.build(problem, call, *operands)
    # Kept plans do not hold what traffic looks at.
    moves = functools.partial(traffic, name)
    if not call.once:
        return Plan(table.op, name, reason, run, moves())
    does = None if work is None else functools.partial(work, name)
    return Plan(table.op, name, reason, run, moves, does)


Function = TypeVar("Function", bound=Callable)


def planned_by(plan: Callable[..., Plan]) -> Callable[[Function], Function]:
    """Give a public op its ``plan``."""

    def decorate(function: Function) -> Function:
        function.plan = plan  # type: ignore[attr-defined]
        return function

    return decorate
