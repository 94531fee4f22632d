"""Every shipped Triton configuration compiled for real targets, and what the machine code needs.

No GPU is involved: a subprocess without TRITON_INTERPRET compiles for sm_80, sm_90 and sm_100 with
the arguments' types, alignments and constants that a launch would have.
"""

from dataclasses import dataclass, field

import pytest

from cvkernels.ops.conv_bn_act import tiles
from tests.support.cases.conv_bn_act import RESNET50
from tests.support.tiers import asked
from tests.support.triton_compiled import compile_cases, compiled_once

pytest.importorskip("triton")

ARCHS = (80, 90, 100)
REGISTERS = 65536  # of one SM
SHARED = 228 * 1024  # of one SM of sm_90 and sm_100


@dataclass(frozen=True)
class Case:
    """One problem, compiled for one target."""

    name: str
    arch: int
    problem: dict = field(hash=False)
    config: tiles.Config | None = None
    precision: str = "ieee"
    nchw: bool = False  # of x and weight
    affine: bool = False  # the input's norm is a scale and a shift, as in frozen plans

    def __str__(self):
        return f"{self.name}-sm{self.arch}"


def staged_stem(K, R, pairs, size, act="relu", **options):
    """A first convolution of stride 2 in the layout that frozen plans give images."""
    geometry = {"stride": [2, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    shape = {"N": 128, "C": 8, "H": size, "W": size // 2, "K": K, "R": R, "S": pairs}
    dtype = {"dtype": "bfloat16", "act": act, "has_bn": False, "has_bias": True}
    return shape | geometry | dtype | options


def problem(C, K, R, size, stride=1, batch=128, dtype="bfloat16", act="relu", **options):
    geometry = {"stride": [stride] * 2, "padding": [R // 2] * 2, "dilation": [1, 1], "groups": 1}
    shape = {"N": batch, "C": C, "H": size, "W": size, "K": K, "R": R, "S": R}
    return shape | geometry | {"dtype": dtype, "act": act, "has_bn": True} | options


# every convolution of ResNet-50, and whether a shortcut is added: its name
CONVOLUTIONS = {(conv, name.endswith("conv3")): name for name, conv in RESNET50.items()}

# one problem per kernel for the sweep over configurations; the prologues are DenseNet's and SENet's
SWEEP = {
    "1x1": problem(256, 1024, 1, 14, has_residual=True),
    "spatial": problem(128, 128, 3, 28, has_residual=True),
    "filter_row": problem(3, 64, 7, 224, stride=2),
}
OTHERS = {
    "bn-prologue": problem(512, 128, 1, 28, has_input_bn=True),
    "gate-prologue": problem(672, 112, 1, 14, act="none", has_input_gate=True),
    "gate-prologue-112": problem(32, 16, 1, 112, act="none", has_input_gate=True),
    "bn-prologue-3x3": problem(128, 32, 3, 28, has_input_bn=True),
    "bn-prologue-n1": problem(512, 128, 1, 28, batch=1, has_input_bn=True),
    "gate-prologue-n1": problem(672, 112, 1, 14, batch=1, act="none", has_input_gate=True),
    "resnext-4": problem(128, 128, 3, 56, groups=32),
    "resnext-64": problem(2048, 2048, 3, 7, groups=32),
    "silu": problem(16, 96, 1, 112, act="silu"),
    "fp16": problem(256, 1024, 1, 14, dtype="float16", has_residual=True),
    "fp16-3x3": problem(128, 128, 3, 28, dtype="float16"),
    "fp16-stem": problem(3, 64, 7, 224, 2, dtype="float16"),
    "staged-stem": staged_stem(64, 7, 4, 230),
    "staged-stem-3x3": staged_stem(32, 3, 2, 226, "silu"),
    "staged-stem-n1": staged_stem(64, 7, 4, 230, N=1),
    # channels that are multiples of 8 alone
    "8-channels-out": problem(144, 24, 1, 56, act="none", has_input_gate=True),
    "8-channels-in": problem(24, 144, 1, 56, act="silu"),
    "8-channels-added": problem(240, 40, 1, 28, act="none", has_input_gate=True, has_residual=True),
    "8-channels-3x3": problem(24, 64, 3, 14),
    "8-channels-merged": problem(528, 296, 1, 14),
    "fp16-silu": problem(16, 96, 1, 112, act="silu", dtype="float16"),
    "early-residual": problem(64, 256, 1, 56, has_residual=True, has_bn=False, has_bias=True),
    "gated": problem(64, 256, 1, 56, has_output_gate=True, has_residual=True),
    "gated-frozen": problem(
        512, 2048, 1, 7, has_output_gate=True, has_residual=True, has_bn=False, has_bias=True
    ),
    "gated-alone": problem(64, 256, 1, 56, act="none", has_output_gate=True),
    "split": problem(512, 512, 3, 7, batch=1),
    "split-1x1": problem(2048, 512, 1, 7, batch=1),
}
# the frozen prologue, by the heuristic's tile and by those of the sweep that two programs share
AFFINE = {
    "frozen-bn-prologue": problem(512, 128, 1, 28, has_input_bn=True),
    "frozen-bn-prologue-fp16": problem(512, 128, 1, 28, has_input_bn=True, dtype="float16"),
    "frozen-bn-prologue-7": problem(1024, 128, 1, 7, has_input_bn=True),
}

# sizes and strides of 1 become constants, odd ones lose their alignment: these only must compile
AWKWARD = {
    "one-channel-in": problem(1, 24, 1, 9),
    "one-channel-out": problem(40, 1, 1, 9, batch=1),
    "one-to-one-3x3": problem(1, 1, 3, 9),
    "one-pixel": problem(40, 17, 1, 1, batch=1, has_residual=True),
    "odd": problem(17, 19, 3, 9, stride=2, has_residual=True, has_input_bn=True),
    "depthwise": problem(24, 24, 3, 9, groups=24, has_input_gate=True),
    "uneven-groups": problem(15, 21, 3, 9, groups=3),
    "grouped-1x1": problem(24, 48, 1, 9, groups=4),
}


def awkward_cases():
    return [
        Case(f"{name}-{'nchw' if nchw else 'nhwc'}", 90, p | {"dtype": dtype}, nchw=nchw)
        for name, p in AWKWARD.items()
        for dtype, nchw in (("float16", False), ("float16", True), ("float32", True))
    ]


def all_cases():
    cases = []
    for arch in ARCHS:
        for (conv, residual), name in CONVOLUTIONS.items():
            # those of frozen plans are compiled for sm_90 in test_launches
            for batch in (1, 128) if arch == 90 else (128,):
                p = problem(
                    conv.C, conv.K, conv.R, conv.H, conv.stride, batch, has_residual=residual
                )
                cases.append(Case(f"resnet50-{name}-n{batch}", arch, p))
            if arch != 90:
                frozen = p | {"has_bn": False, "has_bias": True}  # a folded norm
                cases.append(Case(f"resnet50-{name}-frozen", arch, frozen))
        for name, p in OTHERS.items():
            cases.append(Case(name, arch, p))
        for name, p in AFFINE.items():
            cases.append(Case(name, arch, p | {"has_bn": False, "has_bias": True}, affine=True))
        cases.append(Case("stem-nchw", arch, problem(3, 64, 7, 224, 2), nchw=True))
        for (kernel, itemsize), configs in tiles.CONFIGS.items():
            for config in configs:
                if arch == 80 and tiles.alone(config.block_m, config.block_n):
                    continue
                size = f"{config.block_m}x{config.block_n}x{config.block_k}-{config.num_stages}"
                precisions = ("tf32", "ieee") if itemsize == 4 else ("ieee",)
                for precision in precisions:
                    dtype = "bfloat16" if itemsize == 2 else f"float32-{precision}"
                    packed = kernel == "filter_row" and config.num_stages == 1
                    p = staged_stem(64, 7, 4, 230) if packed else SWEEP[kernel]
                    p = p | {"dtype": dtype.partition("-")[0]}
                    name = f"{kernel}-{size}-{dtype}"
                    cases.append(Case(name, arch, p, config, precision))
    return cases


CASES = all_cases()


def exact_float32(case):
    return case.problem["dtype"] == "float32" and case.precision == "ieee"


def prologue(case):
    return case.problem.get("has_input_bn") or case.problem.get("has_input_gate")


few = pytest.mark.few(40, together=True)


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """Case -> what inspect_launch found."""
    cases = asked(request, "case")
    return dict(zip(cases, compiled_once("conv_bn_act", cases, tmp_path_factory), strict=True))


def test_awkward_shapes_compile():
    assert len(compile_cases("conv_bn_act", awkward_cases())) == 3 * len(AWKWARD)


@few
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills(case, compiled):
    found = compiled[case]
    assert (found["stack"], found["local"]) == (0, 0), found


@few
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensor_cores(case, compiled):
    """wgmma on Hopper and tcgen05 on Blackwell; float32 without TF32 has no tensor core."""
    found = compiled[case]
    if exact_float32(case):
        assert found["mma"] == found["wgmma"] == found["tcgen05"] == 0
    else:
        assert found[{80: "mma", 90: "wgmma", 100: "tcgen05"}[case.arch]] > 0, found


@few
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fences_stand_between_copies_and_tensor_cores(case, compiled):
    assert compiled[case]["unfenced"] == 0


@few
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accesses_are_16_bytes_wide(case, compiled):
    found = compiled[case]
    assert found["store_16"] == found["store"], found
    # a split reduction's second launch adds it
    if case.problem.get("has_residual") and found["meta"].get("SPLIT_K", 1) == 1:
        assert found["load_16"] > 0, found
    if case.problem["C"] >= 16:
        assert found["async_16"] > 0, found
    # weights of several groups in a tile and the vectors of a prologue are narrow
    if case.problem["C"] >= 16 and case.problem["groups"] == 1 and not prologue(case):
        assert found["async_narrow"] == found["load_2"] == 0, found


# mma.sync, and float32 without TF32, take more registers
SHARED_SM = [case for case in CASES if case.arch >= 90 and not exact_float32(case)]


def alone(found):
    """Whether a program's tile is one that has an SM for itself."""
    return tiles.alone(found["meta"]["BLOCK_M"], found["meta"]["BLOCK_N"])


@few
@pytest.mark.parametrize("case", SHARED_SM, ids=str)
def test_two_programs_fit_an_sm(case, compiled):
    """So that one program's epilogue overlaps another's loop."""
    found = compiled[case]
    threads, programs = 32 * found["meta"]["num_warps"], 1 if alone(found) else 2
    assert programs * threads * found["registers"] <= REGISTERS, found
    assert programs * (found["shared"] + 1024) <= SHARED, found
