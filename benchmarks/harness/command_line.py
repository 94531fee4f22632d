"""What the commands of ``python -m benchmarks`` share: options, progress, the final report."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import run
from benchmarks.harness.case import Case
from benchmarks.harness.environment import default_device, default_dtypes
from benchmarks.harness.machine import QUICK, Machine, Settings
from benchmarks.harness.report import DTYPES, QUANTISED, Report, Row, dtype_name


class Refused(Exception):
    """The command cannot do what was asked; the message is what to tell."""


def add_options(
    parser: argparse.ArgumentParser, rounds: bool = True, quantised: bool = False
) -> None:
    """What every command that measures takes; ``rounds``: how long, too, ``quantised``: its dtypes,
    too."""
    if rounds:
        parser.add_argument("--rounds", type=count, help="of timing per case, at most")
        parser.add_argument("--seconds", type=float, help="of timing per case, about")
    names = [*DTYPES, *(QUANTISED if quantised else ())]
    parser.add_argument("--dtype", action="append", choices=names)
    parser.add_argument("--device", type=device_of, default=default_device())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="in all, about")
    if rounds:
        parser.add_argument(
            "--go-on", action="store_true", help="keep --json's rows, and add to them"
        )
    parser.add_argument("--json", "--json-out", type=Path, metavar="FILE", help="write the result")


def add_network_options(parser: argparse.ArgumentParser, networks: Sequence[str]) -> None:
    parser.add_argument("--network", action="append", choices=networks, help="default: all")
    parser.add_argument("--batch", action="append", type=count, help="repeatable")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def device_of(text: str) -> torch.device:
    if text.split(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text != "cpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no CUDA device here; use cpu")
    return torch.device(text)


def dtypes_of(options: argparse.Namespace) -> list[torch.dtype]:
    known = DTYPES | QUANTISED
    return [known[name] for name in options.dtype or ()] or default_dtypes(options.device)


def chosen(cases: list[Case], patterns: Sequence[str] | None) -> list[Case]:
    """The cases that a pattern names; without patterns all."""
    if not patterns:
        return cases
    names = list(dict.fromkeys(case.name for case in cases))
    wanted = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    if not wanted:
        raise Refused(f"no case is named {patterns}; there are: {', '.join(names)}")
    return [case for case in cases if case.name in wanted]


def settings_of(options: argparse.Namespace, quick: bool) -> Settings:
    settings = QUICK if quick else Settings()
    rounds = options.rounds or settings.rounds
    seconds = settings.seconds if options.seconds is None else options.seconds
    return Settings(rounds, seconds, min(settings.least, rounds))


def measure(cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Measure, print the table and write the JSON, after every case; the command's exit status."""
    path = options.json
    if path is not None:
        check_writable(path)

    def save(report: Report) -> None:
        if path is not None:
            write_report(path, report)

    settings = settings_of(options, getattr(options, "quick", False))
    rows = _rows_before(path) if options.go_on else []
    met = {(row.op, row.case, row.dtype, row.part) for row in rows}
    left = [c for c in cases if (c.op, c.name, dtype_name(c.dtype), c.part) not in met]
    machine = Machine(options.device)
    report = _run_with_progress(left, machine, settings, save, options.minutes, rows)
    save(report)
    print(report)
    return exit_status(report)


def _rows_before(path: Path | None) -> list[Row]:
    found = path is not None and path.exists()
    return Report.from_dict(json.loads(path.read_text())).rows if path and found else []


def exit_status(report: Report) -> int:
    if not report.complete:
        return 130
    return 0 if report.sound else 1


def check_writable(path: Path) -> None:
    """Refuse before measuring what could not be written after it."""
    try:
        with path.open("a"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}") from error


def write_report(path: Path, report: Report) -> None:
    write_json(path, report.as_dict())


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all, so that a killed run leaves what it had before."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _run_with_progress(
    cases: Sequence[Case],
    machine: Machine,
    settings: Settings,
    save: Callable[[Report], None],
    minutes: float,
    rows: list[Row],
) -> Report:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("rates", total=len(cases) * settings.rounds)

        def start_case(index: int, case: Case) -> None:
            name = case.id if not case.network else f"{case.op} {case.part}, {case.name}"
            progress.update(task, completed=index * settings.rounds, description=name)

        def tick() -> None:
            progress.advance(task)

        return run.run_cases(cases, machine, settings, start_case, tick, save, minutes, rows)
