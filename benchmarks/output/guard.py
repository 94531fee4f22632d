"""``python -m benchmarks guard``: have the kernels' speed-ups over eager fallen?

Compared are ratios, not times: a variant's median against eager's in the same rounds, here and in
the committed results of the same machine. A row has regressed if it lost more than
:data:`TOLERANCE`, or more than the two runs' own spread from p20 to p80 explains; an op has if its
rows lost more than :data:`OP_TOLERANCE` in geometric mean. What looks like it is measured again,
and the better of the two counts: noise seldom strikes the same row twice.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import kernels
from benchmarks.harness import command_line
from benchmarks.harness.command_line import Refused, dtypes_of
from benchmarks.harness.environment import default_batch, environment
from benchmarks.harness.machine import Machine
from benchmarks.harness.report import Row
from benchmarks.harness.run import new_row, run_cases
from benchmarks.output import results
from cvkernels.tables import text_table

TOLERANCE = 0.15
OP_TOLERANCE = 0.05
# What has to be equal for two runs to be comparable.
SAME = ("device", "threads")

Key = tuple[str, str, str, str, str, str]


class Change(NamedTuple):
    """A row's speed-up over eager: committed, now, and by what factor it may fall."""

    key: Key
    committed: float
    now: float
    allowed: float

    @property
    def factor(self) -> float:
        return self.now / self.committed

    @property
    def regressed(self) -> bool:
        return self.factor < self.allowed


class Comparison(NamedTuple):
    """All rows that both runs have; prints what changed."""

    changes: list[Change]

    @property
    def rows(self) -> list[Change]:
        return [change for change in self.changes if change.regressed]

    @property
    def ops(self) -> dict[str, float]:
        """Each op's geometric mean of its rows' factors."""
        factors = defaultdict(list)
        for change in self.changes:
            factors[change.key[0]].append(math.log(change.factor))
        return {op: math.exp(statistics.fmean(logs)) for op, logs in factors.items()}

    @property
    def regressed_ops(self) -> list[str]:
        return [op for op, factor in self.ops.items() if factor < 1 - OP_TOLERANCE]

    @property
    def ok(self) -> bool:
        return not self.rows and not self.regressed_ops

    def __str__(self) -> str:
        header = ("op", "part", "case", "shape", "dtype", "variant", "committed", "now", "factor")
        lines = [
            (*c.key, f"{c.committed:.2f}x", f"{c.now:.2f}x", f"{c.factor:.2f}") for c in self.rows
        ]
        parts = [f"regressed rows:\n{text_table(header, lines)}"] if lines else []
        parts += [
            f"{op}: {factor:.2f} of the committed speed-ups (geomean)"
            + (": REGRESSED" if op in self.regressed_ops else "")
            for op, factor in sorted(self.ops.items())
        ]
        return "\n".join([*parts, f"{len(self.changes)} rows compared"])


def key_of(row: Row) -> Key:
    return (row.op, row.part, row.case, row.shape, row.dtype, row.variant)


def compare(committed: Iterable[Row], now: Iterable[Row]) -> Comparison:
    """Our variants' rows that both have, with their speed-ups over eager."""
    before, after = _ours(committed), _ours(now)
    spreads = _spreads(committed), _spreads(now)
    changes = []
    for key in before.keys() & after.keys():
        eager = (*key[:-1], "eager")
        # Standard deviations, about: p20 to p80 spans 1.7 of them in a normal distribution.
        noise = math.hypot(*(spread.get(k, 0.0) for spread in spreads for k in (key, eager))) / 1.7
        allowed = min(1 - TOLERANCE, 1 - 2 * noise)
        changes.append(Change(key, before[key].vs_eager, after[key].vs_eager, allowed))
    return Comparison(sorted(changes))


def _ours(rows: Iterable[Row]) -> dict[Key, Row]:
    return {key_of(row): row for row in rows if not row.peer and row.vs_eager}


def _spreads(rows: Iterable[Row]) -> dict[Key, float]:
    return {key_of(r): (r.p80_us - r.p20_us) / r.time_us for r in rows if r.time_us}


def better(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    """The first run's rows, but the second's where its speed-up over eager is higher."""
    again = _ours(second)

    def chosen(row: Row) -> Row:
        other = again.get(key_of(row), row)
        return other if (other.vs_eager or 0.0) > (row.vs_eager or 0.0) else row

    return list(map(chosen, first))


def guarded(
    committed: Sequence[Row], measure: Callable[[set[Key] | None], list[Row]]
) -> Comparison:
    """Compare, measuring a second time what seems to have regressed.

    ``measure`` takes the keys of the rows to measure, or None for all.
    """
    rows = measure(None)
    comparison = compare(committed, rows)
    if not comparison.ok:
        suspects = {change.key for change in comparison.changes if change.factor < 1}
        comparison = compare(committed, better(rows, measure(suspects)))
    return comparison


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=kernels.ops(), help="default: all")
    parser.add_argument("--against", type=Path, help="a folder; default: this machine's results")
    command_line.add_options(parser)


def main(options: argparse.Namespace) -> int:
    """0 if nothing regressed, 1 if something did."""
    device = options.device
    folder = options.against or results.RESULTS / results.machine_name(device)
    reports = results.reports(folder, "kernels")
    if not reports:
        raise Refused(f"{folder} holds no kernels-*.json; measure with --all, or name --against")
    here = environment(device)
    there = reports[0].environment
    differing = [
        f"{name} {there.get(name)!r} there, {here.get(name)!r} here"
        for name in SAME
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise Refused(f"{folder} is of another machine: {', '.join(differing)}")
    committed = [row for report in reports for row in report.rows]
    machine = Machine(device)
    settings = command_line.settings_of(options, quick=True)
    cases = kernels.cases(
        device, dtypes_of(options), default_batch(device), options.op, quick=True, compiled="none"
    )

    def measure(keys: set[Key] | None) -> list[Row]:
        wanted = {key[:-1] for key in keys or ()}
        chosen = [c for c in cases if keys is None or key_of(new_row(c, ""))[:-1] in wanted]
        print(f"{len(chosen)} cases", file=sys.stderr)
        return run_cases(chosen, machine, settings).rows

    comparison = guarded(committed, measure)
    print(comparison)
    return 0 if comparison.ok else 1
