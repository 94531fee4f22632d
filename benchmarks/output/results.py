"""The committed results: ``results/<machine>/<kind>-<name>.json`` and ``demo.json``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from benchmarks.harness.environment import ROOT, cpu_name
from benchmarks.harness.report import Report, Row

RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("models", "int8", "training", "kernels")
# Of a processor's name, what tells it from no other.
NOISE_WORDS = {"amd", "intel", "nvidia", "r", "tm", "cpu", "processor", "core", "geforce"}
SERIES = {"xeon"}  # says something where nothing else does


def machine_name(device: torch.device) -> str:
    """Its folder: "h200", or for a CPU the model and PyTorch's threads, "epyc-2core"."""
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return f"{_slug(cpu_name())}-{torch.get_num_threads()}core"


def _slug(name: str) -> str:
    words = re.findall(r"[a-z0-9.]+", name.lower().partition("@")[0])
    telling = [word for word in words if word not in NOISE_WORDS]
    return "-".join([w for w in telling if w not in SERIES] or telling) or "unknown"


def machine_folders(results: Path | None = None) -> list[Path]:
    """Those of complete runs; not where all is predicted."""
    folders = (path for path in (results or RESULTS).iterdir() if path.is_dir())
    measured = ("kernels-*.json", "models-*.json", "int8-*.json", "training-*.json", "demo.json")
    return sorted(
        path
        for path in folders
        if path.suffix != ".partial" and any(any(path.glob(name)) for name in measured)
    )


def reports(folder: Path, kind: str) -> list[Report]:
    """A machine's "kernels", "models" or "training", in the order of their names."""
    return [read(path) for path in sorted(folder.glob(f"{kind}-*.json"))]


def read(path: Path) -> Report:
    return Report.from_dict(json.loads(path.read_text()))


def rows(folder: Path, kind: str) -> list[Row]:
    return [row for report in reports(folder, kind) for row in report.rows]
