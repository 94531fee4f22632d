"""max_pool against torch.nn.functional.max_pool2d, eager and compiled, on the networks' own pools.

``python -m benchmarks.bench_max_pool [--quick]`` prints the table (``--help``: options),
``pytest benchmarks/bench_max_pool.py`` gives the rows to pytest-benchmark. There is no backward
row: with a gradient the op runs PyTorch's own.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import command_line, harness
from benchmarks.harness import Case
from cvkernels.functional import max_pool
from cvkernels.ops.common.traffic import touched_positions
from cvkernels.ops.max_pool.reference import max_pool_reference


class Pool(NamedTuple):
    """x[N, C, H, W] and a square window; C, H and W as at images of 224 x 224."""

    C: int
    H: int
    W: int
    kernel_size: int
    stride: int
    padding: int
    ceil_mode: bool = False


POOLS = {
    "resnet-stem": Pool(64, 112, 112, 3, 2, 1),
    "senet-pool0": Pool(64, 112, 112, 3, 2, 0, True),
    "googlenet-pool2": Pool(192, 56, 56, 3, 2, 0, True),
    "googlenet-pool4": Pool(832, 14, 14, 2, 2, 0, True),
    "googlenet-branch-3a": Pool(192, 28, 28, 3, 1, 1, True),
    "googlenet-branch-5b": Pool(832, 7, 7, 3, 1, 1, True),
    "odd": Pool(67, 31, 45, 3, 2, 1),  # nothing divides a vector
}
QUICK = ("resnet-stem", "googlenet-branch-3a", "odd")
HOST = ("one-pixel", Pool(8, 1, 1, 3, 2, 1))


def traffic(pool: Pool, batch: int, dtype: torch.dtype) -> int:
    """Every element of x that some window holds, read once; the output written once."""
    outputs, inputs = [], []
    for size in (pool.H, pool.W):
        span = size + 2 * pool.padding - pool.kernel_size
        windows = (math.ceil if pool.ceil_mode else math.floor)(span / pool.stride) + 1
        if pool.ceil_mode and (windows - 1) * pool.stride >= size + pool.padding:
            windows -= 1
        outputs.append(windows)
        inputs.append(
            touched_positions(size, pool.kernel_size, pool.stride, pool.padding, 1, windows)
        )
    return batch * pool.C * (math.prod(inputs) + math.prod(outputs)) * dtype.itemsize


def inputs_of(
    pool: Pool, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple, dict]:
    x = torch.randn(batch, pool.C, pool.H, pool.W, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return (x, pool.kernel_size, pool.stride, pool.padding, 1, pool.ceil_mode), {}


def case_of(
    name: str, pool: Pool, batch: int, dtype: torch.dtype, device: torch.device, part="forward"
) -> Case:
    window = f"{pool.kernel_size}x{pool.kernel_size}/{pool.stride}"
    return Case(
        op="max_pool",
        name=name,
        shape=f"{batch}x{pool.C}x{pool.H}x{pool.W} {window}",
        dtype=dtype,
        inputs=functools.partial(inputs_of, pool, batch, dtype, device),
        reference=max_pool_reference,
        variants={
            "eager": lambda: F.max_pool2d,
            "compile": lambda: harness.compiled(F.max_pool2d),
            "cvkernels": lambda: max_pool,
        },
        bytes=traffic(pool, batch, dtype) if part == "forward" else None,
        part=part,
        bitwise=True,
    )


def cases(
    device: torch.device, dtypes: list[torch.dtype], batch: int, quick: bool = False
) -> list[Case]:
    pools = {name: pool for name, pool in POOLS.items() if name in QUICK or not quick}
    made = []
    for dtype in dtypes:
        made += [case_of(name, pool, batch, dtype, device) for name, pool in pools.items()]
        made.append(case_of(*HOST, 2, dtype, device, part="host"))
    return made


def test_max_pool(measure):
    measure()


if __name__ == "__main__":
    raise SystemExit(command_line.main("max_pool", cases))
