"""The machine: whether it can be measured at all, by what, and at which batch size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import cvkernels
from benchmarks.first_light.setting import Setting
from benchmarks.harness.environment import environment
from cvkernels import extension
from cvkernels.tables import first_line

# Of the networks eager PyTorch needs the most, efficientnet_b0 in float32 statistics; and the rest.
BYTES_PER_IMAGE, BYTES_AT_LEAST = 60e6, 4e9
BUILD = "build it elsewhere with CVKERNELS_BUILD=cuda CVKERNELS_CUDA_ARCHS={} and carry it along"


def items(setting: Setting) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "facts", lambda: facts(setting)


def facts(setting: Setting) -> dict[str, Any]:
    """The environment and the batch; or ``refused``, a line that says why there is none."""
    if not setting.rehearsal and (reason := lacks_gpu()):
        return {"refused": reason}
    found = {"environment": environment(setting.device), "info": str(cvkernels.info())}
    if setting.rehearsal:
        return {**found, "batch": 2}
    batch = fitting(setting.batch, torch.cuda.mem_get_info()[0])
    if not batch:
        return {"refused": "the GPU has not the memory for one image; free it, or use another"}
    return {**found, "batch": batch}


def lacks_gpu() -> str:
    """Why nothing can be measured here; empty where it can."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        # of a driver that is too old PyTorch says so, and how old it is
        said = [first_line(w.message) for w in caught if "driver" in str(w.message).lower()]
        return said[0] if said else "torch finds no CUDA device here; --rehearse needs none"
    status = extension.status()["cuda"]
    major, minor = torch.cuda.get_device_capability()
    build = BUILD.format(f"{major}{minor}")
    if not status.available:
        return f"the CUDA ops are missing: {status.reason}; {build}"
    try:
        x = torch.randn(1, 8, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last)
        cvkernels.functional.max_pool(x, 2, backend="native")
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "no kernel image" not in str(error) and "architecture" not in str(error):
            return f"the CUDA ops do not run here: {first_line(error)}; {build}"
        return f"_C_cuda.so has no code for compute capability {major}.{minor}; {build}"
    return ""


def fitting(batch: int, free: int) -> int:
    """``batch``, halved until it fits into so many bytes; 0 where one image does not."""
    while batch and BYTES_AT_LEAST + batch * BYTES_PER_IMAGE > free:
        batch //= 2
    return batch
