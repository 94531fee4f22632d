"""``profile``: the measured time of each step of a frozen model's plan."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvkernels.freeze.frozen import Frozen, freeze, plan_of
from cvkernels.freeze.progress import progress
from cvkernels.info import cpu_name
from cvkernels.plots import drawing
from cvkernels.tables import fitted_table, wrapped

HEADER = ("layer", "op", "backend", "kernels", "MB", "ms", "share", "GB/s")
# What a narrow terminal does without, in this order.
OPTIONAL = ("kernels", "GB/s", "backend", "MB", "op")


class StepTime(NamedTuple):
    """One step of the plan: what it is, the bytes that it has to move, and its median time."""

    layer: str
    op: str
    backend: str
    note: str
    kernels: int
    bytes_read: int
    bytes_written: int
    ms: float

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


class Profile:
    """The steps of one input shape in their order; prints as a table.

    Attributes:
        rows: :class:`StepTime`, measured one by one, each of which pays Python and a dispatcher.
        steps_ms: the median of the rounds over all steps; on a busy machine more than the sum of
            the steps' medians.
        whole_ms: the median of whole calls, which repeat on a CPU what was recorded, and on a GPU
            a graph.
    """

    def __init__(
        self, rows: list[StepTime], steps_ms: float, whole_ms: float, conditions: str
    ) -> None:
        self.rows = rows
        self.steps_ms = steps_ms
        self.whole_ms = whole_ms
        self.conditions = conditions

    def as_dict(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "whole_ms": self.whole_ms,
            "steps_ms": self.steps_ms,
            "rows": [row._asdict() for row in self.rows],
        }

    def table(self, columns: int | None = 100) -> str:
        """The table within so many columns; None: as many as it needs."""
        total = sum(row.ms for row in self.rows)
        lines: list[tuple] = [
            (
                r.layer, r.op, r.backend, r.kernels, f"{r.bytes_moved / 1e6:.3f}", f"{r.ms:.3f}",
                f"{r.ms / total:.1%}", f"{r.bytes_moved / r.ms / 1e6:.1f}",
            )
            for r in self.rows
        ]  # fmt: skip
        moved = sum(row.bytes_moved for row in self.rows)
        kernels = sum(row.kernels for row in self.rows)
        lines.append(
            (
                "total", "", "", kernels, f"{moved / 1e6:.3f}", f"{total:.3f}", "100.0%",
                f"{moved / total / 1e6:.1f}",
            )
        )  # fmt: skip
        return (
            f"{fitted_table(HEADER, lines, columns, OPTIONAL)}\n"
            f"one call: {self.whole_ms:.3f} ms; its steps one by one: {self.steps_ms:.3f} ms\n"
            f"{wrapped(self.conditions, columns)}"
        )

    def plot(self, path: str | Path) -> None:
        """Draw a bar for each step, coloured by op, in the order of the plan.

        Raises:
            ImportError: matplotlib is not installed.
        """
        rows = self.rows[::-1]
        height = 1.6 + 0.17 * len(rows)
        with drawing(path, (10, height)) as figure:
            axes = figure.subplots()
            for op in dict.fromkeys(row.op for row in self.rows):
                places = [i for i, row in enumerate(rows) if row.op == op]
                axes.barh(places, [rows[i].ms for i in places], label=op)
            names = [row.layer or row.op for row in rows]
            axes.set_yticks(range(len(rows)), names, fontsize=6)
            axes.set_ylim(-0.7, len(rows) - 0.3)
            axes.set_xlabel("ms")
            axes.set_title(f"{self.conditions}\none call: {self.whole_ms:.2f} ms", fontsize=8)
            axes.legend(fontsize=8)

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__


def profile(model: nn.Module, example: Tensor, *, runs: int = 20) -> Profile:
    """Freeze the model and measure each step of its plan for example's shape.

    Args:
        model: in eval, or frozen already.
        example: Tensor[N, C, H, W] that holds data, as for :func:`cvkernels.freeze`.
        runs: rounds over all steps, in the plan's order, so that each finds the caches as a call
            leaves them. Times are medians.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`cvkernels.freeze` does.
    """
    frozen = model if isinstance(model, Frozen) else freeze(model, example)
    if frozen.dtype != example.dtype:
        example = example.to(frozen.dtype)
    frozen(example)
    plan = plan_of(frozen.plan_for(example))
    times: dict[Any, list[float]] = {}
    whole: list[float] = []
    with torch.no_grad(), progress("profile", runs) as advance:
        for _ in range(runs):
            frozen(example)  # records anew what the steps one by one have dropped
            whole.append(_seconds(lambda: frozen(example), example))
            for step, run in plan.each_step(example):
                times.setdefault(step, []).append(_seconds(run, example))
            advance()
    rows = []
    for step, seconds in times.items():
        note = plan.reason(step).removeprefix("frozen").removeprefix("; ")
        traffic = plan.traffic[step]
        ms = 1e3 * statistics.median(seconds)
        rows.append(StepTime(step.layer, step.op.name, plan.backends[step], note, *traffic, ms))
    rounds = map(sum, zip(*times.values(), strict=True))
    steps_ms, whole_ms = (1e3 * statistics.median(seconds) for seconds in (rounds, whole))
    return Profile(rows, steps_ms, whole_ms, _conditions(frozen, example, runs))


def _conditions(frozen: Frozen, example: Tensor, runs: int) -> str:
    cpu = f"{torch.get_num_threads()} threads of {cpu_name()}"
    where = torch.cuda.get_device_name() if example.is_cuda else cpu
    shape, dtype = list(example.shape), str(frozen.dtype).removeprefix("torch.")
    kind = "int8" if frozen.quantised is not None else dtype
    return f"{kind}, {shape}, {where}, torch {torch.__version__}, medians of {runs} runs"


def _seconds(call: Callable[[], object], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    call()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
