"""The command line that every ``python -m benchmarks.bench_<op>`` has."""

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
from benchmarks.harness import Case, Machine, Settings
from benchmarks.report import DTYPES, Report


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
    settings = harness.QUICK if options.quick else Settings()
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

        return harness.run(cases, machine, settings, start_case, lambda: progress.advance(task))


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
