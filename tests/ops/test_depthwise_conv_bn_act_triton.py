"""The Triton kernel of depthwise_conv_bn_act through its launcher, and its code for real GPUs.

Without a GPU the kernel runs in the interpreter; a subprocess compiles it for sm_80, sm_90 and
sm_100, where no GPU is involved.
"""

from dataclasses import replace

import pytest
import torch

from tests.support.cases.conv_bn_act import make_bn
from tests.support.cases.depthwise_conv_bn_act import NETWORKS
from tests.support.numerics import assert_close_as_eager, map_floats
from tests.support.triton_compiled import compile_cases, compiled_once

pytest.importorskip("triton")

from cvkernels.functional import DerivedWeights, depthwise_conv_bn_act
from cvkernels.ops.depthwise_conv_bn_act import triton as depthwise_launches
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem, problem_of
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from cvkernels.ops.depthwise_conv_bn_act.tiling import Tiling, tiling

# the interpreter cuts a bfloat16 off where a GPU rounds it
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()

# N, C, H, W, kernel, stride, padding, dilation
CASES = {
    "49-pixels": (2, 24, 7, 7, 3, 1, 1, 1),
    "channels-24": (1, 24, 6, 9, 5, 1, 2, 1),
    "channels-not-8": (2, 37, 9, 5, 3, 2, 1, 1),
    "wide": (1, 16, 3, 130, 3, 1, 1, 1),  # more columns than a tile has
    "tall": (1, 8, 33, 4, 5, 2, 2, 1),
    "one-channel": (3, 1, 6, 8, 3, 1, 1, 1),
    "one-pixel": (2, 20, 1, 1, 3, 1, 1, 1),
    "unpadded": (1, 40, 8, 9, 5, 2, 0, 1),
    "mixed": (1, 18, 9, 11, 3, (2, 1), (3, 0), (1, 2)),
    "dilated": (1, 12, 13, 10, 3, 1, 2, 2),
    "dilated-5x5-stride-3": (1, 10, 17, 12, 5, 3, 4, (2, 3)),
    "empty-batch": (0, 24, 7, 7, 3, 1, 1, 1),
}


def make_inputs(case, dtype, memory_format, device):
    N, C, H, W, kernel, stride, padding, dilation = case
    x = torch.randn(N, C, H, W, device=device).to(dtype).contiguous(memory_format=memory_format)
    weight = (torch.randn(C, 1, kernel, kernel, device=device) / kernel).to(dtype)
    args = (x, weight, torch.randn(C, device=device), make_bn(C, device=device))
    return args, {"stride": stride, "padding": padding, "dilation": dilation, "act": "silu"}


def check(op, args, options):
    reference = depthwise_conv_bn_act_reference
    exact = reference(*map_floats(torch.Tensor.double, args), **options, squeeze=True)
    eager = reference(*args, **options, squeeze=True)
    for ours, theirs, truth in zip(op(*args, **options), eager, exact, strict=True):
        assert_close_as_eager(ours, theirs, truth)


def by_triton(*args, **options):
    return depthwise_conv_bn_act(*args, **options, squeeze=True, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(case, dtype, memory_format, device):
    args, options = make_inputs(case, dtype, memory_format, device)
    check(by_triton, args, options)


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
def test_every_activation(act, device):
    args, options = make_inputs(CASES["channels-24"], torch.float16, torch.channels_last, device)
    check(by_triton, args, options | {"act": act})


def test_vectors_are_optional(device):
    args, options = make_inputs(CASES["49-pixels"], torch.float32, torch.channels_last, device)
    x, weight, bias, bn = args
    check(by_triton, (x, weight, None, None), options)
    check(by_triton, (x, weight, bias, bn._replace(weight=None, bias=None)), options)
    check(by_triton, (x, weight, None, bn._replace(mean=None, var=None)), options)


TILINGS = {
    "whole-map": Tiling(2, 16, 16, 1, 12, 1),
    "bands": Tiling(2, 8, 16, 3, 4, 1),
    "uneven-bands": Tiling(3, 16, 32, 2, 9, 1),
    "one-row": Tiling(1, 4, 8, 11, 1, 1),
    "wider-than-the-map": Tiling(4, 64, 64, 1, 12, 4),
}


@pytest.mark.parametrize("tiles", TILINGS.values(), ids=TILINGS.keys())
def test_any_tiling_gives_the_same(tiles, device):
    """Bands are added in their order; the sums are those of the whole map."""
    case = (2, 40, 11, 13, 3, 1, 1, 1)
    args, options = make_inputs(case, torch.float32, torch.channels_last, device)

    def tiled(x, weight, bias, bn, **options):
        problem = problem_of(x, weight, bias, bn, **options, squeeze=True)
        out, sums = torch.full_like(x, torch.nan), x.new_full(x.shape[:2], torch.nan)
        rsc = weight.squeeze(1).permute(1, 2, 0)
        depthwise_launches.run(problem, x, rsc, bias, bn, out, sums, tiles)
        return out, sums

    check(tiled, args, options)


def test_channel_slices_and_cached_weights(device):
    args, options = make_inputs(CASES["49-pixels"], torch.float32, torch.channels_last, device)
    x = torch.randn(2, 48, 7, 7, device=device).contiguous(memory_format=torch.channels_last)
    check(by_triton, (x[:, 16:40], *args[1:]), options)
    cache = DerivedWeights()
    for _ in range(2):
        out, sums = by_triton(*args, **options, cache=cache)
        expected, expected_sums = by_triton(*args, **options)
        assert torch.equal(out, expected) and torch.equal(sums, expected_sums)
        args[1].mul_(2)


def test_nan_and_infinity_come_through(device):
    (x, weight, *_), options = make_inputs(
        CASES["49-pixels"], torch.float32, torch.channels_last, device
    )
    x[0, 3, 2, 2], x[1, 4, 5, 5] = torch.nan, -torch.inf
    for act in ("none", "relu", "relu6", "silu"):
        out, sums = by_triton(x, weight, **options | {"act": act})
        expected, expected_sums = depthwise_conv_bn_act_reference(
            x, weight, **options | {"act": act}, squeeze=True
        )
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(sums.isnan(), expected_sums.isnan())
        assert expected.isnan().any()


def test_gradients_go_through_both_results(device):
    args, options = make_inputs(CASES["channels-24"], torch.float32, torch.channels_last, device)
    leaves = [args[0], args[1], args[2], args[3].weight, args[3].bias]
    grads = []
    for op in (by_triton, lambda *a, **k: depthwise_conv_bn_act_reference(*a, **k, squeeze=True)):
        for leaf in leaves:
            leaf.requires_grad_()
        out, sums = op(*args, **options)
        cotangent = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        loss = (out * cotangent).sum() + sums.square().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    x = torch.zeros(36, 1024, 256, 256, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1, -1, -1, -1] = 1
    weight = torch.ones(1024, 1, 3, 3, dtype=torch.float16, device="cuda")
    out, sums = depthwise_conv_bn_act(x, weight, padding=1, squeeze=True)
    assert out[-1, -1, -2:, -2:].sum() == 4 and sums.sum() == 4


# How the heuristic tiles, and what the compiler makes of it

SHAPES = list(NETWORKS.values())
CASES_TO_COMPILE = [
    {"shape": shape, "batch": batch, "dtype": dtype, "arch": arch}
    for arch in (80, 90, 100)
    for shape in SHAPES
    for batch in (1, 128)
    for dtype in ("bfloat16", "float32")
    # other dtypes and architectures on a third of the shapes: a shape takes half a second
    if (dtype == "bfloat16" and arch == 90)
    or SHAPES.index(shape) % 3 == 0
    # ... but float32 wherever its registers are limited
    or (dtype == "float32" and arch == 90 and shape[2:] != (3, 1))
]


def case_id(case):
    return "{shape}-n{batch}-{dtype}-sm{arch}".format(**case)


def depthwise_problem(shape, batch, dtype=torch.bfloat16):
    C, size, kernel, stride = shape
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1))
    return DepthwiseProblem(
        batch, C, size, size, C, kernel, kernel, *geometry, C, dtype, "silu", has_bn=True,
        squeeze=True,
    )  # fmt: skip


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_large_batch_needs_no_second_kernel_for_its_sums(shape, capability):
    problem = depthwise_problem(shape, 128)
    assert tiling(problem, capability).bands == 1
    alone = tiling(replace(problem, N=1), capability)
    assert alone.bands > 1 and alone.band_rows * alone.bands >= problem.P
    assert alone.programs(replace(problem, N=1)) >= 40


def test_a_launch_that_cannot_be_indexed_is_refused():
    problem = replace(depthwise_problem((1152, 7, 3, 1), 1), N=2**31)
    with pytest.raises(ValueError, match="depthwise_conv_bn_act: .* split the batch"):
        tiling(problem, (9, 0))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    found = compiled_once("depthwise_conv_bn_act", CASES_TO_COMPILE, tmp_path_factory)
    return {case_id(c): f for c, f in zip(CASES_TO_COMPILE, found, strict=True)}


@pytest.mark.parametrize("case", CASES_TO_COMPILE, ids=case_id)
def test_code_has_no_spill_and_wide_accesses(case, compiled):
    found = compiled[case_id(case)]
    assert found["stack"] == found["local"] == 0, found
    # one store is that of the sums, once for a program
    assert found["store_16"] == found["store"] - 1, found
    assert found["load_16"] > 0 and found["load_2"] == 0, found


def test_channels_that_16_does_not_divide_have_wide_accesses():
    """EfficientNet-B3's first blocks have 40: packs of 8 are aligned all the same."""
    cases = [
        {"shape": (40, 112, 3, 1), "batch": 1, "dtype": dtype, "arch": 90}
        for dtype in ("bfloat16", "float32")
    ]
    for found in compile_cases("depthwise_conv_bn_act", cases):
        assert found["stack"] == found["local"] == found["load_2"] == 0, found
        assert found["load_16"] > 0 and found["store_16"] == found["store"] - 1, found


# two programs on an SM hide each other's loads; Blackwell's compiler takes more registers
TWO_ON_AN_SM = [c for c in CASES_TO_COMPILE if c["arch"] == 90 and c["shape"][2] == 3]


@pytest.mark.parametrize("case", TWO_ON_AN_SM, ids=case_id)
def test_two_programs_fit_an_sm(case, compiled):
    found = compiled[case_id(case)]
    assert 2 * 32 * found["meta"]["num_warps"] * found["registers"] <= 65536, found
