"""What README.md shows of the results: one plot, one table and the conditions of both."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.environment import ROOT
from benchmarks.harness.report import Row
from benchmarks.output import markdown, results

PRECISIONS = ("fp32", "bf16", "int8")
FROZEN = {"fp32": "cvkernels freeze", "bf16": "cvkernels freeze", "int8": "cvkernels int8"}
GUARDED = "cvkernels int8, 30 dB"
NAMES = {
    GUARDED: "cvkernels, int8 guarded at 30 dB",
    "cvkernels": "cvkernels, imported",
    "eager channels_last": "PyTorch",
    "eager NCHW": "PyTorch in NCHW",
    "compile": "torch.compile",
    "compile freezing": "torch.compile with freezing",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
}
FIGURE = "precisions.svg"
WIDTH = 118  # of README.md's lines


def rows_of(machine: Path) -> list[Row]:
    """The timed rows of the machine's networks, each in a precision that it computes in."""
    quantised = [row for row in results.rows(machine, "int8") if "int8" in row.variant]
    return [row for row in (*results.rows(machine, "models"), *quantised) if row.time_us]


def label_of(row: Row) -> str:
    """What a reader calls the variant; for a variant that the plot leaves out, its own name."""
    if row.variant == FROZEN[row.dtype]:
        return "cvkernels, frozen"
    return NAMES.get(row.variant.removesuffix(" int8"), row.variant)


def block(folder: Path | None = None) -> str:
    """The part of README.md that is made of the results: of the machine with most precisions."""
    folder = folder or results.RESULTS
    machines = results.machine_folders(folder)
    rows = {machine: rows_of(machine) for machine in machines}
    machine = max(machines, key=lambda m: len({row.dtype for row in rows[m]}))
    batch = max(images_of(row) for row in rows[machine])
    links = [f"[{m.name}]({_from_root(m / 'README.md')})" for m in machines]
    figure = (
        f"![Images per second of five networks in three precisions, ours and the peers']"
        f"({_from_root(machine / FIGURE)})"
    )
    parts = [
        figure,
        _table([row for row in rows[machine] if images_of(row) == batch]),
        _wrapped(_caption(machine, rows[machine], batch)),
        _wrapped(f"All figures: {', '.join(links)}. {provenance(folder)}"),
    ]
    return "\n\n".join(parts)


def images_of(row: Row) -> int:
    return int(row.case.removeprefix("batch "))


def _table(rows: Sequence[Row]) -> str:
    """A row per network in float32: ours, the fastest peer, and what each takes of memory."""
    header = ["network", "ours, ms", "best peer, ms", "speed-up", "ours, MB", "best peer, MB"]
    lines = []
    for (network, _, dtype), group in markdown.grouped(rows).items():
        ours = group.get(FROZEN["fp32"])
        peer = _fastest_peer(group)
        if dtype == "fp32" and ours is not None and peer is not None:
            lines.append([
                network, f"{ours.time_us / 1e3:.1f}",
                f"{peer.time_us / 1e3:.1f} ({label_of(peer)})",
                markdown.ratio(peer.time_us / ours.time_us), _memory(ours), _memory(peer),
            ])  # fmt: skip
    return markdown.table(header, lines)


def _caption(machine: Path, rows: Sequence[Row], batch: int) -> str:
    environment = results.reports(machine, "models")[0].environment
    batches = sorted({images_of(row) for row in rows})
    conditions = f"{environment['device']}, {environment['threads']} threads"
    if "torch" in environment:
        conditions += f", torch {environment['torch']}"
    parts = [
        f"{conditions}; batch {batch} at 224 x 224, random weights. The table is in float32, ours "
        "frozen; times are medians of one interleaved run per network, and MB are the resident "
        "memory that building it and calling it twice add to the process that holds the model.",
        f"Against the fastest peer at batches {' and '.join(map(str, batches))}, geometric mean "
        f"(worst to best): {'; '.join(_against_peers(rows))}. Peers in int8 have no such guard.",
    ]
    return " ".join(parts)


def _against_peers(rows: Sequence[Row]) -> list[str]:
    ratios: dict[str, list[float]] = defaultdict(list)
    for (_, _, dtype), group in markdown.grouped(rows).items():
        peer = _fastest_peer(group)
        guarded = "int8 guarded at 30 dB"
        for name, variant in ((dtype, FROZEN[dtype]), (guarded, GUARDED)):
            if peer is not None and variant in group:
                ratios[name].append(peer.time_us / group[variant].time_us)
    order = [name for kind in PRECISIONS for name in ratios if name.startswith(kind)]
    return [f"{name} {markdown.mean_and_range(ratios[name])}" for name in order]


def _fastest_peer(group: dict[str, Row]) -> Row | None:
    return min((row for row in group.values() if row.peer), key=lambda r: r.time_us, default=None)


def _memory(row: Row) -> str:
    if row.kept_bytes is None or row.peak_bytes is None:
        return ""
    return f"{(row.kept_bytes + row.peak_bytes) / 1e6:.0f}"


def provenance(folder: Path) -> str:
    """Which devices the figures are of."""
    devices = {
        report.environment["device"]: "driver" in report.environment
        for machine in results.machine_folders(folder)
        for kind in results.KINDS
        for report in results.reports(machine, kind)
    }
    cpus, gpus = (
        ", ".join(name for name, is_gpu in devices.items() if is_gpu == wanted)
        for wanted in (False, True)
    )
    texts = [f"Figures of CPUs are measured on {cpus}."] if cpus else []
    texts.append(
        f"Figures of GPUs are measured on {gpus}."
        if gpus
        else "No figure of a GPU is measured: its kernels and bytes are counted from the plan, and "
        "its times are predicted by a model."
    )
    return " ".join(texts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _from_root(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
