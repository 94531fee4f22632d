"""How every benchmark measures: rates first, answers checked, caches cold, variants interleaved.

A :class:`Case` is one op at one shape and dtype, with the variants that compute it and the bytes
and flops that it takes. :func:`run_cases` makes a :class:`Report` of them, with a
:class:`Row` for each variant:

1. :class:`Machine` measures the copy bandwidth and the matrix rate of the device, per dtype.
2. :class:`Trial` holds each variant of ours to the tests' tolerance rule, and the peers to a wide
   one. A wrong one is not timed.
3. :func:`interleave` times all variants of a case in turn, in a shuffled order, the last-level
   cache flushed before each call, and on a CPU a rest before each call of a network. The first
   variant runs twice a round: what the two differ by is noise.

Bytes are compulsory traffic, the same for each variant of a case: what the op needs, not what a
variant moves. "% bound" is the larger of the shares of copy bandwidth and matrix rate.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch._inductor.utils import fresh_cache

from benchmarks.harness import report as reports
from benchmarks.harness.case import Case, PeerMissing, grad_mode
from benchmarks.harness.environment import environment
from benchmarks.harness.machine import Machine, Settings, Timed, interleave
from benchmarks.harness.report import Rates, Report, Row, dtype_name, summarize
from benchmarks.harness.sticky import ContextLost, check_context
from benchmarks.harness.trial import Trial, WrongResult
from cvkernels.backend import BackendError
from cvkernels.memory_use import out_of_memory, peak_memory, resident_memory
from cvkernels.tables import first_line

# By how much more than eager a peer may err and still be timed: others sum in orders that the
# tests' rule refuses, and their error stands in their rows.
PEER_FACTOR = 100.0
AGAIN = "again"
WARM_UP = 3


def new_row(case: Case, variant: str) -> Row:
    return Row(
        case.op, case.part, case.name, case.shape, dtype_name(case.dtype), variant,
        bytes=case.bytes, flops=case.flops,
    )  # fmt: skip


def prepare(trial: Trial, row: Row) -> Timed | None:
    """The row's variant made, checked and warm; None where it cannot run, and the row says why."""
    try:
        function = make(trial, row)
        row.max_error = trial.check(function, PEER_FACTOR if row.peer else 2.0)
        row.eager_error = trial.eager_error
        if trial.case.rounds:
            row.decibels, row.top1 = trial.agreement(function)
        row.backend, row.note = (row.peer, "") if row.peer else trial.backend(function)
        if hasattr(function, "saved_bytes"):
            row.saved_bytes = function.saved_bytes(*trial.args, **trial.kwargs)
        timed = trial.bind(function)
        for _ in range(0 if trial.case.network else WARM_UP):
            timed.run(*timed.setup())
    except WrongResult as error:
        row.status, row.note = "wrong", first_line(error)
    except (BackendError, PeerMissing) as error:
        row.status, row.note = "unavailable", first_line(error)
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything, and other rows count too
        row.status = "unavailable" if row.peer or out_of_memory(error) else "failed"
        row.note = f"{type(error).__name__}: {first_line(error)}"
        check_context(error)
    else:
        return timed
    row.max_error = row.eager_error = None
    return None


def make(trial: Trial, row: Row) -> Callable:
    """The row's variant; of a network also the time to its first result, and its memory."""
    factory = trial.case.variants[row.variant]
    if not trial.case.network:
        return factory()
    device = trial.args[0].device
    with fresh_cache():
        forget_triton_kernels()
        before, start = resident_memory(device), time.perf_counter()
        function = factory()
        function(*trial.args, **trial.kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row.first_batch_s = time.perf_counter() - start
        row.kept_bytes = max(resident_memory(device) - before, 0)
        row.peak_bytes = peak_memory(lambda: function(*trial.args, **trial.kwargs), device)
    return function


def forget_triton_kernels() -> None:
    """Have our Triton kernels compile again: a process keeps what it compiled of them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cvkernels."):
            for value in vars(module).values():
                if isinstance(caches := getattr(value, "device_caches", None), dict):
                    caches.clear()


def fill(row: Row, samples: Sequence[float], rates: Rates) -> None:
    """The row's columns that come from its time."""
    timing = summarize(samples)
    row.status, row.samples = "measured", len(samples)
    row.time_us, row.p20_us, row.p80_us = (seconds * 1e6 for seconds in timing)
    if row.bytes is not None:
        row.gb_per_s = row.bytes / timing.median / 1e9
        row.copy_share = row.gb_per_s / rates.copy_gb_per_s
    if row.flops is not None:
        row.tflop_per_s = row.flops / timing.median / 1e12
        row.matrix_share = row.tflop_per_s / rates.matrix_tflop_per_s
    shares = (row.copy_share, row.matrix_share)
    row.bound_share = max((share for share in shares if share is not None), default=None)


def compare(rows: Sequence[Row]) -> None:
    """Speed-ups over the peers, among the rows of one case."""
    times = {row.variant: row.time_us for row in rows if row.time_us is not None}
    for column, names in reports.BASELINES.items():
        baseline = next((times[name] for name in names if name in times), None)
        for row in rows:
            if baseline is not None and row.time_us is not None:
                setattr(row, column, baseline / row.time_us)


def drift(rows: Mapping[str, Row], samples: Mapping[str, Sequence[float]]) -> None:
    """How far the first and the second half of the rounds agree on the speed-ups over eager."""
    baseline = next((name for name in reports.BASELINES["vs_eager"] if samples.get(name)), None)
    for name, row in rows.items():
        rounds = len(samples.get(name, ()))
        if row.peer or row.status != "measured" or baseline is None or rounds < 4:
            continue
        halves = slice(rounds // 2), slice(rounds // 2, rounds)
        first, second = (
            summarize(samples[baseline][half]).median / summarize(samples[name][half]).median
            for half in halves
        )
        row.drift = second / first


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
            calls = {}
            for name, row in rows.items():
                if case.network:
                    machine.rest()
                if (timed := prepare(trial, row)) is not None:
                    calls[name] = timed
            if case.network and machine.device.type == "cuda" and case.part != "memory":
                # Preparing a later variant dropped the compiled kernels of the earlier ones.
                for timed in calls.values():
                    timed.run(*timed.setup())
            machine.hide_launches(calls.values())
            if calls and case.part == "memory":
                for row in rows.values():
                    row.status = "measured" if row.status == "pending" else row.status
            elif calls:
                first = next(iter(calls))
                interleave({**calls, AGAIN: calls[first]}, machine, settings, samples, tick)
    except (RuntimeError, ValueError, MemoryError, ImportError) as error:
        # The reference did not fit or is not installed, or a call failed after its checks: the
        # other cases go on.
        missing = isinstance(error, ImportError) or out_of_memory(error)
        for row in rows.values():
            if row.status == "pending":
                row.status = "unavailable" if missing else "failed"
                row.note = first_line(error)
        check_context(error)
    finally:
        for name, row in rows.items():
            if row.status == "pending" and samples.get(name):
                fill(row, samples[name], machine.rates(case.dtype))
        if samples.get(AGAIN) and rows[first].time_us:
            again = summarize(samples[AGAIN]).median * 1e6 / rows[first].time_us
            rows[first].again = again
            if abs(math.log(again)) > reports.TOO_NOISY:
                rows[first].note = f"noisy: {again:.2f}x when timed again"
        compare(list(rows.values()))
        drift(rows, samples)
        report.extend(row for row in rows.values() if row.status != "pending")


def run_cases(
    cases: Sequence[Case],
    machine: Machine,
    settings: Settings,
    start_case: Callable[[int, Case], None] = lambda index, case: None,
    tick: Callable[[], None] = lambda: None,
    save: Callable[[Report], None] = lambda report: None,
    minutes: float = math.inf,
    rows: Sequence[Row] = (),
) -> Report:
    """Measure the cases in turn, after ``rows``; Ctrl-C ends it and keeps what was measured.

    ``save`` gets the report so far after each case. Cases that ``minutes`` leave no time for have
    rows that say so.

    Raises:
        ContextLost: a CUDA error that stays; ``save`` has got what was measured until then.
    """
    report = Report(environment(machine.device), rows=list(rows))
    end = time.monotonic() + 60 * minutes
    try:
        for index, case in enumerate(cases):
            start_case(index, case)
            if time.monotonic() > end:
                note = f"not reached within {minutes:g} minutes"
                for row in (new_row(case, name) for name in case.variants):
                    row.status, row.note = "unavailable", note
                    report.rows.append(row)
                continue
            report.rates[dtype_name(case.dtype)] = machine.rates(case.dtype)
            measure_case(case, machine, settings, report.rows, tick)
            save(report)
    except KeyboardInterrupt:
        report.complete = False
    except ContextLost:
        report.complete = False
        save(report)
        raise
    return report
