"""Every instruction set that the processor has, and every algorithm, not only those "auto" takes.

What a set's own instructions compute is also plain C++, which the other sets run: so all index
arithmetic is tested on every machine.
"""

import itertools

import pytest
import torch

from cvkernels import extension
from cvkernels.freeze.backends import possible
from cvkernels.functional import depthwise_conv_bn_act
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.conv_bn_act import native
from cvkernels.ops.conv_bn_act.problem import Parameters, problem_of
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from tests.support.cases import depthwise_conv_bn_act as depthwise_cases
from tests.support.cases.conv_bn_act import ODD, TILED, Conv, add_residual, make_bn, make_inputs
from tests.support.numerics import assert_matches
from tests.support.surroundings import assert_bits_do_not_depend_on_threads, each_instruction_set

pytestmark = pytest.mark.skipif(
    not extension.has("cpu"), reason="the compiled extension is missing"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALGORITHMS = {
    "direct": native.DIRECT, "pairs": native.PAIRS, "tiles": native.TILES,
    **{f"F(2x{width})": width for width in native.WINOGRAD},
}  # fmt: skip
CONVS = {
    **{name: conv for name, conv in (ODD | TILED).items() if conv.groups == 1},
    "many-channels": Conv(48, 9, 11, 150, 3, 3, 1, 1), "deep": Conv(300, 3, 5, 70),
    "wide-image": Conv(3, 20, 70, 24, 5, 5, 2, 2), "one-channel": Conv(1, 9, 8, 16, 3, 3, 1, 1),
    "two-rows-of-pixels": Conv(3, 4, 300, 16, 3, 3, 1, 1, N=1),
}  # fmt: skip


instruction_set = each_instruction_set("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def by(algorithm):
    """The convolution by one algorithm; what that cannot run is skipped."""

    def run(x, weight, bias, bn, residual=None, input_bn=None, input_gate=None, output_gate=None,
            **options):  # fmt: skip
        data = {"residual": residual, "input_bn": input_bn, "input_gate": input_gate}
        problem = problem_of(x, weight, bias, bn, **options, **data, output_gate=output_gate)
        if algorithm not in native.algorithms(problem):
            pytest.skip("the algorithm is for other convolutions")
        call = Call(x, "cpu", "native", once=True)
        parameters = Parameters(weight, bias, bn, input_bn)
        convolve = native.plan(problem, call, parameters, (), None, algorithm)
        return convolve(x, residual, input_gate, output_gate=output_gate)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
def test_convolutions(conv, algorithm, dtype, memory_format, instruction_set):
    args, options = make_inputs(conv, dtype, memory_format)
    assert_matches(
        by(ALGORITHMS[algorithm]), conv_bn_act_reference, args, options | {"act": "relu"}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["none", "relu6", "silu"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("conv", ["1x1", "channels-not-8", "3x3", "stem-3x3", "many-channels"])
def test_what_surrounds_the_products(conv, algorithm, act, dtype, instruction_set):
    conv = CONVS[conv]
    args, options = make_inputs(conv, dtype, torch.channels_last)
    options = add_residual(args, options) | {"act": act}
    options["output_gate"] = torch.rand(conv.N, conv.K).to(dtype)
    if ALGORITHMS[algorithm] not in native.WINOGRAD:
        options["input_bn"] = make_bn(conv.C)
        options["input_gate"] = torch.rand(conv.N, conv.C).to(dtype)
    assert_matches(by(ALGORITHMS[algorithm]), conv_bn_act_reference, args, options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ["direct", "pairs", "tiles"])
@pytest.mark.parametrize("C", [3, 17, 18, 32])
def test_nan_and_infinity_stay_in_their_windows(C, algorithm, dtype, value, instruction_set):
    """Also those beside the half of a pair, and beside a row of an image."""
    x = torch.randn(2, C, 7, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, C - 1, 2, 3] = value
    weight = torch.randn(20, C, 3, 3).to(dtype)
    y = by(ALGORITHMS[algorithm])(x, weight, None, None, padding=1, act="none")
    inside = torch.zeros(2, 20, 7, 8, dtype=torch.bool)
    inside[0, :, 1:4, 2:5] = True
    assert torch.equal(y.isfinite(), ~inside)


@pytest.mark.parametrize("algorithm", ["pairs", "tiles"])
@pytest.mark.parametrize("C", [3, 17, 32])
def test_bits_of_pairs_do_not_depend_on_threads(C, algorithm):
    args, options = make_inputs(Conv(C, 15, 17, 80, 3, 3, 1, 1), torch.bfloat16)
    assert_bits_do_not_depend_on_threads(lambda: [by(ALGORITHMS[algorithm])(*args, **options)])


@pytest.mark.parametrize("algorithm", native.INSTRUCTIONS)
def test_missing_instructions_are_not_chosen_from(algorithm):
    args, options = make_inputs(Conv(64, 14, 14, 64), torch.bfloat16, torch.channels_last)
    problem, cpu = problem_of(*args, **options), torch.device("cpu")
    name = {native.PAIRS: "native pairs", native.TILES: "native tiles"}[algorithm]
    with extension.limited_to("baseline"):
        assert name not in [backend.name for backend in possible(problem, cpu)]
    has = native.INSTRUCTIONS[algorithm] in extension.instruction_sets()
    assert has == (name in [backend.name for backend in possible(problem, cpu)])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_number_is_read_and_written_as_it_is(dtype, instruction_set):
    """Denormal numbers, infinities and zeros of both signs; a NaN stays one. Through a filter of 1,
    by floats."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers.view(1, 16, 64, 64).contiguous(memory_format=torch.channels_last)
    weight = torch.eye(16).to(dtype)[:, :, None, None]
    finite = torch.where(x.isfinite(), x, 1)
    y = by(native.DIRECT)(finite, weight, None, None, act="none")
    assert torch.equal(y, finite + 0)  # -0 + 0 is 0
    gated = depthwise_conv_bn_act(
        x, torch.nn.functional.pad(torch.ones(16, 1, 1, 1, dtype=dtype), (1, 1, 1, 1)),
        padding=1, act="none",
    )  # fmt: skip
    alone = ~torch.nn.functional.max_pool2d((~x.isfinite()).float(), 3, 1, 1).bool()
    assert torch.equal(gated[alone], (x + 0)[alone])


DEPTHWISE = list(depthwise_cases.CASES.items())[:8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("case", dict(DEPTHWISE).values(), ids=dict(DEPTHWISE).keys())
def test_depthwise_convolutions(case, act, dtype, instruction_set):
    args, options = depthwise_cases.make_inputs(case, dtype, torch.channels_last)
    options = options | {"act": act, "squeeze": True}
    assert_matches(depthwise_conv_bn_act, depthwise_conv_bn_act_reference, args, options)


def test_sets_are_in_order_and_can_be_limited():
    sets = extension.instruction_sets()
    order = ("baseline", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
    assert sets == tuple(name for name in order if name in sets)
    for a, b in itertools.pairwise(sets):
        with extension.limited_to(a):
            assert extension.instruction_sets()[-1] == a
        assert b in extension.instruction_sets()
    assert extension.instruction_sets() == sets
    with pytest.raises(ValueError, match="no instruction set sse9"), extension.limited_to("sse9"):
        pass
    assert extension.instruction_sets() == sets


def test_the_algorithm_depends_on_the_instruction_set():
    """Pairs are multiplied where the processor can; elsewhere their products take longer."""
    conv = Conv(64, 14, 14, 64)
    args, options = make_inputs(conv, torch.bfloat16, torch.channels_last)
    problem = problem_of(*args, **options)
    with extension.limited_to("baseline"):
        assert native.algorithm_of(problem) == native.DIRECT
    if "avx512_bf16" in extension.instruction_sets():
        with extension.limited_to("avx512_bf16"):
            assert native.algorithm_of(problem) == native.PAIRS
    if "amx" in extension.instruction_sets():
        assert native.algorithm_of(problem) == native.TILES
