"""``python -m benchmarks depth``: train, and write the page with its tables and plots."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import Progress

from benchmarks.depth.questions import HEADER, QUESTIONS, Question, table
from benchmarks.depth.trial import Outcome, Trial, run
from benchmarks.harness.command_line import count
from benchmarks.harness.environment import environment
from benchmarks.output.results import RESULTS
from cvkernels.tables import text_table

FOLDER = RESULTS / "depth"
FILE = "outcomes.json"
# What people wrote of the figures stands above the first of these in the page, and stays.
BEGIN = "<!-- tables -->"


def add_options(parser: argparse.ArgumentParser) -> None:
    names = [question.name for question in QUESTIONS]
    parser.add_argument("--question", action="append", choices=names, help="default: all")
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--epochs", type=count, help="default: as each network is set")
    parser.add_argument("--processes", type=count, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--page", action="store_true", help="only write the page again")


def main(options: argparse.Namespace) -> int:
    folder = options.results
    folder.mkdir(parents=True, exist_ok=True)
    if not options.page:
        chosen = [q for q in QUESTIONS if q.name in (options.question or q.name)]
        trials = [t for q in chosen for t in q.with_seeds(range(options.seeds), options.epochs)]
        start = time.monotonic()
        outcomes = list(_outcomes(trials, options.processes))
        for question in chosen:
            own = [outcome for outcome in outcomes if outcome.question == question.name]
            print(f"\n({question.name}) {question.title}\n{text_table(HEADER, table(own))}")
        seconds = time.monotonic() - start
        print(f"\n{len(trials)} trainings in {seconds / 60:.1f} minutes")
        _save(folder / FILE, outcomes)
    print(write_page(folder))
    return 0


def _outcomes(trials: Sequence[Trial], processes: int) -> Iterator[Outcome]:
    """Of all trials, each in one thread of a process of its own; the longest begin first."""
    order = sorted(range(len(trials)), key=lambda i: -_cost(trials[i]))
    context = multiprocessing.get_context("spawn")
    found: dict[int, Outcome] = {}
    with Progress(transient=True) as bar, context.Pool(processes, _one_thread) as pool:
        task = bar.add_task("training", total=len(trials))
        pairs = [(index, trials[index]) for index in order]
        for index, outcome in pool.imap_unordered(_indexed, pairs):
            found[index] = outcome
            bar.update(task, advance=1, description=f"({outcome.question}) {outcome.label}")
    yield from (found[index] for index in range(len(trials)))


def _cost(trial: Trial) -> int:
    return trial.options.get("blocks", 20) * trial.size * trial.epochs


def _one_thread() -> None:
    torch.set_num_threads(1)


def _indexed(pair: tuple[int, Trial]) -> tuple[int, Outcome]:
    index, trial = pair
    return index, run(trial)


def _save(path: Path, outcomes: Sequence[Outcome]) -> None:
    """With those of questions that were not asked this time."""
    asked = {outcome.question for outcome in outcomes}
    kept = [] if not path.is_file() else json.loads(path.read_text())["outcomes"]
    rows = [row for row in kept if row["question"] not in asked]
    rows += [outcome.as_dict() for outcome in outcomes]
    rows.sort(key=lambda row: row["question"])
    content = {"environment": environment(torch.device("cpu")), "outcomes": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_page(folder: Path) -> Path:
    """Tables and plots of the outcomes, below what the page says above them."""
    from benchmarks.depth import figures

    content = json.loads((folder / FILE).read_text())
    outcomes = [Outcome(**row) for row in content["outcomes"]]
    page = folder / "README.md"
    above = page.read_text().partition(BEGIN)[0] if page.is_file() else "# Depth\n\n"
    parts = [BEGIN]
    for question in QUESTIONS:
        own = [outcome for outcome in outcomes if outcome.question == question.name]
        if own:
            plots = figures.draw(question, own, folder)
            parts.append(_section(question, own, plots))
    where = ", ".join(f"{key} {value}" for key, value in content["environment"].items())
    epochs = sorted({outcome.epochs for outcome in outcomes})
    seeds = len({outcome.seed for outcome in outcomes})
    parts.append(
        f"{len(outcomes)} trainings of {' or '.join(map(str, epochs))} epochs, {seeds} seeds each "
        f"(mean, and least to largest), in {sum(o.seconds for o in outcomes) / 60:.0f} minutes of "
        f"one thread in all. {where}."
    )
    page.write_text(above + "\n\n".join(parts) + "\n")
    return page


def _section(question: Question, outcomes: Sequence[Outcome], plots: Sequence[Path]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, *table(outcomes))]
    lines.insert(1, "| " + " | ".join("---" for _ in HEADER) + " |")
    images = "\n".join(f"![{path.stem}]({path.name})" for path in plots)
    title = f"## ({question.name}) {question.title}"
    return "\n\n".join((title, question.text, "\n".join(lines), images))
