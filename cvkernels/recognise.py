"""Photographs recognised by one trained network, stock and ours in each precision, side by side."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvkernels.classify import likeliest
from cvkernels.freeze.frozen import freeze
from cvkernels.images import read
from cvkernels.patch import patch
from cvkernels.photographs import photographs, shifted
from cvkernels.plots import drawing
from cvkernels.tables import fitted_table, shortened, wrapped
from cvkernels.trained import PACKAGED, class_names, trained

# Images that int8 is calibrated on, and decibels that its logits keep on them: few, since holding
# more takes longer than all the rest.
CALIBRATION, TOLERANCE = 64, 20.0
RUNS = 9


class Answer(NamedTuple):
    """The likeliest class by one variant of the network, and its probability."""

    name: str
    probability: float


class Recognised(NamedTuple):
    """A photograph and the answers of the variants, in their order."""

    image: str
    answers: list[Answer]


class Recognition:
    """Photographs and what each variant takes them for; prints as a table.

    Attributes:
        variants: "stock", "patched", and the frozen ones by their precision.
        rows: a :class:`Recognised` for each photograph.
        ms: of each variant the median time of a call on all photographs.
    """

    def __init__(
        self, variants: list[str], rows: list[Recognised], ms: list[float], conditions: str
    ) -> None:
        self.variants = variants
        self.rows = rows
        self.ms = ms
        self.conditions = conditions

    def as_dict(self) -> dict[str, Any]:
        photographs = [
            {
                "image": row.image,
                "answers": {
                    variant: {"class": answer.name, "probability": answer.probability}
                    for variant, answer in zip(self.variants, row.answers, strict=True)
                },
            }
            for row in self.rows
        ]
        ms = dict(zip(self.variants, self.ms, strict=True))
        return {"conditions": self.conditions, "ms": ms, "photographs": photographs}

    def table(self, columns: int | None = 100) -> str:
        """A class by another name than stock's stands beside its probability."""
        header = ("photograph", "class", *self.variants)
        lines = []
        for row in self.rows:
            first = row.answers[0]
            cells = [
                f"{a.probability:.1%}" + ("" if a.name == first.name else f" {a.name}")
                for a in row.answers
            ]
            lines.append((Path(row.image).name, first.name, *cells))
        same = [
            sum(row.answers[i].name == row.answers[0].name for row in self.rows)
            for i in range(len(self.variants))
        ]
        count = len(self.rows)
        lines.append(("same class", "", *(f"{n}/{count}" for n in same)))
        lines.append((f"ms for {count}", "", *(f"{ms:.1f}" for ms in self.ms)))
        lines.append(("stock/this", "", *(f"{self.ms[0] / ms:.2f}x" for ms in self.ms)))
        return f"{fitted_table(header, lines, columns)}\n{wrapped(self.conditions, columns)}"

    __str__ = table

    def plot(self, path: str | Path) -> None:
        """Draw the photographs with each variant's probability, and the times.

        Raises:
            ImportError: matplotlib is not installed.
        """
        across = min(4, len(self.rows))
        down = -(-len(self.rows) // across)
        colours = [f"C{i}" for i in range(len(self.variants))]
        with drawing(path, (2.6 * max(across, 3), 3.1 * down + 1.8)) as figure:
            top, below = figure.subfigures(
                2, 1, squeeze=False, height_ratios=(3.1 * down, 1.8)
            ).flat
            grid = top.subplots(2 * down, across, squeeze=False, height_ratios=(2.4, 1) * down)
            for axes in grid.flat:
                axes.axis("off")
            for number, row in enumerate(self.rows):
                y, x = divmod(number, across)
                picture = read(row.image, 256)
                picture.thumbnail((400, 400))
                grid[2 * y, x].imshow(picture)
                name, probability = row.answers[0]
                title = f"{shortened(name, 24)} {probability:.0%}"
                grid[2 * y, x].set_title(title, fontsize=8)
                _bars(grid[2 * y + 1, x], row, colours)
            for axes in grid[1::2, 0]:
                axes.set_ylabel("probability", fontsize=6)
            axes = below.subplots()
            axes.barh(self.variants[::-1], self.ms[::-1], color=colours[::-1])
            axes.set_xlabel(f"ms for {len(self.rows)} photographs", fontsize=8)
            axes.tick_params(labelsize=8)


def _bars(axes: Any, row: Recognised, colours: Sequence[str]) -> None:
    axes.axis("on")
    values = [answer.probability for answer in row.answers]
    axes.bar(range(len(values)), values, color=colours)
    axes.set_xticks([])
    axes.set_ylim(0, 1)
    axes.tick_params(labelsize=6)


def recognise(paths: Sequence[str | Path] = (), *, device: str = "cpu") -> Recognition:
    """Classify photographs by EfficientNet-Lite0 as trained on ImageNet, in every way it can run.

    Args:
        paths: image files; none means the photographs of scikit-image and scikit-learn.
        device: "cpu" or "cuda"; int8 is for CPUs.

    Raises:
        ImportError: the weights or the photographs are in a package that is not installed; the
            message has the command that installs it.
        UnreadableImage: a file is no image.
    """
    network = trained(PACKAGED)
    files = list(paths) or photographs()
    images = torch.stack([network.preparation.of_file(Path(file)) for file in files]).to(device)
    variants = _variants(network.model.to(device), images)
    logits = {}
    with torch.no_grad():
        for name, call in variants.items():
            logits[name] = call().float().cpu()
    classes = class_names(logits["stock"].shape[1])
    names = [str(file) for file in files]
    answers = {
        name: [Answer(*row.predictions[0]) for row in likeliest(names, values, classes, 1)]
        for name, values in logits.items()
    }
    rows = [
        Recognised(image, [answers[name][i] for name in variants]) for i, image in enumerate(names)
    ]
    ms = _times(variants, images)
    conditions = f"{network.about}; stock in channels_last, medians of {RUNS} interleaved runs"
    if "int8" in variants:
        conditions += (
            f"; int8 is calibrated on {CALIBRATION} images, the photographs shifted, and keeps "
            f"{TOLERANCE:.0f} dB on them"
        )
    return Recognition(list(variants), rows, ms, conditions)


def _variants(stock: nn.Module, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    patched = copy.deepcopy(stock)
    patch(patched)
    frozen = {
        "fp32": freeze(stock, images),
        "bf16": freeze(stock, images, dtype=torch.bfloat16),
    }
    if images.device.type == "cpu":
        frozen["int8"] = freeze(
            stock, images, dtype=torch.int8, calibration=shifted(images, CALIBRATION),
            tolerance=TOLERANCE,
        )  # fmt: skip
    channels_last = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    nhwc = images.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Tensor]] = {
        "stock": lambda: channels_last(nhwc),
        "patched": lambda: patched(images),
    }
    for name, model in frozen.items():
        calls[name] = functools.partial(model, images)
    return calls


@torch.no_grad()
def _times(calls: dict[str, Callable[[], Tensor]], images: Tensor) -> list[float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(RUNS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times[name]) for name in calls]
