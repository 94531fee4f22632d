"""The plots of one machine's results, as SVG beside them; needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness.report import Rates, Row
from benchmarks.output import results, summary

# The same output for the same input: no dates and random ids in a committed file.
matplotlib.rcParams["svg.hashsalt"] = "cvkernels"
METADATA = {"Date": None}
DEPTH = {"densenet121": 121, "densenet169": 169, "densenet201": 201}


def draw(folder: Path) -> list[Path]:
    """Every plot that the folder has rows for."""
    figures = {
        f"roofline-{kind}-{dtype}": roofline(rows, rates, f"{kind}, {dtype}")
        for kind, dtype, rates, rows in _kernels(folder)
    }
    inference = [row for row in results.rows(folder, "models") if row.time_us]
    training = results.rows(folder, "training")
    if inference:
        figures["networks"] = network_bars(inference)
        figures["first-batch"] = first_batch(inference)
        figures[Path(summary.FIGURE).stem] = precisions(summary.rows_of(folder))
    if any(row.op in DEPTH and row.saved_bytes for row in training):
        figures["densenet-memory"] = depth_memory(training)
    return [_save(figure, folder, name) for name, figure in figures.items()]


def _kernels(folder: Path) -> list[tuple[str, str, Rates, list[Row]]]:
    """(op, dtype, rates, rows) of each roofline: rows with a time, bytes and flops or bytes."""
    found = []
    for report in results.reports(folder, "kernels"):
        groups = defaultdict(list)
        for row in report.rows:
            if row.time_us and row.bytes and row.part == "forward":
                groups[row.op, row.dtype].append(row)
        found += [(op, dtype, report.rates[dtype], rows) for (op, dtype), rows in groups.items()]
    return found


def roofline(rows: Sequence[Row], rates: Rates, title: str) -> plt.Figure:
    """A point per row: what it reaches over its arithmetic intensity, under the measured rates.

    An op without a flop count has no intensity; its points are GB/s over its bytes, under the copy
    bandwidth.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    counted = all(row.flops for row in rows)

    def x_of(row: Row) -> float:
        return row.flops / row.bytes if counted else row.bytes / 1e6

    xs = sorted(map(x_of, rows))
    span = [xs[0] / 2, xs[-1] * 2]
    if counted:
        ridge = rates.matrix_tflop_per_s * 1e3 / rates.copy_gb_per_s
        line = sorted({*span, min(max(ridge, span[0]), span[1])})
        reach = [min(x * rates.copy_gb_per_s / 1e3, rates.matrix_tflop_per_s) for x in line]
        axes.set(xlabel="flop per compulsory byte", ylabel="TFLOP/s")
    else:
        line, reach = span, [rates.copy_gb_per_s] * 2
        axes.set(xlabel="compulsory MB", ylabel="GB/s")
    label = f"measured copy bandwidth{' and matrix rate' if counted else ''}"
    axes.loglog(line, reach, "k-", label=label)
    for variant in dict.fromkeys(row.variant for row in rows):
        chosen = [row for row in rows if row.variant == variant]
        ys = [row.tflop_per_s if counted else row.gb_per_s for row in chosen]
        marker = "o" if variant.startswith("cvkernels") else "x"
        axes.loglog([x_of(row) for row in chosen], ys, marker, label=variant)
    axes.set_title(title)
    axes.legend(fontsize="small")
    return figure


def network_bars(rows: Sequence[Row]) -> plt.Figure:
    """Images per second of every variant; an axes per dtype and batch, a group per network."""
    panels = list(dict.fromkeys((row.dtype, row.case) for row in rows))
    figure, grid = plt.subplots(
        len(panels), figsize=(10, 3.5 * len(panels)), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        chosen = [row for row in rows if (row.dtype, row.case) == panel]
        _bars(axes, rows, chosen, lambda row: _images(row) / row.time_us * 1e6)
        axes.set(title=f"{panel[1]}, {panel[0]}", ylabel="images per second")
    grid[0, 0].legend(fontsize="small", ncols=2)
    return figure


# How README.md's plot marks a variant; those of ours are filled.
MARKS = {
    "cvkernels, frozen": dict(marker="o", markersize=8, color="C3"),
    "cvkernels, int8 guarded at 30 dB": dict(marker="v", markersize=7, color="C3", alpha=0.5),
    "cvkernels, imported": dict(marker="o", markersize=4, color="C3", alpha=0.5),
    "ONNX Runtime": dict(marker="s", markersize=6, color="C0", fillstyle="none"),
    "OpenVINO": dict(marker="D", markersize=6, color="C2", fillstyle="none"),
    "torch.compile with freezing": dict(marker="^", markersize=6, color="C1", fillstyle="none"),
    "PyTorch": dict(marker="x", markersize=6, color="k"),
}


def precisions(rows: Sequence[Row]) -> plt.Figure:
    """Images per second at the largest batch: a group per network, a column per precision."""
    batch = max(map(summary.images_of, rows))
    rows = [row for row in rows if summary.images_of(row) == batch]
    networks = list(dict.fromkeys(row.op for row in rows))
    kinds = [kind for kind in summary.PRECISIONS if any(row.dtype == kind for row in rows)]
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = len(kinds) + 1

    def place_of(row: Row) -> int:
        return networks.index(row.op) * width + kinds.index(row.dtype)

    for label, style in MARKS.items():
        chosen = [row for row in rows if summary.label_of(row) == label]
        speeds = [batch / row.time_us * 1e6 for row in chosen]
        if chosen:
            axes.plot(list(map(place_of, chosen)), speeds, linestyle="", label=label, **style)
    columns = [(n * width + k, kind) for n in range(len(networks)) for k, kind in enumerate(kinds)]
    axes.set_xticks(*zip(*columns, strict=True), fontsize="small")
    for index, network in enumerate(networks):
        middle = index * width + (len(kinds) - 1) / 2
        axes.annotate(network, (middle, 0), (0, -22), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", va="top")  # fmt: skip
        axes.axvline((index + 1) * width - 1, color="0.85", linewidth=0.8)
    axes.set(yscale="log", ylabel=f"images per second, batch {batch}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize="small")
    axes.grid(axis="y", which="both", color="0.92")
    axes.set_xlim(-1, len(networks) * width - 1)
    axes.set_ylim(top=1.2 * max(batch / row.time_us * 1e6 for row in rows))
    figure.legend(loc="outside upper center", fontsize="small", ncols=4)
    return figure


def first_batch(rows: Sequence[Row]) -> plt.Figure:
    """Seconds to the first result, a group per network at its smallest batch."""
    smallest = min(map(_images, rows))
    rows = [row for row in rows if _images(row) == smallest and row.first_batch_s]
    figure, axes = plt.subplots(figsize=(10, 3.5), layout="constrained")
    _bars(axes, rows, rows, lambda row: row.first_batch_s)
    axes.set(title=f"time to the first batch of {smallest}", ylabel="seconds", yscale="log")
    axes.legend(fontsize="small", ncols=2)
    return figure


def _bars(
    axes: plt.Axes, rows: Sequence[Row], shown: Sequence[Row], height_of: Callable[[Row], float]
) -> None:
    """A group of bars per network and a bar per variant of ``rows``, for those that are shown."""
    variants = list(dict.fromkeys(row.variant for row in rows))
    networks = list(dict.fromkeys(row.op for row in rows))
    for index, variant in enumerate(variants):
        heights = {row.op: height_of(row) for row in shown if row.variant == variant}
        offset = (index - (len(variants) - 1) / 2) * 0.8 / len(variants)
        places = [networks.index(name) + offset for name in heights]
        axes.bar(places, list(heights.values()), 0.8 / len(variants), label=variant)
    axes.set_xticks(range(len(networks)), networks)


def depth_memory(rows: Sequence[Row]) -> plt.Figure:
    """Saved activations per image against DenseNet's depth, a line per variant."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = [row for row in rows if row.op in DEPTH and row.saved_bytes]
    for variant in dict.fromkeys(row.variant for row in rows):
        points = sorted((DEPTH[r.op], r.saved_bytes / 1e6) for r in rows if r.variant == variant)
        axes.plot(*zip(*points, strict=True), "o-", label=variant)
    axes.set(xlabel="layers of DenseNet", ylabel="MB per image kept for backward")
    axes.set_xticks(sorted({DEPTH[row.op] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _images(row: Row) -> int:
    return int(row.case.removeprefix("batch "))


def _save(figure: plt.Figure, folder: Path, name: str) -> Path:
    path = folder / f"{name}.svg"
    figure.savefig(path, metadata=METADATA)
    plt.close(figure)
    return path
