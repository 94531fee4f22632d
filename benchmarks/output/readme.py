"""``python -m benchmarks readme``: the tables of README.md and ``results/<machine>/README.md``."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness.environment import ROOT
from benchmarks.harness.report import Report, Row
from benchmarks.output import results
from cvkernels.demo import HEADER, Table

README = ROOT / "README.md"
BEGIN, END = "<!-- networks -->", "<!-- end of networks -->"
# Runtimes of other projects, which run a network in the form in which it is deployed.
RUNTIMES = ("openvino", "onnxruntime", "tensorrt")
# The columns of README.md's table for each machine, and the variant that each is about.
SUMMARY = {"imported": "cvkernels", "frozen": "cvkernels freeze"}


def write() -> None:
    for path, text in pages().items():
        path.write_text(text)


def pages() -> dict[Path, str]:
    """What README.md and each machine's README.md are to hold."""
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    made = {machine / "README.md": machine_page(machine) for machine in results.machine_folders()}
    return {README: f"{before}{BEGIN}\n\n{summary()}\n\n{END}{after}", **made}


def summary(folder: Path | None = None) -> str:
    """A row per network: geometric mean and worst of the speed-ups on each machine, by dtype."""
    folder = folder or results.RESULTS
    machines = {m: results.rows(m, "models") for m in results.machine_folders(folder)}
    ours = [row for rows in machines.values() for row in rows if row.vs_eager and not row.peer]
    header = ["network"]
    lines = {row.op: [row.op] for row in ours}
    kinds = {
        (machine, dtype): [row for row in of_machine if row.dtype == dtype]
        for machine, of_machine in machines.items()
        for dtype in sorted({row.dtype for row in of_machine}, key=lambda name: name != "fp32")
    }
    for (machine, dtype), rows in kinds.items():
        names = (*SUMMARY, "frozen, vs runtimes")
        header += [f"{machine.name}, {dtype}: {name}" for name in names]
        runtimes = _vs_runtimes(rows)
        for network, line in lines.items():
            for variant in SUMMARY.values():
                same = [row for row in rows if (row.op, row.variant) == (network, variant)]
                line.append(_mean_and_worst([row.vs_eager for row in same if row.vs_eager]))
            chosen = (network, SUMMARY["frozen"])
            found = [ratio for key, ratio in runtimes.items() if (key[0], key[3]) == chosen]
            line.append(_mean_and_worst(found))
    links = [f"[{machine.name}]({_link(machine / 'README.md', ROOT)})" for machine in machines]
    batches = sorted({int(row.case.removeprefix("batch ")) for row in ours})
    caption = (
        "Speed-ups over stock PyTorch in channels_last, and over the better of the runtimes "
        "(OpenVINO, ONNX Runtime): geometric mean and, in brackets, worst of batches "
        f"{' and '.join(map(str, batches))}, each within its dtype. "
        f"All figures: {', '.join(links)}. {provenance(folder)}"
    )
    return f"{_markdown(header, list(lines.values()))}\n\n{caption}"


def machine_page(machine: Path) -> str:
    """All figures of one machine: demo, networks, training and kernels, and the plots."""
    parts = [
        f"# Measured on {machine.name}",
        "Made of the JSON files beside it by `python -m benchmarks readme`; "
        "[how it is measured](../../../README.md#measure).",
    ]
    if (demo := machine / "demo.json").exists():
        table = Table.from_dict(json.loads(demo.read_text()))
        parts += ["## Demo", _markdown(HEADER, table.cells()), f"{table.conditions}."]
    for kind, make in TABLES.items():
        if reports := results.reports(machine, kind):
            parts += [f"## {kind.capitalize()}", make(reports), _conditions(reports)]
    plots = sorted(path for path in machine.glob("*.svg") if "roofline" not in path.name)
    parts += [f"![{path.stem}]({_link(path, machine)})" for path in plots]
    rooflines = [f"[{p.stem}]({_link(p, machine)})" for p in sorted(machine.glob("roofline*.svg"))]
    parts += [f"Rooflines: {', '.join(rooflines)}."] if rooflines else []
    return "\n\n".join(parts) + "\n"


def provenance(folder: Path) -> str:
    """Which devices the figures are of."""
    devices = {
        report.environment["device"]: "driver" in report.environment
        for machine in results.machine_folders(folder)
        for kind in TABLES
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
        else "No figure of a GPU is measured: what `explain` says for a meta example "
        "(kernels, bytes) is counted from the plan, and no time of a GPU is claimed."
    )
    return " ".join(texts)


def _link(path: Path, page: Path) -> str:
    return str(path.relative_to(page)) if path.is_relative_to(page) else path.name


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
    for (network, case, dtype), group in _grouped(rows).items():
        cells = [_ms(group.get(name)) for name in variants]
        for name in ours:
            row = group.get(name)
            found = [getattr(row, "vs_eager", None), getattr(row, "vs_freezing", None)]
            found.append(runtimes.get((network, case, dtype, name)))
            for what, ratio in zip(compared, found, strict=False):
                ratios[f"{name} {what}"] += [] if ratio is None else [ratio]
            cells += map(_ratio, found)
            cells.append(_errors(row))
        lines.append([network, case.removeprefix("batch "), dtype, *cells])
    means = [
        f"{what} {_geomean(found)} ({min(found):.2f}x to {max(found):.2f}x)"
        for what, found in ratios.items()
        if found
    ]
    summary = [f"Geometric means (worst to best): {'; '.join(means)}."] if means else []
    return "\n\n".join([_markdown(header, lines), *summary, _first_batches(rows)])


def _vs_runtimes(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], float]:
    """Speed-up over the best of the runtimes, by network, case, dtype and variant of ours."""
    ratios = {}
    for key, group in _grouped(rows).items():
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
        [network, case.removeprefix("batch "), dtype, *(_start(group.get(v)) for v in variants)]
        for (network, case, dtype), group in _grouped(rows).items()
    ]
    return _markdown(header, lines)


def training_table(reports: Sequence[Report]) -> str:
    """A row per network and variant: the step, its ratio, and what it keeps for backward."""
    header = [
        "network", "batch", "dtype", "variant", "step ms", "vs eager", "vs compile",
        "saved MB/image", "peak MB", "error",
    ]  # fmt: skip
    lines = [
        [
            row.op, row.case.removeprefix("batch "), row.dtype, row.variant, _ms(row),
            _ratio(row.vs_eager), _ratio(row.vs_compile),
            _number(row.saved_bytes, 1e6, "{:.1f}"), _number(row.peak_bytes, 1e6, "{:.0f}"),
            _errors(row),
        ]
        for report in reports
        for row in report.rows
    ]  # fmt: skip
    return _markdown(header, lines)


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
    for (network, case, _), group in _grouped(rows).items():
        cells = [network, case.removeprefix("batch ")]
        for name in variants:
            row = group.get(name)
            agreement = ""
            if row is not None and row.decibels is not None:
                agreement = f"{row.decibels:.1f}, {row.top1:.0%}"
            cells += [_ms(row), agreement]
        times = [group[name].time_us for name in runtimes if name in group and group[name].time_us]
        for name in ours:
            time = getattr(group.get(name), "time_us", None)
            ratio = min(times) / time if times and time else None
            ratios[name] += [] if ratio is None else [ratio]
            cells.append(_ratio(ratio))
        lines.append(cells)
    means = [
        f"{name} {_geomean(found)} ({min(found):.2f}x to {max(found):.2f}x)"
        for name, found in ratios.items()
        if found
    ]
    text = (
        "Every variant is quantised on the same photographs, shifted; dB and top-1 are those of "
        f"the measured batch beside float64. Against the better runtime: {'; '.join(means)}."
    )
    return f"{_markdown(header, lines)}\n\n{text}"


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
            _geomean(eager),
            f"{worst.vs_eager:.2f}x ({worst.case})" if worst else "",
            f"{_geomean(compiled)} ({len(compiled)})" if compiled else "",
            f"{statistics.median(bounds):.0%}" if bounds else "",
            str(sum(row.status != "measured" for row in rows)),
        ])  # fmt: skip
    return _markdown(header, lines)


TABLES: dict[str, Callable[[Sequence[Report]], str]] = {
    "models": inference_table,
    "int8": int8_table,
    "training": training_table,
    "kernels": kernel_table,
}


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    groups: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        groups[row.op, row.case, row.dtype][row.variant] = row
    return groups


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


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    if row.time_us is None:
        return "" if row.status == "measured" else row.status
    return f"{row.time_us / 1e3:.1f} ({row.p20_us / 1e3:.1f}-{row.p80_us / 1e3:.1f})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _errors(row: Row | None) -> str:
    if row is None or row.max_error is None:
        return ""
    return f"{row.max_error:.1e} (eager {row.eager_error:.1e})"


def _start(row: Row | None) -> str:
    if row is None or row.first_batch_s is None:
        return "" if row is None else row.status
    return f"{row.first_batch_s:.1f}, {_number(row.peak_bytes, 1e6, '{:.0f}')}"


def _number(value: float | None, unit: float, form: str) -> str:
    return "" if value is None or math.isnan(value) else form.format(value / unit)


def _geomean(values: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f}x" if values else ""


def _mean_and_worst(values: Sequence[float]) -> str:
    return f"{_geomean(values)} ({min(values):.2f}x)" if values else ""


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *lines))
