"""The machine that a benchmark runs on, and the versions it runs with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from cvkernels.info import cpu_name

ROOT = Path(__file__).resolve().parents[2]


def environment(device: torch.device) -> dict[str, Any]:
    """The conditions that a time is worth nothing without."""
    where = {"device": cpu_name()}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        where = {"device": name, "driver": _driver(), "cpu": cpu_name()}
    return {
        **where,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"),
        "python": platform.python_version(),
        "cache": f"{last_level_cache(device) / 2**20:.0f} MB, cold",
    }


def _driver() -> str:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.split("\n")[0]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache that every access to memory goes through; 32 MB where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=2**25)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float32] if device.type == "cpu" else [torch.bfloat16, torch.float16]


def default_batch(device: torch.device) -> int:
    return 16 if device.type == "cpu" else 128
