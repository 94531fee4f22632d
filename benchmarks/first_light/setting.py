"""What the steps measure on: a GPU; in a rehearsal tiny shapes on the CPU, and a made-up clock."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.case import image
from benchmarks.harness.machine import Machine, Settings, Timed, interleave
from benchmarks.harness.report import Rates, summarize
from cvkernels.demo import NETWORKS, stock_and_ours


class Rehearsed(Machine):
    """A CPU that keeps nothing cold, by a clock that goes on by a tenth of a millisecond a look."""

    def __init__(self) -> None:
        looks = itertools.count()
        self.device = torch.device("cpu")
        self.clock = self.host_clock = lambda: next(looks) * 1e-4
        self.cache_bytes = 0

    def make_cold(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def rates(self, dtype: torch.dtype) -> Rates:
        return Rates(4000.0, 700.0)


@dataclass(frozen=True)
class Setting:
    """``batch`` is the large one, which the GPU's memory may have made smaller."""

    rehearsal: bool = False
    batch: int = 128
    predicted: str = ""  # the file of the time model

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.rehearsal else torch.bfloat16

    @property
    def dtypes(self) -> list[torch.dtype]:
        if self.rehearsal:
            return [torch.float32]
        return [torch.bfloat16, torch.float16, torch.float32]

    @property
    def size(self) -> int:
        return 64 if self.rehearsal else 224

    @property
    def batches(self) -> tuple[int, ...]:
        return (self.batch, 1)

    @property
    def networks(self) -> tuple[str, ...]:
        return tuple(NETWORKS)

    @property
    def repeats(self) -> int:
        """Of a kernel whose bits must stay the same."""
        return 3 if self.rehearsal else 200

    def settings(self, rounds: int, seconds: float) -> Settings:
        least = min(rounds, 3)
        return Settings(2, 0.0, 2) if self.rehearsal else Settings(rounds, seconds, least)

    def machine(self) -> Machine:
        return Rehearsed() if self.rehearsal else Machine(self.device)

    def images(self, batch: int) -> Tensor:
        torch.manual_seed(1)
        return image(batch, 3, self.size, self.size, dtype=self.dtype, device=self.device)

    def models(self, name: str) -> tuple[nn.Module, nn.Module]:
        """(stock, ours) with the same weights, and statistics of random images."""
        return _models(self, name)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def graphed(self, function: Callable, example: Tensor) -> Callable:
        """In a CUDA graph; the function itself where there is none."""
        if self.rehearsal:
            return function
        from benchmarks.harness import peers

        return peers.graphed(function, example)


@functools.cache
def _models(setting: Setting, name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(2)
    stock, ours = stock_and_ours(name, None, torch.randn(8, 3, setting.size, setting.size))
    to = {"device": setting.device, "dtype": setting.dtype, "memory_format": torch.channels_last}
    return stock.to(**to), ours.to(**to)


@contextlib.contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Whether cuDNN measures its algorithms, or takes the first that its heuristic names."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def timed(
    machine: Machine, settings: Settings, calls: dict[str, Timed]
) -> dict[str, dict[str, Any]]:
    """Microseconds of each call, interleaved."""
    machine.hide_launches(calls.values())
    with torch.no_grad():
        samples = interleave(calls, machine, settings)
    return {name: microseconds(times) for name, times in samples.items()}


def microseconds(samples: list[float]) -> dict[str, Any]:
    median, p20, p80 = (1e6 * seconds for seconds in summarize(samples))
    return {"us": median, "p20_us": p20, "p80_us": p80, "samples": len(samples)}
