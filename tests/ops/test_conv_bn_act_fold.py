"""The Triton kernel that folds a norm into a convolution's weight, against the fold in float64."""

import pytest
import torch

pytest.importorskip("triton")

from cvkernels.ops.common.norm import BatchNormParams, fold
from cvkernels.ops.conv_bn_act import triton_fold
from tests.support.triton_compiled import compile_cases

SHAPES = [(64, 64, 3, 3), (24, 3, 7, 7), (5, 17, 1, 3), (1, 1, 1, 1), (3, 600, 3, 3)]
WITHOUT = {
    "all": (),
    "bias": ("bias",),
    "affine": ("weight", "bias"),
    "statistics": ("mean", "var"),
}


def make(shape, dtype, device, vectors=torch.float32, without=()):
    weight = torch.randn(shape, device=device).to(dtype)
    values = dict(
        zip(("weight", "bias", "mean"), torch.randn(3, shape[0], device=device), strict=True)
    )
    values["var"] = torch.rand(shape[0], device=device) + 0.1
    given = {k: None if k in without else v.to(vectors) for k, v in values.items()}
    return weight, BatchNormParams(**given, eps=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_fold_in_float64(shape, dtype, memory_format, device):
    weight, bn = make(shape, dtype, device)
    weight = weight.contiguous(memory_format=memory_format)
    bias = torch.randn(shape[0], device=device)
    actual, expected = triton_fold.fold(weight, bias, bn), fold(weight, bias, bn)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        # eps is a float32 in the kernel, and a rounding may fall to the other side
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=eps, atol=eps)


@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT.keys())
@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=str)
def test_parts_may_be_absent(without, vectors, device):
    weight, bn = make((24, 8, 3, 3), torch.bfloat16, device, vectors, without)
    for actual, expected in zip(
        triton_fold.fold(weight, None, bn), fold(weight, None, bn), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_a_spill(arch):
    pytest.importorskip("benchmarks.machine_code")
    cases = [
        {"arch": arch, "shape": shape, "dtype": dtype}
        for shape in SHAPES
        for dtype in ("bfloat16", "float32")
    ]
    for found in compile_cases("fold", cases):
        assert found["stack"] == found["local"] == 0, found
