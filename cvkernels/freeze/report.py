"""``frozen.report()``: which kernel runs each step, what it moves, and what memory it takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from cvkernels.tables import text_table

if TYPE_CHECKING:
    from cvkernels.freeze.plan import Plan


class Row(NamedTuple):
    """One step of the plan."""

    layer: str
    op: str
    backend: str
    kernels: int
    bytes_read: int
    bytes_written: int
    note: str
    predicted_us: float | None = None
    bound: str = ""


class Report(NamedTuple):
    """The plan of one input shape; prints as a table.

    ``arena_bytes`` is what the values in the arena take together, ``live_bytes`` what they would
    each on its own. Values that a step allocates itself are in neither. ``seconds_to_first_batch``
    is what ``freeze`` and the first call took; NaN before that call.
    """

    rows: list[Row]
    shape: tuple[int, ...]
    arena_bytes: int
    live_bytes: int
    seconds_to_first_batch: float

    @property
    def kernels(self) -> int:
        return sum(row.kernels for row in self.rows)

    @property
    def bytes_moved(self) -> int:
        return sum(row.bytes_read + row.bytes_written for row in self.rows)

    def __str__(self) -> str:
        header = ("layer", "op", "backend", "kernels", "MB read", "MB written", "note")
        lines = [
            (*row[:4], f"{row.bytes_read / 1e6:.3f}", f"{row.bytes_written / 1e6:.3f}", row.note)
            for row in self.rows
        ]
        seconds = self.seconds_to_first_batch
        first = "not called yet" if math.isnan(seconds) else f"first batch after {seconds:.2f} s"
        return (
            f"{text_table(header, lines)}\n"
            f"input {list(self.shape)}: {self.kernels} kernels, {self.bytes_moved / 1e6:.1f} MB "
            f"moved; arena {self.arena_bytes / 1e6:.2f} MB for {self.live_bytes / 1e6:.2f} MB of "
            f"values; {first}"
        )

    __repr__ = __str__


def report(plan: Plan, shape: tuple[int, ...], seconds: float) -> Report:
    memory = plan.memory
    return Report(rows_of(plan), shape, memory.nbytes, memory.live_bytes, seconds)


def rows_of(plan: Plan) -> list[Row]:
    rows = []
    for step, run in plan.steps:
        if run is not None:
            note = plan.reason(step).removeprefix("frozen").removeprefix("; ")
            row = Row(step.layer, step.op.name, plan.backends[step], *plan.traffic[step], note)
            if (prediction := plan.prediction(step)) is not None:
                row = row._replace(predicted_us=prediction.us, bound=prediction.bound)
            rows.append(row)
    if plan.hides_nan:
        x = plan.memory.steps[0].value
        rows.append(Row("", "sum", "aten", 1, x.nbytes, x.dtype.itemsize, ""))
    for number, shared in plan.results:
        if shared and (size := plan.memory.steps[number].nbytes):
            rows.append(Row("", "clone", "aten", 1, size, size, "for the caller"))
    return rows
