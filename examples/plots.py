"""Curves of one or several trainings."""

from __future__ import annotations

import importlib.util
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
