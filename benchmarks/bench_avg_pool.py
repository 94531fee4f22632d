"""avg_pool against PyTorch's, eager and compiled, on the pools of DenseNet's transitions.

There is no backward row: with a gradient the op runs PyTorch's own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.harness.case import Case, batch_norm, cases_of, image, variants_of
from benchmarks.harness.pool import Pool, pool_case
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


def inputs_of(
    pool: Pool, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple, dict]:
    x = image(batch, pool.C, pool.H, pool.W, dtype=dtype, device=device)
    bn = batch_norm(pool.C, device) if pool.norm else None
    return (x, pool.kernel_size, pool.stride, pool.padding, bn), {}


def reference(x: Tensor, kernel_size: int, stride: int, padding: int, bn: BatchNormParams | None):
    return avg_pool_reference(x, kernel_size, stride, padding, input_bn=bn)


def fused(x: Tensor, kernel_size: int, stride: int, padding: int, bn: BatchNormParams | None):
    return avg_pool(x, kernel_size, stride, padding, input_bn=bn)


def case_of(
    name: str, pool: Pool, batch: int, dtype: torch.dtype, device: torch.device, part: str
) -> Case:
    return pool_case(
        "avg_pool", name, pool, batch, dtype, part,
        inputs=functools.partial(inputs_of, pool, batch, dtype, device),
        reference=reference,
        variants=variants_of(reference, lambda: fused),
    )  # fmt: skip


cases = cases_of(case_of, POOLS, QUICK, HOST)


def test_avg_pool(measure):
    measure()
