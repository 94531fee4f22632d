"""What the benchmarks' command lines share: options, progress, and the report they end with.

``python -m benchmarks.bench_<op>`` measures one op; ``benchmarks/__main__.py`` has the rest.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.environment import default_batch, default_device, default_dtypes
from benchmarks.harness import Case, Machine
from benchmarks.machine import QUICK, Settings
from benchmarks.report import DTYPES, Report


class Refused(Exception):
    """The command cannot do what was asked; the message is what to tell."""


def main(op: str, make_cases: Callable[..., list[Case]], arguments: list[str] | None = None) -> int:
    """The command line of one op's benchmark; 1 if a variant is wrong, 130 after Ctrl-C.

    ``make_cases(device, dtypes, batch, quick)`` makes its cases.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{op}")
    add_case_options(parser)
    add_options(parser)
    options = parser.parse_args(arguments)
    dtypes, batch = dtypes_of(options), options.batch or default_batch(options.device)
    try:
        cases = chosen(make_cases(options.device, dtypes, batch, options.quick), options.case)
        return measure(cases, options)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_case_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", help="a case's name, or a pattern: 'layer4*'")
    parser.add_argument("--batch", type=count, help="images; default: 16 on CPU, 128 on a GPU")
    parser.add_argument("--quick", action="store_true", help="fewer cases and fewer rounds")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--device", type=device_of, default=default_device())
    parser.add_argument("--rounds", type=count, help="of timing per case, at most")
    parser.add_argument("--seconds", type=float, help="of timing per case, about")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="in all, about")
    parser.add_argument("--json", "--json-out", type=Path, metavar="FILE", help="write the rows")


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
    return [DTYPES[name] for name in options.dtype or ()] or default_dtypes(options.device)


def chosen(cases: list[Case], patterns: Sequence[str] | None) -> list[Case]:
    """The cases that a pattern names; without patterns all."""
    if not patterns:
        return cases
    names = list(dict.fromkeys(case.name for case in cases))
    wanted = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    if not wanted:
        raise Refused(f"no case is named {patterns}; there are: {', '.join(names)}")
    return [case for case in cases if case.name in wanted]


def settings_of(options: argparse.Namespace) -> Settings:
    settings = QUICK if getattr(options, "quick", False) else Settings()
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

    settings = settings_of(options)
    report = _run_with_progress(cases, Machine(options.device), settings, save, options.minutes)
    save(report)
    print(report)
    return exit_status(report)


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

        return harness.run(cases, machine, settings, start_case, tick, save, minutes)
