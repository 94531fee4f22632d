"""Curves of one training, and of several beside each other.

    python examples/plots.py curves.svg runs/resnet18-ours runs/resnet18-stock runs/googlenet-ours

draws the accuracy on test images: a panel for each network and a line for each run of it, of
train.py's folders named NETWORK-RUN.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

CURVES = (
    (("train_loss", "val_loss"), "loss"),
    (("train_top1", "val_top1", "val_ema_top1"), "top-1"),
    (("train_images_per_s",), "images a second"),
    (("peak_mb",), "peak memory, MB"),
)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw what the log's rows have, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle(title)
    epochs = [row["epoch"] for row in rows]
    for axes, (names, label) in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        for name in names:
            if all(name in row for row in rows):
                axes.plot(epochs, [row[name] for row in rows], marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.legend()
    figure.savefig(path)


def compare(folders: list[Path], path: Path) -> None:
    """Draw the test accuracy of runs, in a panel for each network."""
    import matplotlib.figure

    networks: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for folder in folders:
        network, _, run = folder.name.rpartition("-")
        lines = (folder / "log.jsonl").read_text().splitlines()
        networks[network][run] = [100 * json.loads(line)["val_top1"] for line in lines]
    figure = matplotlib.figure.Figure(figsize=(3 * len(networks), 3), layout="constrained")
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    styles = ("-", "--", ":", "-.")
    for axes, (network, runs) in zip(panels, networks.items(), strict=True):
        for index, (run, accuracies) in enumerate(runs.items()):
            epochs = range(1, len(accuracies) + 1)
            axes.plot(epochs, accuracies, styles[index % len(styles)], marker=".", label=run)
        axes.set_title(network)
        axes.set_xlabel("epoch")
        axes.legend()
    panels[0].set_ylabel("top-1 of test images, %")
    figure.savefig(path)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    compare([Path(word) for word in sys.argv[2:]], Path(sys.argv[1]))
