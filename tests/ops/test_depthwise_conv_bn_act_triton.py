"""How the Triton kernel of depthwise_conv_bn_act is tiled, and its code for real GPUs.

A subprocess compiles it for sm_80, sm_90 and sm_100, where no GPU is involved.
"""

import functools
from dataclasses import replace

import pytest
import torch

from tests.support.cases import depthwise_conv_bn_act
from tests.support.cases.depthwise_conv_bn_act import NETWORKS, make_inputs
from tests.support.numerics import assert_matches
from tests.support.tiers import asked
from tests.support.triton_compiled import compile_cases, compiled_once

pytest.importorskip("triton")

from cvkernels.ops.depthwise_conv_bn_act import triton as depthwise_launches
from cvkernels.ops.depthwise_conv_bn_act.problem import problem_of
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from cvkernels.ops.depthwise_conv_bn_act.tiling import Tiling, tiling

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
    args, options = make_inputs(case, device=device)

    def tiled(x, weight, bias, bn, **options):
        problem = problem_of(x, weight, bias, bn, **options, squeeze=True)
        out, sums = torch.full_like(x, torch.nan), x.new_full(x.shape[:2], torch.nan)
        rsc = weight.squeeze(1).permute(1, 2, 0)
        depthwise_launches.run(problem, x, rsc, bias, bn, out, sums, tiles)
        return out, sums

    reference = functools.partial(depthwise_conv_bn_act_reference, squeeze=True)
    assert_matches(tiled, reference, args, options)


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


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_large_batch_needs_no_second_kernel_for_its_sums(shape, capability):
    problem = depthwise_conv_bn_act.problem_of(shape, 128)
    assert tiling(problem, capability).bands == 1
    alone = tiling(replace(problem, N=1), capability)
    assert alone.bands > 1 and alone.band_rows * alone.bands >= problem.P
    assert alone.programs(replace(problem, N=1)) >= 40


def test_a_launch_that_cannot_be_indexed_is_refused():
    problem = replace(depthwise_conv_bn_act.problem_of((1152, 7, 3, 1), 1), N=2**31)
    with pytest.raises(ValueError, match="depthwise_conv_bn_act: .* split the batch"):
        tiling(problem, (9, 0))


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    cases = asked(request, "case")
    found = compiled_once("depthwise_conv_bn_act", cases, tmp_path_factory)
    return {case_id(c): f for c, f in zip(cases, found, strict=True)}


@pytest.mark.full
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
