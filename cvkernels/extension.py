"""Loads the compiled part of the package, and says for each half whether it loaded and why not.

``cpu`` is the Python module ``cvkernels._C``, ``cuda`` the library ``_C_cuda.so`` beside it.
Neither has to be there: what is absent or broken is one line of :func:`status` and stops no import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

_REBUILD = "pip install --force-reinstall --no-deps cvkernels"


class Status(NamedTuple):
    """Whether one half of the compiled part is there; else why not, and what mends it."""

    available: bool
    reason: str = ""
    remedy: str = ""


_status: dict[str, Status] = {}


def load() -> dict[str, Status]:
    """Load both halves, once per process; importing an op does this. Never raises."""
    if not _status:
        _status["cpu"] = _load_cpu()
        _status["cuda"] = _load_cuda()
    return dict(_status)


def status() -> dict[str, Status]:
    """The :class:`Status` of ``"cpu"`` and of ``"cuda"``."""
    return load()


def has(half: str) -> bool:
    """Whether the ops for ``"cpu"`` or for ``"cuda"`` are loaded."""
    return (_status or load())[half].available


def build_info() -> dict[str, str]:
    """How the compiled part was built; empty if it is not loaded."""
    if not has("cpu"):
        return {}
    return importlib.import_module("cvkernels._C").build_info()


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Those that calls of the CPU ops take on this processor, the best one last; none where the ops
    are not loaded."""
    if not has("cpu"):
        return ()
    return tuple(importlib.import_module("cvkernels._C").instruction_sets())


def amx_refusal() -> str:
    """Why the operating system refuses this process the AMX that the processor has, in its words;
    empty where it does not."""
    return importlib.import_module("cvkernels._C").amx_refusal() if has("cpu") else ""


@contextlib.contextmanager
def limited_to(name: str) -> Iterator[None]:
    """Let calls of the CPU ops in this process take no better instruction set, to test or measure
    it; plans that are made within choose for it."""
    compiled, best = importlib.import_module("cvkernels._C"), instruction_sets()[-1]
    compiled.limit_instruction_sets(name)
    instruction_sets.cache_clear()
    try:
        yield
    finally:
        compiled.limit_instruction_sets(best)
        instruction_sets.cache_clear()


@functools.cache
def lacks_gpu(capability: tuple[int, int]) -> str:
    """Why the CUDA ops have no code for a GPU of this compute capability; empty where they have."""
    archs = [int(arch) for arch in build_info().get("cuda_archs", "").split(";") if arch]
    major, minor = capability
    same_major = any(arch // 10 == major and arch % 10 <= minor for arch in archs)
    if not archs or same_major or 10 * major + minor >= max(archs):
        return ""
    return (
        f"the CUDA ops are built for compute capabilities {archs} and this GPU has {major}.{minor} "
        f"(rebuild with CVKERNELS_CUDA_ARCHS={major}{minor})"
    )


def _load_cpu() -> Status:
    if not any(_directory().glob("_C.*")):
        return Status(False, "the compiled part is not installed", _REBUILD)
    try:
        importlib.import_module("cvkernels._C")
    except (ImportError, OSError, RuntimeError) as error:
        return Status(False, f"cvkernels._C does not load: {_one_line(error)}", _REBUILD)
    return Status(True)


def _load_cuda() -> Status:
    if torch.version.cuda is None:
        return Status(
            False,
            f"torch {torch.__version__} is built without CUDA",
            "pip install --force-reinstall torch, from an index with CUDA builds",
        )
    path = _directory() / "_C_cuda.so"
    if not path.is_file():
        return Status(
            False,
            "the package was built without CUDA ops",
            "install a CUDA toolkit, then: CVKERNELS_BUILD=cuda pip install --no-deps .",
        )
    if not _status["cpu"].available:  # it says for which GPUs this half has code
        return Status(False, "_C_cuda.so needs cvkernels._C, which is not loaded", _REBUILD)
    try:
        torch.ops.load_library(path)
    except (ImportError, OSError, RuntimeError) as error:
        return Status(False, f"_C_cuda.so does not load: {_one_line(error)}", _REBUILD)
    return Status(True)


def _directory() -> Path:
    return Path(__file__).parent


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
