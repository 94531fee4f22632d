"""The device under measurement: its clock, its cold caches, its copy bandwidth and matrix rate."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.environment import last_level_cache
from benchmarks.harness.report import Rates, summarize


@dataclass(frozen=True)
class Settings:
    """How long a case is measured: ``rounds``, fewer after ``seconds``, ``least`` in any case."""

    rounds: int = 100
    seconds: float = 3.0
    least: int = 8


QUICK = Settings(rounds=20, seconds=0.8, least=5)
# Seconds before a CPU's latency is taken: another runtime's threads wait for work by spinning after
# a call, and made what came next up to twice as slow.
REST = 0.05


@dataclass(frozen=True)
class Timed:
    """``run(*setup())`` with only ``run`` timed; a sample is the mean of ``repeats`` runs.

    host: what counts is the time until ``run`` returns, with warm caches and an idle device.
    latency: what counts is the time until the device has finished, launches included.
    """

    run: Callable[..., object]
    setup: Callable[[], tuple] = tuple
    repeats: int = 1
    host: bool = False
    latency: bool = False


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
        self.host_clock = clock or time.perf_counter
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
        hidden = [Timed(call.run, call.setup, host=True) for call in calls if not call.latency]
        launch = max(map(self.sample, hidden), default=0.0)
        self._evictions = 1 + math.ceil(launch / eviction)

    def sample(self, timed: Timed) -> float:
        """Seconds of one run, in cold caches; of the host's part of one in warm ones."""
        arguments = timed.setup()
        if timed.latency:
            self.rest()
        if not timed.host:
            self.make_cold()
        clock = self.clock
        if timed.host or timed.latency:
            self.synchronize()
            clock = self.host_clock
        start = clock()
        for _ in range(timed.repeats):
            timed.run(*arguments)
        if timed.latency:
            self.synchronize()
        stop = clock()
        return (stop - start) / timed.repeats

    def rest(self) -> None:
        """Let threads that spin after earlier calls fall asleep."""
        if self.device.type == "cpu":
            time.sleep(REST)

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
        if dtype == torch.int8:
            calls["matrix"] = Timed(lambda: torch._int_mm(a, b))
        with _precision_of_convolutions():
            samples = interleave(calls, self, Settings(rounds=15, seconds=2.0, least=5))
        copy, matrix = (summarize(samples[name]).median for name in ("copy", "matrix"))
        return Rates(2 * source.nbytes / copy / 1e9, 2 * side**3 / matrix / 1e12)


@contextlib.contextmanager
def _precision_of_convolutions() -> Iterator[None]:
    """Matrix products in TF32 where convolutions may be: the rate that these are held to."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = products.fp32_precision
    products.fp32_precision = convolutions.fp32_precision
    try:
        yield
    finally:
        products.fp32_precision = before


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
