"""What the generated tables are made of: groups of rows, the text of a cell, a table."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.harness.report import Row


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """The variants of each network, case and dtype, by name."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        groups[row.op, row.case, row.dtype][row.variant] = row
    return groups


def ms(row: Row | None) -> str:
    if row is None:
        return ""
    if row.time_us is None:
        return "" if row.status == "measured" else row.status
    return f"{row.time_us / 1e3:.1f} ({row.p20_us / 1e3:.1f}-{row.p80_us / 1e3:.1f})"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def errors(row: Row | None) -> str:
    if row is None or row.max_error is None:
        return ""
    return f"{row.max_error:.1e} (eager {row.eager_error:.1e})"


def start(row: Row | None) -> str:
    if row is None or row.first_batch_s is None:
        return "" if row is None else row.status
    return f"{row.first_batch_s:.1f}, {number(row.peak_bytes, 1e6, '{:.0f}')}"


def number(value: float | None, unit: float, form: str) -> str:
    return "" if value is None or math.isnan(value) else form.format(value / unit)


def geomean(values: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f}x" if values else ""


def mean_and_worst(values: Sequence[float]) -> str:
    return f"{geomean(values)} ({min(values):.2f}x)" if values else ""


def mean_and_range(values: Sequence[float]) -> str:
    return f"{geomean(values)} ({min(values):.2f}x to {max(values):.2f}x)" if values else ""


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *lines))
