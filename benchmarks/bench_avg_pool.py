"""avg_pool against PyTorch's, eager and compiled, on the pools of DenseNet's transitions.

There is no backward row: with a gradient the op runs PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.case import batch_norm
from benchmarks.harness.pool import Pool, pool_cases
from cvkernels.functional import BatchNormParams, avg_pool
from cvkernels.ops.avg_pool.reference import avg_pool_reference

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


def arguments_of(pool: Pool, device: torch.device) -> tuple:
    bn = batch_norm(pool.C, device) if pool.norm else None
    return (pool.kernel_size, pool.stride, pool.padding, bn)


def reference(x: Tensor, kernel_size: int, stride: int, padding: int, bn: BatchNormParams | None):
    return avg_pool_reference(x, kernel_size, stride, padding, input_bn=bn)


def fused(x: Tensor, kernel_size: int, stride: int, padding: int, bn: BatchNormParams | None):
    return avg_pool(x, kernel_size, stride, padding, input_bn=bn)


cases = pool_cases(
    "avg_pool", POOLS, QUICK, HOST, arguments_of=arguments_of, stock=reference,
    reference=reference, ours=fused,
)  # fmt: skip


def test_avg_pool(measure):
    measure()
