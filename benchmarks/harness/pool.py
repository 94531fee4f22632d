"""What the benchmarks of max_pool and avg_pool share: shapes, compulsory bytes, and the cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.harness.case import Case, Conditions, cases_of, variants_of
from cvkernels.ops.common.traffic import touched_positions


class Pool(NamedTuple):
    """x[N, C, H, W] and a square window; C, H and W as at images of 224 x 224."""

    C: int
    H: int
    W: int
    kernel_size: int
    stride: int
    padding: int = 0
    ceil_mode: bool = False
    norm: bool = False  # a batch norm and a ReLU in front


def traffic(pool: Pool, batch: int, dtype: torch.dtype) -> int:
    """Every element of x that some window holds, read once; the output written once."""
    outputs, inputs = [], []
    window = (pool.kernel_size, pool.stride, pool.padding)
    for size in (pool.H, pool.W):
        span = size + 2 * pool.padding - pool.kernel_size
        windows = (math.ceil if pool.ceil_mode else math.floor)(span / pool.stride) + 1
        if pool.ceil_mode and (windows - 1) * pool.stride >= size + pool.padding:
            windows -= 1
        outputs.append(windows)
        inputs.append(touched_positions(size, *window, 1, windows))
    elements = batch * pool.C * (math.prod(inputs) + math.prod(outputs))
    return elements * dtype.itemsize + 4 * 4 * pool.C * pool.norm


def pool_cases(
    op: str,
    pools: Mapping[str, Pool],
    quick: Container[str],
    host: tuple[str, Pool],
    *,
    arguments_of: Callable[[Pool, torch.device], tuple],
    stock: Callable,
    reference: Callable,
    ours: Callable,
    **options: Any,
) -> Callable[..., list[Case]]:
    """The ``cases`` of a pool; ``arguments_of`` has what the three functions take after x."""

    def case_of(name: str, pool: Pool, at: Conditions) -> Case:
        window = f"{pool.kernel_size}x{pool.kernel_size}/{pool.stride}"
        norm = " of relu(norm)" if pool.norm else ""
        return at.case(
            op,
            name,
            f"{at.batch}x{pool.C}x{pool.H}x{pool.W} {window}{norm}",
            inputs=lambda: ((at.image(*pool[:3]), *arguments_of(pool, at.device)), {}),
            reference=reference,
            variants=variants_of(stock, lambda: ours),
            bytes=traffic(pool, at.batch, at.dtype),
            **options,
        )

    return cases_of(case_of, pools, quick, host)
