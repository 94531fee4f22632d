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

import argparse
import contextlib
import fnmatch
import functools
import importlib.metadata
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numerics import assert_close_as_eager, gradients, map_floats, max_error, tensors_in
from torch import Tensor

from cvkernels import record
from cvkernels.backend import BackendError
from cvkernels.tables import text_table

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What computes the peers; a variant of ours tells by itself.
PEERS = {"eager": "aten", "compile": "inductor"}
AGAIN = "again"
WARM_UP = 3
# A call of an op takes microseconds: a host sample is the mean of this many.
HOST_CALLS = 50
TOO_NOISY = 0.05


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


@dataclass
class Row:
    """One variant of one case. Times are per call; a share is a fraction of the measured rate.

    status: "measured"; "unavailable", where a peer or backend cannot run; "wrong" or "failed",
        which are bugs. ``note`` says why. "pending" until then: a report holds no such row.
    again: time of the variant's second measurement in the same rounds over that of the first.
    """

    op: str
    part: str
    case: str
    shape: str
    dtype: str
    variant: str
    backend: str = ""
    status: str = "pending"
    time_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    bytes: int | None = None
    flops: int | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    tflop_per_s: float | None = None
    matrix_share: float | None = None
    bound_share: float | None = None
    vs_eager: float | None = None
    vs_compile: float | None = None
    max_error: float | None = None
    again: float | None = None
    note: str = ""

    @property
    def peer(self) -> str | None:
        """What computes it, if it is not ours."""
        return PEERS.get(self.variant.split()[0])


class Rates(NamedTuple):
    """What the device does at its best in one dtype, measured in the same run."""

    copy_gb_per_s: float
    matrix_tflop_per_s: float


class Timing(NamedTuple):
    median: float
    p20: float
    p80: float


def summarize(samples: Sequence[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0])
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), p20, p80)


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


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache that every access to memory goes through; 32 MB where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=2**25)


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


class Noise(NamedTuple):
    """By how much a variant's two medians differ, as a fraction, over the cases.

    spread: p80 - p20 over the median, of the median row.
    """

    cases: int
    median: float
    p80: float
    worst: float
    spread: float

    @property
    def too_noisy(self) -> bool:
        return self.p80 > TOO_NOISY

    def __str__(self) -> str:
        verdict = "quiet enough"
        if self.too_noisy:
            verdict = f"THE MACHINE IS TOO NOISY: over {TOO_NOISY:.0%} in a fifth of the cases"
        return (
            f"A/A over {self.cases} cases: one variant timed twice differs by {self.median:.1%} in "
            f"the median, {self.p80:.1%} at p80, {self.worst:.1%} at worst; p20 to p80 of a row "
            f"spans {self.spread:.1%}: {verdict}"
        )


@dataclass
class Report:
    """What one run measured, and where; prints as a table."""

    environment: dict[str, Any]
    rates: dict[str, Rates] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    complete: bool = True

    @property
    def noise(self) -> Noise | None:
        differences = [abs(math.log(row.again)) for row in self.rows if row.again]
        if not differences:
            return None
        timed = [row for row in self.rows if row.time_us]
        spread = statistics.median((row.p80_us - row.p20_us) / row.time_us for row in timed)
        median, _, p80 = summarize(differences)
        return Noise(len(differences), median, p80, max(differences), spread)

    @property
    def sound(self) -> bool:
        """Whether no variant of ours was wrong or failed."""
        return not any(row.status in ("wrong", "failed") for row in self.rows if not row.peer)

    def as_dict(self) -> dict[str, Any]:
        noise = self.noise
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "environment": self.environment,
            "rates": {name: rates._asdict() for name, rates in self.rates.items()},
            "noise": noise and {**noise._asdict(), "too_noisy": noise.too_noisy},
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [" | ".join(f"{key} {value}" for key, value in self.environment.items())]
        lines += [
            f"{name}: copy {copy:.1f} GB/s, matrix {matrix:.3g} TFLOP/s"
            for name, (copy, matrix) in self.rates.items()
        ]
        lines += [_table(self.rows)] if self.rows else ["nothing was measured"]
        lines += [] if self.noise is None else [str(self.noise)]
        lines += [] if self.complete else ["interrupted: this is what was measured"]
        return "\n".join(lines)


# title, field, how the field prints
COLUMNS = (
    ("us", "time_us", "{:.1f}"),
    ("p20", "p20_us", "{:.1f}"),
    ("p80", "p80_us", "{:.1f}"),
    ("GB/s", "gb_per_s", "{:.1f}"),
    ("% copy", "copy_share", "{:.0%}"),
    ("TFLOP/s", "tflop_per_s", "{:.3f}"),
    ("% matrix", "matrix_share", "{:.0%}"),
    ("% bound", "bound_share", "{:.0%}"),
    ("vs eager", "vs_eager", "{:.2f}x"),
    ("vs compile", "vs_compile", "{:.2f}x"),
    ("max error", "max_error", "{:.1e}"),
)


def _table(rows: Sequence[Row]) -> str:
    used = [c for c in COLUMNS if any(getattr(row, c[1]) is not None for row in rows)]
    titles = [title.rjust(8) for title, _, _ in used]
    header = ["op", "case", "shape", "dtype", "variant", "backend", *titles, "note"]
    lines = []
    for row in rows:
        op = row.op if row.part == "forward" else f"{row.op} {row.part}"
        note = row.note if row.status == "measured" else f"{row.status}: {row.note}"
        cells = [_cell(getattr(row, name), form) for _, name, form in used]
        lines.append([op, row.case, row.shape, row.dtype, row.variant, row.backend, *cells, note])
    return text_table(header, lines)


def _cell(value: float | None, form: str) -> str:
    # Padded here: text_table puts a column with an empty cell to the left.
    return ("" if value is None else form.format(value)).rjust(8)


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype)[6:])


def environment(device: torch.device) -> dict[str, Any]:
    """The conditions that a time is worth nothing without."""
    where = {"device": _cpu_name()}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        where = {"device": name, "driver": _driver(), "cpu": _cpu_name()}
    return {
        **where,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"),
        "python": platform.python_version(),
        "cache": f"{last_level_cache(device) / 2**20:.0f} MB, cold",
    }


@functools.cache
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.split("\n")[0]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


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


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float32] if device.type == "cpu" else [torch.bfloat16, torch.float16]


def default_batch(device: torch.device) -> int:
    return 16 if device.type == "cpu" else 128


def compiled(function: Callable) -> Callable:
    """torch.compile's variant of a peer, static in its shapes as the others are."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def main(op: str, make_cases: Callable[..., list[Case]], arguments: list[str] | None = None) -> int:
    """The command line of one op's benchmark; 1 if a variant is wrong, 130 after Ctrl-C.

    ``make_cases(device, dtypes, batch, quick)`` makes its cases.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{op}")
    parser.add_argument("--case", action="append", help="a case's name, or a pattern: 'layer4*'")
    parser.add_argument("--batch", type=_count, help="images; default: 16 on CPU, 128 on a GPU")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--device", type=_device, default=default_device())
    parser.add_argument("--quick", action="store_true", help="fewer cases and fewer rounds")
    parser.add_argument("--seconds", type=float, help="of timing per case, at most")
    parser.add_argument("--json", "--json-out", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args(arguments)
    dtypes = [DTYPES[name] for name in options.dtype or ()] or default_dtypes(options.device)
    batch = options.batch or default_batch(options.device)
    cases = make_cases(options.device, dtypes, batch, options.quick)
    if options.case:
        names = list(dict.fromkeys(case.name for case in cases))
        chosen = {name for part in options.case for name in fnmatch.filter(names, part)}
        if not chosen:
            parser.error(f"no case is named {options.case}; there are: {', '.join(names)}")
        cases = [case for case in cases if case.name in chosen]
    settings = QUICK if options.quick else Settings()
    if options.seconds is not None:
        settings = Settings(settings.rounds, options.seconds, settings.least)
    report = _run_with_progress(cases, Machine(options.device), settings)
    print(report)
    return _finish(report, options.json)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def _device(text: str) -> torch.device:
    if text.split(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text != "cpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no CUDA device here; use cpu")
    return torch.device(text)


def _run_with_progress(cases: Sequence[Case], machine: Machine, settings: Settings) -> Report:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("rates", total=len(cases) * settings.rounds)

        def start_case(index: int, case: Case) -> None:
            progress.update(task, completed=index * settings.rounds, description=case.id)

        return run(cases, machine, settings, start_case, lambda: progress.advance(task))


def _finish(report: Report, path: Path | None) -> int:
    """Write the report where asked; the command's exit status."""
    if path is not None:
        try:
            path.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
        except OSError as error:
            print(f"error: cannot write {path}: {error.strerror}", file=sys.stderr)
            return 2
    if not report.complete:
        return 130
    return 0 if report.sound else 1
