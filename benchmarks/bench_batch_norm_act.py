"""batch_norm_act against stock batch norm with ReLU in training, forward and backward.

``python -m benchmarks.bench_batch_norm_act [--quick]`` prints the table (``--help``: options),
``pytest benchmarks/bench_batch_norm_act.py`` gives the rows to pytest-benchmark.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import command_line, harness
from benchmarks.harness import Case
from cvkernels.functional import batch_norm_act
from cvkernels.ops.batch_norm_act.reference import batch_norm_act_reference


class Norm(NamedTuple):
    """x[N, C, H, W], a prefix of ``total`` channels; H and W as at images of 224 x 224."""

    C: int
    H: int
    W: int
    total: int


NORMS = {
    "densenet121-norm0": Norm(64, 112, 112, 64),
    "densenet121-block1-norm1": Norm(160, 56, 56, 256),
    "densenet121-block1-norm2": Norm(128, 56, 56, 128),
    "densenet121-block3-norm1": Norm(736, 14, 14, 1024),
    "googlenet-3a-branch2": Norm(96, 28, 28, 96),
    "odd": Norm(19, 31, 45, 19),  # nothing divides a vector
}
QUICK = ("densenet121-block1-norm1", "densenet121-block1-norm2", "odd")
HOST = ("one-pixel", Norm(8, 1, 1, 8))


def traffic(norm: Norm, batch: int, dtype: torch.dtype, part: str) -> int:
    """Forward: x read for its statistics and to be normalised, out written. Backward, sums and
    gradient: grad and x read twice, d x written."""
    elements = batch * norm.C * norm.H * norm.W
    return (3 if part == "forward" else 5) * elements * dtype.itemsize


def inputs_of(
    norm: Norm, batch: int, dtype: torch.dtype, device: torch.device, grad: bool
) -> tuple[tuple, dict]:
    buffer = torch.randn(batch, norm.total, norm.H, norm.W, device=device).to(dtype)
    x = buffer.contiguous(memory_format=torch.channels_last)[:, : norm.C]
    weight, bias = torch.randn(2, norm.C, device=device)
    return (x.requires_grad_(grad), weight, bias), {}


def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm_act_reference(x, weight, bias, 1e-5, "relu")[0]


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, True)
    return torch.nn.functional.relu(y, inplace=True)


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm_act(x, weight, bias, act="relu").out


def case_of(
    name: str, norm: Norm, batch: int, dtype: torch.dtype, device: torch.device, part: str
) -> Case:
    return Case(
        op="batch_norm_act",
        name=name,
        shape=f"{batch}x{norm.C}x{norm.H}x{norm.W} of {norm.total}",
        dtype=dtype,
        inputs=functools.partial(inputs_of, norm, batch, dtype, device, part == "backward"),
        reference=stock,
        variants={
            "eager": lambda: eager,
            "compile": lambda: harness.compiled(eager),
            "cvkernels": lambda: fused,
        },
        bytes=None if part == "host" else traffic(norm, batch, dtype, part),
        part=part,
    )


def cases(
    device: torch.device, dtypes: list[torch.dtype], batch: int, quick: bool = False
) -> list[Case]:
    norms = {name: norm for name, norm in NORMS.items() if name in QUICK or not quick}
    made = []
    for dtype in dtypes:
        for part in ("forward", "backward"):
            made += [
                case_of(name, norm, batch, dtype, device, part) for name, norm in norms.items()
            ]
        made.append(case_of(*HOST, 2, dtype, device, part="host"))
    return made


def test_batch_norm_act(measure):
    measure()


if __name__ == "__main__":
    raise SystemExit(command_line.main("batch_norm_act", cases))
