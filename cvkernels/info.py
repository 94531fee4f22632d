"""``info``: versions, devices, and for each missing thing why and what mends it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import platform
from pathlib import Path
from typing import NamedTuple

import torch

from cvkernels import extension
from cvkernels.ops.conv_bn_act import onednn

COLUMNS = 100  # past which a remedy is a line of its own


class Item(NamedTuple):
    """One line of :func:`info`. ``remedy`` is the command that mends what is missing, or empty."""

    name: str
    available: bool
    detail: str
    remedy: str = ""


class Info:
    """What is here and what is missing; prints as lines."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items

    def __getitem__(self, name: str) -> Item:
        return next(item for item in self.items if item.name == name)

    def __str__(self) -> str:
        width, lines = max(len(item.name) for item in self.items), []
        for item in self.items:
            line = f"{item.name.ljust(width)}  {'yes' if item.available else 'no '}  {item.detail}"
            if item.remedy:
                joint = "  " if len(line + item.remedy) + 6 <= COLUMNS else f"\n{'':{width + 7}}"
                line += f"{joint}->  {item.remedy}"
            lines.append(line)
        return "\n".join(lines)

    __repr__ = __str__


def info() -> Info:
    """Versions, GPUs and backends of this process. Never raises, whatever is missing."""
    return Info(
        [
            _package("cvkernels", "pip install cvkernels"),
            Item("python", True, f"{platform.python_version()} on {_system()}"),
            Item("torch", True, f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
            _gpus(),
            _package("triton", "pip install triton"),
            *_compiled(),
            *_instruction_sets(),
            _onednn(),
            _package("torchvision", "pip install torchvision"),
            _package("timm", "pip install timm"),
        ]
    )


@functools.cache
def cpu_name() -> str:
    """The processor's model, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _system() -> str:
    libc = " ".join(platform.libc_ver())
    return ", ".join(filter(None, [f"{platform.system()} {platform.machine()}", libc.strip()]))


def _package(name: str, remedy: str) -> Item:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Item(name, False, "not installed", remedy)
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything at import
        cause = next(iter(str(error).splitlines()), "")
        return Item(
            name, False, f"{version} does not import: {type(error).__name__}: {cause}", remedy
        )
    return Item(name, True, version)


def _gpus() -> Item:
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds none"
        return Item("gpu", False, f"{why}; everything runs on the CPU")
    names = []
    for index in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        names.append(f"{torch.cuda.get_device_name(index)} (compute capability {capability})")
    return Item("gpu", True, ", ".join(names))


def _compiled() -> list[Item]:
    built = extension.build_info().items()
    details = {
        "cpu": ", ".join(f"{key} {value}" for key, value in built if value),
        "cuda": "loaded",
    }
    return [
        Item(f"compiled {half} ops", True, details[half])
        if status.available
        else Item(f"compiled {half} ops", False, status.reason, status.remedy)
        for half, status in extension.status().items()
    ]


def _instruction_sets() -> list[Item]:
    """Those that the compiled CPU ops take, where they are there."""
    items = []
    if sets := extension.instruction_sets():
        others = f"{', '.join(sets[:-1])}, and " if len(sets) > 1 else ""
        items.append(Item("instruction sets", True, f"{others}{sets[-1]}, which is used"))
    if refusal := extension.amx_refusal():
        items.append(Item("amx", False, f"the operating system refuses it: {refusal}"))
    return items


def _onednn() -> Item:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    able = [str(dtype).removeprefix("torch.") for dtype in dtypes if not onednn.lacks(dtype)]
    if not able:
        return Item("onednn", False, onednn.lacks(torch.float32))
    return Item("onednn", True, f"fused convolutions in {', '.join(able)}")
