"""How every benchmark measures: rates first, answers checked, caches cold, variants interleaved.

A :class:`Case` is one op at one shape and dtype, with the variants that compute it and the bytes
and flops that it takes. :func:`run` turns cases into a :class:`Report`, a :class:`Row` per variant:

1. :class:`Machine` measures the copy bandwidth and the matrix rate of the device, per dtype.
2. :class:`Trial` holds each variant to the tests' tolerance rule. A wrong one is not timed.
3. :func:`interleave` times all variants of a case in turn, in a shuffled order, the last-level
   cache flushed before each call. The first variant runs twice a round: what the two differ by is
   noise.

Bytes are compulsory traffic, the same for each variant of a case: what the op needs, not what a
variant moves. "% bound" is the larger of the shares of copy bandwidth and matrix rate.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numerics import assert_close_as_eager, gradients, map_floats, max_error, tensors_in
from torch import Tensor

from benchmarks.environment import environment, last_level_cache
from benchmarks.report import TOO_NOISY, Rates, Report, Row, dtype_name, summarize
from cvkernels import record
from cvkernels.backend import BackendError

AGAIN = "again"
WARM_UP = 3
# A call of an op takes microseconds: a host sample is the mean of this many.
HOST_CALLS = 50


@dataclass(frozen=True, eq=False)
class Case:
    """One op at one shape and dtype on one device.

    ``inputs`` makes args and kwargs; ``reference`` and every variant take them. ``variants`` maps a
    name to a factory, called once per case, before any timing. A name's first word is "eager",
    "compile" or "cvkernels". Without ``bytes`` or ``flops`` the columns that come from them stay
    empty.

    part: "forward"; "backward", of inputs that require gradients, the forward untimed; or "host",
        the time that the caller's thread spends in one call, in warm caches.
    bitwise: the op moves data, and must be equal to the reference.
    """

    op: str
    name: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], tuple[tuple, dict]]
    reference: Callable
    variants: Mapping[str, Callable[[], Callable]]
    bytes: int | None = None
    flops: int | None = None
    part: str = "forward"
    bitwise: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-{dtype_name(self.dtype)}-{self.part}"


@dataclass(frozen=True)
class Settings:
    """How long a case is measured: ``rounds``, fewer after ``seconds``, ``least`` in any case."""

    rounds: int = 100
    seconds: float = 3.0
    least: int = 8


QUICK = Settings(rounds=20, seconds=0.8, least=5)


@dataclass(frozen=True)
class Timed:
    """``run(*setup())`` with only ``run`` timed; a sample is the mean of ``repeats`` runs.

    host: what counts is the time until ``run`` returns, with warm caches and an idle device.
    """

    run: Callable[..., object]
    setup: Callable[[], tuple] = tuple
    repeats: int = 1
    host: bool = False


class CudaInstant:
    """A moment on the current stream; the difference of two is in seconds, as of perf_counter's."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: CudaInstant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock_of(device: torch.device) -> Callable[[], Any]:
    return CudaInstant if device.type == "cuda" else time.perf_counter


class Machine:
    """The device under measurement: its clock, its caches and its rates."""

    def __init__(self, device: torch.device, clock: Callable[[], Any] | None = None) -> None:
        self.device = device
        self.clock = clock or clock_of(device)
        self.cache_bytes = last_level_cache(device)
        # On CUDA also long enough to hide the launches of the timed call behind it.
        size = max(2 * self.cache_bytes, 2**28 if device.type == "cuda" else 0)
        self._evictor = torch.rand(size // 4, device=device)
        self._evictions = 1
        self._rates: dict[torch.dtype, Rates] = {}

    def make_cold(self) -> None:
        """Fill the last-level cache with other data by reading: writes would still be under way."""
        for _ in range(self._evictions):
            self._evictor.sum()

    def hide_launches(self, calls: Iterable[Timed]) -> None:
        """Evict for so long that the GPU is still at it when the slowest call has been queued."""
        if self.device.type != "cuda":
            return
        self._evictions = 1
        eviction = self.sample(Timed(self._evictor.sum))
        launch = max((self.sample(_as_host(call)) for call in calls), default=0.0)
        self._evictions = 1 + math.ceil(launch / eviction)

    def sample(self, timed: Timed) -> float:
        """Seconds of one run, in cold caches; of the host's part of one in warm ones."""
        arguments = timed.setup()
        if timed.host:
            self.synchronize()
            clock = time.perf_counter
        else:
            self.make_cold()
            clock = self.clock
        start = clock()
        for _ in range(timed.repeats):
            timed.run(*arguments)
        stop = clock()
        return (stop - start) / timed.repeats

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rates(self, dtype: torch.dtype) -> Rates:
        if dtype not in self._rates:
            self._rates[dtype] = self._measure_rates(dtype)
        return self._rates[dtype]

    def _measure_rates(self, dtype: torch.dtype) -> Rates:
        cuda = self.device.type == "cuda"
        elements = max(4 * self.cache_bytes, 2**30 if cuda else 0) // dtype.itemsize
        source = torch.rand(elements, device=self.device).to(dtype)
        target = torch.empty_like(source)
        # A CPU that only emulates a half dtype takes a hundred times as long.
        side = 8192 if cuda else 1024 if dtype == torch.float32 else 512
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        calls = {
            "copy": Timed(lambda: target.copy_(source)),
            "matrix": Timed(lambda: torch.mm(a, b, out=product)),
        }
        samples = interleave(calls, self, Settings(rounds=15, seconds=2.0, least=5))
        copy, matrix = (summarize(samples[name]).median for name in ("copy", "matrix"))
        return Rates(2 * source.nbytes / copy / 1e9, 2 * side**3 / matrix / 1e12)


def _as_host(timed: Timed) -> Timed:
    return Timed(timed.run, timed.setup, host=True)


class WrongResult(Exception):
    """A variant's answer is further from the float64 answer than the tests allow."""


class Trial:
    """A case with its inputs made and its float64 answer known: checks and binds the variants."""

    def __init__(self, case: Case) -> None:
        # One function compiled for ever more shapes would reach dynamo's limit and run eagerly.
        torch.compiler.reset()
        torch.manual_seed(0)
        self.case = case
        self.args, self.kwargs = case.inputs()
        for tensor in tensors_in([self.args, self.kwargs]):
            if tensor.numel() and not tensor.any():
                raise ValueError(f"{case.op} {case.id}: an input is all zeros, which times nothing")
        exact = map_floats(_double, self.args), map_floats(_double, self.kwargs)
        self._exact = self._results(case.reference, *exact)
        self._eager = self._results(case.reference, self.args, self.kwargs)

    def _results(self, function: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
        if self.case.part == "backward":
            return gradients(function, args, kwargs)
        return [function(*args, **kwargs)]

    def check(self, function: Callable) -> float:
        """Largest error against float64.

        Raises:
            WrongResult: it is more than the tests allow.
        """
        actual = self._results(function, self.args, self.kwargs)
        if self.case.bitwise and not all(map(torch.equal, actual, self._eager)):
            raise WrongResult("not equal to the reference")
        try:
            for ours, theirs, truth in zip(actual, self._eager, self._exact, strict=True):
                assert_close_as_eager(ours, theirs, truth)
        except AssertionError as error:
            raise WrongResult(*error.args) from None
        return max(map(max_error, actual, self._exact))

    def backend(self, function: Callable) -> tuple[str, str]:
        """The backend that a variant of ours runs; why, where it is the reference."""
        recorder = _Reasons()
        with record.recording(recorder):
            function(*self.args, **self.kwargs)
        if recorder.calls:
            return recorder.calls[0].backend, ""
        return "reference", recorder.fallback_reason

    def bind(self, function: Callable) -> Timed:
        args, kwargs = self.args, self.kwargs
        if self.case.part == "host":
            return Timed(lambda: function(*args, **kwargs), repeats=HOST_CALLS, host=True)
        if self.case.part == "forward":
            return Timed(lambda: function(*args, **kwargs))
        leaves = [tensor for tensor in tensors_in([args, kwargs]) if tensor.requires_grad]
        cotangent = torch.randn_like(function(*args, **kwargs))
        return Timed(
            lambda out: torch.autograd.grad(out, leaves, cotangent),
            lambda: (function(*args, **kwargs),),
        )


class _Reasons(record.Recorder):
    """Also keeps why the reference ran."""

    fallback_reason = ""

    def fallback(self, reason: str) -> contextlib.AbstractContextManager[None]:
        self.fallback_reason = reason
        return super().fallback(reason)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def interleave(
    calls: Mapping[str, Timed],
    machine: Machine,
    settings: Settings,
    samples: dict[str, list[float]] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every call, by name, in ``samples``: each round runs each call once, shuffled."""
    samples = {} if samples is None else samples
    samples.update({name: [] for name in calls})
    order = random.Random(0)
    end = time.perf_counter() + settings.seconds
    for done in range(settings.rounds):
        if done >= settings.least and time.perf_counter() > end:
            break
        for name in order.sample(list(calls), len(calls)):
            samples[name].append(machine.sample(calls[name]))
        tick()
    return samples


def new_row(case: Case, variant: str) -> Row:
    return Row(
        case.op, case.part, case.name, case.shape, dtype_name(case.dtype), variant,
        bytes=case.bytes, flops=case.flops,
    )  # fmt: skip


def prepare(trial: Trial, row: Row) -> Timed | None:
    """The row's variant made, checked and warm; None where it cannot run, and the row says why."""
    try:
        function = trial.case.variants[row.variant]()
        row.max_error = trial.check(function)
        row.backend, row.note = (row.peer, "") if row.peer else trial.backend(function)
        timed = trial.bind(function)
        for _ in range(WARM_UP):
            timed.run(*timed.setup())
    except WrongResult as error:
        row.status, row.note = "wrong", _one_line(error)
    except (BackendError, torch.OutOfMemoryError) as error:
        row.status, row.note = "unavailable", _one_line(error)
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything, and other rows count too
        row.status = "unavailable" if row.peer else "failed"
        row.note = f"{type(error).__name__}: {_one_line(error)}"
    else:
        return timed
    row.max_error = None
    return None


def _one_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def fill(row: Row, samples: Sequence[float], rates: Rates) -> None:
    """The row's columns that come from its time."""
    timing = summarize(samples)
    row.status, row.samples = "measured", len(samples)
    row.time_us, row.p20_us, row.p80_us = (seconds * 1e6 for seconds in timing)
    bounds = []
    if row.bytes is not None:
        row.gb_per_s = row.bytes / timing.median / 1e9
        row.copy_share = row.gb_per_s / rates.copy_gb_per_s
        bounds.append(row.copy_share)
    if row.flops is not None:
        row.tflop_per_s = row.flops / timing.median / 1e12
        row.matrix_share = row.tflop_per_s / rates.matrix_tflop_per_s
        bounds.append(row.matrix_share)
    row.bound_share = max(bounds, default=None)


def compare(rows: Sequence[Row]) -> None:
    """Speed-ups over the peers, among the rows of one case."""
    times = {row.variant: row.time_us for row in rows if row.time_us is not None}
    for row in rows:
        if row.time_us is not None:
            row.vs_eager = times["eager"] / row.time_us if "eager" in times else None
            row.vs_compile = times["compile"] / row.time_us if "compile" in times else None


def measure_case(
    case: Case,
    machine: Machine,
    settings: Settings,
    report: list[Row],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Append a row per variant of ``case`` to ``report``; after Ctrl-C, those that have samples."""
    rows = {name: new_row(case, name) for name in case.variants}
    samples: dict[str, list[float]] = {}
    first = ""
    try:
        with grad_mode(case):
            trial = Trial(case)
            prepared = {name: prepare(trial, row) for name, row in rows.items()}
            calls = {name: timed for name, timed in prepared.items() if timed is not None}
            machine.hide_launches(calls.values())
            if calls:
                first = next(iter(calls))
                interleave({**calls, AGAIN: calls[first]}, machine, settings, samples, tick)
    except (RuntimeError, ValueError) as error:
        # The reference did not fit, or a call failed after its checks: the other cases go on.
        for row in rows.values():
            if row.status == "pending":
                out_of_memory = isinstance(error, torch.OutOfMemoryError)
                row.status = "unavailable" if out_of_memory else "failed"
                row.note = _one_line(error)
    finally:
        for name, row in rows.items():
            if row.status == "pending" and samples.get(name):
                fill(row, samples[name], machine.rates(case.dtype))
        if samples.get(AGAIN) and rows[first].time_us:
            again = summarize(samples[AGAIN]).median * 1e6 / rows[first].time_us
            rows[first].again = again
            if abs(math.log(again)) > TOO_NOISY:
                rows[first].note = f"noisy: {again:.2f}x when timed again"
        compare(list(rows.values()))
        report.extend(row for row in rows.values() if row.status != "pending")


def grad_mode(case: Case) -> contextlib.AbstractContextManager[None]:
    return torch.set_grad_enabled(case.part == "backward")


def run(
    cases: Sequence[Case],
    machine: Machine,
    settings: Settings,
    start_case: Callable[[int, Case], None] = lambda index, case: None,
    tick: Callable[[], None] = lambda: None,
) -> Report:
    """Measure the cases in turn; Ctrl-C ends it and keeps what was measured."""
    report = Report(environment(machine.device))
    try:
        for index, case in enumerate(cases):
            start_case(index, case)
            report.rates[dtype_name(case.dtype)] = machine.rates(case.dtype)
            measure_case(case, machine, settings, report.rows, tick)
    except KeyboardInterrupt:
        report.complete = False
    return report


def compiled(function: Callable) -> Callable:
    """torch.compile's variant of a peer, static in its shapes as the others are."""
    return torch.compile(function, fullgraph=True, dynamic=False)
