"""EfficientNet-B0's blocks in eval: torchvision's modules, eager and compiled, and ours.

The blocks of each stage that differ: expansion, depthwise convolution, squeeze-and-excitation,
projection, and the addition where there is one.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

import cvkernels
from benchmarks.bench_models import networks_of
from benchmarks.harness.case import Case, Conditions, compiled

STAGES = range(1, 8)
QUICK = ("1.0", "4.1", "6.1")


@functools.cache
def shapes() -> dict[str, tuple[int, int, int]]:
    """C, H, W of the inputs at 224 x 224 of each stage's first two blocks, by "stage.block"."""
    with torch.device("meta"):
        features = cvkernels.create_model("efficientnet_b0").eval().features
        x = features[0](torch.empty(1, 3, 224, 224))
        found = {}
        for stage in STAGES:
            for index, block in enumerate(features[stage]):
                if index < 2:
                    found[f"{stage}.{index}"] = tuple(x.shape[1:])
                x = block(x)
    return found


def traffic(name: str, batch: int, dtype: torch.dtype) -> int:
    """Bytes that the block's three kernels read and write, as ``explain`` counts them."""
    stage, index = map(int, name.split("."))
    with torch.device("meta"):
        block = cvkernels.create_model("efficientnet_b0").eval().to(dtype).features[stage][index]
        x = torch.empty(batch, *shapes()[name], dtype=dtype).to(memory_format=torch.channels_last)
        totals = cvkernels.explain(block, x).totals
    return totals["bytes_read"] + totals["bytes_written"]


def case_of(name: str, at: Conditions) -> Case:
    C, H, W = shapes()[name]
    stage, index = map(int, name.split("."))

    def block_of(network: str) -> nn.Module:
        networks = networks_of("efficientnet_b0", at.dtype, at.device)
        return getattr(networks, network).features[stage][index]

    def reference(x: Tensor) -> Tensor:
        return block_of("exact" if x.dtype == torch.float64 else "stock")(x)

    return at.case(
        "mbconv",
        name,
        f"{at.batch}x{C}x{H}x{W}",
        inputs=lambda: ((at.image(C, H, W),), {}),
        reference=reference,
        variants={
            "eager": lambda: block_of("stock"),
            "compile": lambda: compiled(copy.deepcopy(block_of("stock"))),
            "cvkernels": lambda: block_of("ours"),
        },
        bytes=traffic(name, at.batch, at.dtype),
    )


def cases(
    device: torch.device, dtypes: list[torch.dtype], batch: int, quick: bool = False
) -> list[Case]:
    names = [name for name in shapes() if name in QUICK or not quick]
    return [case_of(name, Conditions(batch, dtype, device)) for dtype in dtypes for name in names]


def test_mbconv(measure):
    measure()
