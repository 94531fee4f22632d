"""max_pool against torch.nn.functional.max_pool2d, eager and compiled, on the networks' own pools.

There is no backward row: with a gradient the op runs PyTorch's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness.pool import Pool, pool_cases
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


def arguments_of(pool: Pool, device: torch.device) -> tuple:
    return (pool.kernel_size, pool.stride, pool.padding, 1, pool.ceil_mode)


cases = pool_cases(
    "max_pool", POOLS, QUICK, HOST, arguments_of=arguments_of, stock=F.max_pool2d,
    reference=max_pool_reference, ours=max_pool, bitwise=True,
)  # fmt: skip


def test_max_pool(measure):
    measure()
