"""What a call holds of memory, as the demo and the benchmarks report it; and when it runs out."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from pathlib import Path

import torch


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Most bytes that ``call`` holds at once beyond those held before it; NaN where nothing tells.

    On CUDA, PyTorch's allocator tells. On CPU, the kernel's high-water mark of resident memory does
    (Linux), which libraries' scratch memory is part of.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return math.nan
    resident = resident_memory(device)
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return _status_bytes("VmHWM") - resident


def resident_memory(device: torch.device) -> float:
    """Bytes held now, as :func:`peak_memory` counts them; NaN where nothing tells."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + _graphs_bytes(device)
    if not Path("/proc/self/status").exists():
        return math.nan
    # What malloc keeps of freed memory would hide as much of what comes.
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, of Python's allocator or of PyTorch's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # A RuntimeError of PyTorch's CPU allocator.
    return any(text in str(error) for text in ("can't allocate memory", "not enough memory"))


def _graphs_bytes(device: torch.device) -> int:
    """What CUDA graphs hold for their replays beyond what PyTorch counts as allocated."""
    own = torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == own.index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
