"""The plots of the outcomes, as SVG; needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.depth.questions import Question
from benchmarks.depth.trial import Outcome
from benchmarks.output.plots import METADATA


def draw(question: Question, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Loss by epoch and error by network; for some questions the gradient by layer, too."""
    figures = {f"{question.name}-training": _training(outcomes)}
    if question.gradients:
        figures[f"{question.name}-gradients"] = _gradients(outcomes)
    paths = []
    for name, figure in figures.items():
        figure.suptitle(question.title)
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata=METADATA)
        plt.close(figure)
        paths.append(path)
    return paths


def _by_label(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    labels = dict.fromkeys(outcome.label for outcome in outcomes)
    return {label: [o for o in outcomes if o.label == label] for label in labels}


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*rows, strict=True)]


def _training(outcomes: Sequence[Outcome]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    groups = _by_label(outcomes)
    for label, own in groups.items():
        curves = [outcome.train_loss for outcome in own]
        epochs = range(1, len(curves[0]) + 1)
        (line,) = left.plot(epochs, _means(curves), label=label)
        columns = list(zip(*curves, strict=True))
        left.fill_between(
            epochs, list(map(min, columns)), list(map(max, columns)), alpha=0.15,
            color=line.get_color(),
        )  # fmt: skip
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    left.legend(fontsize="x-small")
    for name, marker in (("train_error", "o"), ("test_error", "x")):
        for index, own in enumerate(groups.values()):
            values = [100 * getattr(outcome, name) for outcome in own]
            label = name.replace("_", " ") if index == 0 else None
            color = "C0" if marker == "o" else "C1"
            right.plot([index] * len(values), values, marker, label=label, color=color)
    right.set(ylabel="error, % (a mark per seed)")
    right.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right", fontsize="x-small")
    right.legend(fontsize="x-small")
    return figure


def _gradients(outcomes: Sequence[Outcome]) -> plt.Figure:
    times = list(outcomes[0].gradients)
    figure, panels = plt.subplots(1, len(times), figsize=(11, 4), layout="constrained", sharey=True)
    for axes, time in zip(panels, times, strict=True):
        for label, own in _by_label(outcomes).items():
            norms = _means([outcome.gradients[time] for outcome in own])
            depth = [index / (len(norms) - 1) for index in range(len(norms))]
            shown = [(x, y) for x, y in zip(depth, norms, strict=True) if y > 0]
            axes.plot(*zip(*shown, strict=True), label=label)
        axes.set(title=time, xlabel="layer, from the image (0) on (1)", yscale="log")
    panels[0].set_ylabel("norm of the gradient in the weight")
    panels[0].legend(fontsize="x-small")
    return figure
