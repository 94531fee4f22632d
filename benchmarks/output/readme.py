"""``python -m benchmarks readme``: the tables of README.md and ``results/<machine>/README.md``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness.environment import ROOT
from benchmarks.harness.report import Report, Row
from benchmarks.output import markdown, results, summary
from cvkernels.demo import HEADER, Table

README = ROOT / "README.md"
BEGIN, END = "<!-- networks -->", "<!-- end of networks -->"
# Runtimes of other projects, which run a network in the form in which it is deployed.
RUNTIMES = ("openvino", "onnxruntime", "tensorrt")
# The columns of the speed-ups of each dtype, and the variant that each is about.
SPEED_UPS = {"imported": "cvkernels", "frozen": "cvkernels freeze"}


def write() -> None:
    for path, text in pages().items():
        path.write_text(text)


def pages() -> dict[Path, str]:
    """What README.md and each machine's README.md are to hold."""
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    made = {machine / "README.md": machine_page(machine) for machine in results.machine_folders()}
    return {README: f"{before}{BEGIN}\n\n{summary.block()}\n\n{END}{after}", **made}


def machine_page(machine: Path) -> str:
    """All figures of one machine: demo, networks, training and kernels, and the plots."""
    parts = [
        f"# Measured on {machine.name}",
        "Made of the JSON files beside it by `python -m benchmarks readme`; "
        "[how it is measured](../../../docs/pages/measure.md).",
    ]
    if networks := results.rows(machine, "models"):
        parts += ["## Speed-ups", speed_ups(networks)]
    if (demo := machine / "demo.json").exists():
        table = Table.from_dict(json.loads(demo.read_text()))
        parts += ["## Demo", markdown.table(HEADER, table.cells()), f"{table.conditions}."]
    for kind, make in TABLES.items():
        if reports := results.reports(machine, kind):
            parts += [f"## {kind.capitalize()}", make(reports), _conditions(reports)]
    plots = sorted(path for path in machine.glob("*.svg") if "roofline" not in path.name)
    parts += [f"![{path.stem}]({path.name})" for path in plots]
    rooflines = [f"[{p.stem}]({p.name})" for p in sorted(machine.glob("roofline*.svg"))]
    parts += [f"Rooflines: {', '.join(rooflines)}."] if rooflines else []
    return "\n\n".join(parts) + "\n"


def speed_ups(rows: Sequence[Row]) -> str:
    """A row per network: geometric mean and worst over the batches, by dtype."""
    header = ["network"]
    lines = {row.op: [row.op] for row in rows}
    for dtype in sorted({row.dtype for row in rows}, key=lambda name: name != "fp32"):
        same = [row for row in rows if row.dtype == dtype]
        header += [f"{dtype}: {name}" for name in (*SPEED_UPS, "frozen, vs runtimes")]
        runtimes = _vs_runtimes(same)
        for network, line in lines.items():
            for variant in SPEED_UPS.values():
                ours = [row for row in same if (row.op, row.variant) == (network, variant)]
                line.append(markdown.mean_and_worst([r.vs_eager for r in ours if r.vs_eager]))
            chosen = (network, SPEED_UPS["frozen"])
            found = [ratio for key, ratio in runtimes.items() if (key[0], key[3]) == chosen]
            line.append(markdown.mean_and_worst(found))
    batches = sorted({summary.images_of(row) for row in rows})
    caption = (
        "Speed-ups over stock PyTorch in channels_last, and over the better of the runtimes "
        "(OpenVINO, ONNX Runtime): geometric mean and, in brackets, worst of batches "
        f"{' and '.join(map(str, batches))}, each within its dtype."
    )
    return f"{markdown.table(header, list(lines.values()))}\n\n{caption}"


def inference_table(reports: Sequence[Report]) -> str:
    """Milliseconds of every variant, a row per network, dtype and batch; ours against the peers."""
    rows = [row for report in reports for row in report.rows]
    variants = list(dict.fromkeys(row.variant for row in rows))
    header = ["network", "batch", "dtype", *(f"{name}, ms" for name in variants)]
    ours = [name for name in variants if name.startswith("cvkernels")]
    compared = ("vs eager", "vs freezing", "vs better runtime", "error")
    header += [f"{name}: {what}" for name in ours for what in compared]
    ratios: dict[str, list[float]] = defaultdict(list)
    runtimes = _vs_runtimes(rows)
    lines = []
    for (network, case, dtype), group in markdown.grouped(rows).items():
        cells = [markdown.ms(group.get(name)) for name in variants]
        for name in ours:
            row = group.get(name)
            found = [getattr(row, "vs_eager", None), getattr(row, "vs_freezing", None)]
            found.append(runtimes.get((network, case, dtype, name)))
            for what, ratio in zip(compared, found, strict=False):
                ratios[f"{name} {what}"] += [] if ratio is None else [ratio]
            cells += map(markdown.ratio, found)
            cells.append(markdown.errors(row))
        lines.append([network, case.removeprefix("batch "), dtype, *cells])
    means = [f"{what} {markdown.mean_and_range(found)}" for what, found in ratios.items() if found]
    overall = [f"Geometric means (worst to best): {'; '.join(means)}."] if means else []
    return "\n\n".join([markdown.table(header, lines), *overall, _first_batches(rows)])


def _vs_runtimes(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], float]:
    """Speed-up over the best of the runtimes, by network, case, dtype and variant of ours."""
    ratios = {}
    for key, group in markdown.grouped(rows).items():
        times = [group[name].time_us for name in RUNTIMES if name in group and group[name].time_us]
        for name, row in group.items():
            if times and row.time_us and not row.peer:
                ratios[(*key, name)] = min(times) / row.time_us
    return ratios


def _first_batches(rows: Sequence[Row]) -> str:
    """Seconds to the first batch and memory, of the same rows."""
    variants = list(dict.fromkeys(row.variant for row in rows))
    header = ["network", "batch", "dtype", *(f"{name}: s, peak MB" for name in variants)]
    lines = [
        [
            network,
            case.removeprefix("batch "),
            dtype,
            *(markdown.start(group.get(v)) for v in variants),
        ]
        for (network, case, dtype), group in markdown.grouped(rows).items()
    ]
    return markdown.table(header, lines)


def training_table(reports: Sequence[Report]) -> str:
    """A row per network and variant: the step, its ratio, and what it keeps for backward."""
    header = [
        "network", "batch", "dtype", "variant", "step ms", "vs eager", "vs compile",
        "saved MB/image", "peak MB", "error",
    ]  # fmt: skip
    lines = [
        [
            row.op, row.case.removeprefix("batch "), row.dtype, row.variant, markdown.ms(row),
            markdown.ratio(row.vs_eager), markdown.ratio(row.vs_compile),
            markdown.number(row.saved_bytes, 1e6, "{:.1f}"),
            markdown.number(row.peak_bytes, 1e6, "{:.0f}"), markdown.errors(row),
        ]
        for report in reports
        for row in report.rows
    ]  # fmt: skip
    return markdown.table(header, lines)


def int8_table(reports: Sequence[Report]) -> str:
    """Milliseconds of every variant beside what it makes of the logits."""
    rows = [row for report in reports for row in report.rows]
    variants = list(dict.fromkeys(row.variant for row in rows))
    ours = [name for name in variants if name.startswith("cvkernels int8")]
    header = ["network", "batch"]
    header += [part for name in variants for part in (f"{name}, ms", "dB, top-1")]
    header += [f"{name} vs better runtime" for name in ours]
    ratios: dict[str, list[float]] = defaultdict(list)
    runtimes = [f"{name} int8" for name in RUNTIMES]
    lines = []
    for (network, case, _), group in markdown.grouped(rows).items():
        cells = [network, case.removeprefix("batch ")]
        for name in variants:
            row = group.get(name)
            agreement = ""
            if row is not None and row.decibels is not None:
                agreement = f"{row.decibels:.1f}, {row.top1:.0%}"
            cells += [markdown.ms(row), agreement]
        times = [group[name].time_us for name in runtimes if name in group and group[name].time_us]
        for name in ours:
            time = getattr(group.get(name), "time_us", None)
            ratio = min(times) / time if times and time else None
            ratios[name] += [] if ratio is None else [ratio]
            cells.append(markdown.ratio(ratio))
        lines.append(cells)
    means = [f"{name} {markdown.mean_and_range(found)}" for name, found in ratios.items() if found]
    text = (
        "Every variant is quantised on the same photographs, shifted; dB and top-1 are those of "
        f"the measured batch beside float64. Against the better runtime: {'; '.join(means)}."
    )
    return f"{markdown.table(header, lines)}\n\n{text}"


def kernel_table(reports: Sequence[Report]) -> str:
    """A row per op and part: geometric means of ours over its cases, and the worst case."""
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in (row for report in reports for row in report.rows):
        if not row.peer:
            groups[row.op, row.part, row.dtype, row.variant].append(row)
    header = [
        "op", "part", "dtype", "variant", "cases", "vs eager", "worst", "vs compile",
        "median % of bound", "not measured",
    ]  # fmt: skip
    lines = []
    for key, rows in groups.items():
        eager = [row.vs_eager for row in rows if row.vs_eager]
        compiled = [row.vs_compile for row in rows if row.vs_compile]
        bounds = [row.bound_share for row in rows if row.bound_share]
        worst = min((row for row in rows if row.vs_eager), key=lambda r: r.vs_eager, default=None)
        lines.append([
            *key,
            str(len(rows)),
            markdown.geomean(eager),
            f"{worst.vs_eager:.2f}x ({worst.case})" if worst else "",
            f"{markdown.geomean(compiled)} ({len(compiled)})" if compiled else "",
            f"{statistics.median(bounds):.0%}" if bounds else "",
            str(sum(row.status != "measured" for row in rows)),
        ])  # fmt: skip
    return markdown.table(header, lines)


TABLES: dict[str, Callable[[Sequence[Report]], str]] = {
    "models": inference_table,
    "int8": int8_table,
    "training": training_table,
    "kernels": kernel_table,
}


def _conditions(reports: Sequence[Report]) -> str:
    """One line: where and with what, how noisy, and whether all was measured."""
    environment = ", ".join(f"{k} {v}" for k, v in reports[0].environment.items())
    commits = {report.environment["commit"] for report in reports}
    noise = [report.noise for report in reports if report.noise]
    worst = max((n.drift for n in noise), default=0.0)
    noisy = sum(n.too_noisy for n in noise)
    parts = [f"{environment}."]
    if len(commits) > 1:
        parts.append(f"Parts are of different commits: {', '.join(sorted(commits))}.")
    if noise:
        parts.append(
            f"Speed-ups of the two halves of a run differ by at most {worst:.1%} (geomean); "
            f"{noisy} of {len(noise)} parts say that the machine was too noisy."
        )
    if not all(report.complete for report in reports):
        parts.append("A part was interrupted.")
    return " ".join(parts)
