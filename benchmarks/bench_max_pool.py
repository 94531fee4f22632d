"""max_pool against torch.nn.functional.max_pool2d, eager and compiled, on the networks' own pools.

There is no backward row: with a gradient the op runs PyTorch's own.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from benchmarks.harness.case import Case, cases_of, image, variants_of
from benchmarks.harness.pool import Pool, pool_case
from cvkernels.functional import max_pool
from cvkernels.ops.max_pool.reference import max_pool_reference

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


def inputs_of(
    pool: Pool, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple, dict]:
    x = image(batch, pool.C, pool.H, pool.W, dtype=dtype, device=device)
    return (x, pool.kernel_size, pool.stride, pool.padding, 1, pool.ceil_mode), {}


def case_of(
    name: str, pool: Pool, batch: int, dtype: torch.dtype, device: torch.device, part: str
) -> Case:
    return pool_case(
        "max_pool", name, pool, batch, dtype, part,
        inputs=functools.partial(inputs_of, pool, batch, dtype, device),
        reference=max_pool_reference,
        variants=variants_of(F.max_pool2d, lambda: max_pool),
        bitwise=True,
    )  # fmt: skip


cases = cases_of(case_of, POOLS, QUICK, HOST)


def test_max_pool(measure):
    measure()
