"""avg_pool against PyTorch's, eager and compiled, on the pools of DenseNet's transitions.

``python -m benchmarks.bench_avg_pool [--quick]`` prints the table (``--help``: options),
``pytest benchmarks/bench_avg_pool.py`` gives the rows to pytest-benchmark. There is no backward
row: with a gradient the op runs PyTorch's own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import command_line, harness
from benchmarks.harness import Case
from cvkernels.functional import BatchNormParams, avg_pool
from cvkernels.ops.avg_pool.reference import avg_pool_reference
from cvkernels.ops.common.traffic import touched_positions


class Pool(NamedTuple):
    """x[N, C, H, W] and a square window; C, H and W as at images of 224 x 224."""

    C: int
    H: int
    W: int
    kernel_size: int
    stride: int
    padding: int = 0
    norm: bool = False


POOLS = {
    "densenet-transition1": Pool(256, 56, 56, 2, 2, norm=True),
    "densenet-transition3": Pool(1024, 14, 14, 2, 2, norm=True),
    "densenet-last": Pool(1024, 7, 7, 7, 7, norm=True),
    "resnet-last": Pool(2048, 7, 7, 7, 7),
    "without-norm": Pool(256, 56, 56, 2, 2),
    "odd": Pool(67, 31, 45, 3, 2, 1),  # nothing divides a vector
}
QUICK = ("densenet-transition1", "without-norm", "odd")
HOST = ("one-pixel", Pool(8, 1, 1, 1, 1))


def traffic(pool: Pool, batch: int, dtype: torch.dtype) -> int:
    """Every element of x that some window holds, read once; the output written once."""
    read = written = batch * pool.C
    for size in (pool.H, pool.W):
        windows = (size + 2 * pool.padding - pool.kernel_size) // pool.stride + 1
        window = (pool.kernel_size, pool.stride, pool.padding)
        read *= touched_positions(size, *window, 1, windows)
        written *= windows
    return (read + written) * dtype.itemsize + 4 * 4 * pool.C * pool.norm


def inputs_of(
    pool: Pool, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple, dict]:
    x = torch.randn(batch, pool.C, pool.H, pool.W, device=device).to(dtype)
    bn = None
    if pool.norm:
        weight, bias, mean = torch.randn(3, pool.C, device=device)
        bn = BatchNormParams(weight, bias, mean, torch.rand(pool.C, device=device) + 0.5)
    x = x.contiguous(memory_format=torch.channels_last)
    return (x, pool.kernel_size, pool.stride, pool.padding, bn), {}


def reference(x: Tensor, kernel_size: int, stride: int, padding: int, bn: BatchNormParams | None):
    return avg_pool_reference(x, kernel_size, stride, padding, input_bn=bn)


def fused(x: Tensor, kernel_size: int, stride: int, padding: int, bn: BatchNormParams | None):
    return avg_pool(x, kernel_size, stride, padding, input_bn=bn)


def case_of(
    name: str, pool: Pool, batch: int, dtype: torch.dtype, device: torch.device, part="forward"
) -> Case:
    window = f"{pool.kernel_size}x{pool.kernel_size}/{pool.stride}"
    norm = " of relu(norm)" if pool.norm else ""
    return Case(
        op="avg_pool",
        name=name,
        shape=f"{batch}x{pool.C}x{pool.H}x{pool.W} {window}{norm}",
        dtype=dtype,
        inputs=functools.partial(inputs_of, pool, batch, dtype, device),
        reference=reference,
        variants={
            "eager": lambda: reference,
            "compile": lambda: harness.compiled(reference),
            "cvkernels": lambda: fused,
        },
        bytes=traffic(pool, batch, dtype) if part == "forward" else None,
        part=part,
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


def test_avg_pool(measure):
    measure()


if __name__ == "__main__":
    raise SystemExit(command_line.main("avg_pool", cases))
