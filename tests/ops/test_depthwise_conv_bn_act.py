"""depthwise_conv_bn_act: every promise of its docstring, on the native op and on Triton's.

Without a GPU the Triton kernels run in the interpreter.
"""

import functools

import pytest
import torch

from cvkernels import backend, record
from cvkernels.functional import DerivedWeights, depthwise_conv_bn_act
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from tests.support.cases.conv_bn_act import make_bn
from tests.support.cases.depthwise_conv_bn_act import (
    CASES,
    LARGE,
    OTHER_KERNELS,
    UNCOMMON,
    make_inputs,
)
from tests.support.cases.views import STRIDED
from tests.support.numerics import assert_matches, assert_matches_grad

pytestmark = pytest.mark.fast

ACTS = ("none", "relu", "relu6", "silu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# the interpreter cuts a bfloat16 off where a GPU rounds it
TRITON_DTYPES = DTYPES if torch.cuda.is_available() else DTYPES[:2]

fused = pytest.mark.parametrize("where", ["native", "triton"], indirect=True)
every_backend = pytest.mark.parametrize("where", ["reference", "native", "triton"], indirect=True)
acts = pytest.mark.parametrize("act", ACTS)

# The output and its sums.
squeezed = functools.partial(depthwise_conv_bn_act, squeeze=True)
expected_of = functools.partial(depthwise_conv_bn_act_reference, squeeze=True)


def check(args, options, op=squeezed):
    assert_matches(op, expected_of, args, options)


@pytest.mark.parametrize(
    ("where", "case", "dtype"),
    [
        pytest.param(runs, case, dtype, id=f"{runs}-{name}-{dtype}")
        for runs, cases, dtypes in (
            ("native", CASES | LARGE, DTYPES),
            ("triton", CASES | UNCOMMON, TRITON_DTYPES),
            ("auto", UNCOMMON | OTHER_KERNELS, DTYPES[:1]),
        )
        for name, case in cases.items()
        for dtype in dtypes
    ],
    indirect=["where"],
)
def test_matches_reference(case, dtype, memory_format, where):
    check(*make_inputs(case, dtype, memory_format, where))


@fused
@acts
@pytest.mark.parametrize("case", ["channels-24", "channels-not-8", "bands"])
def test_every_activation(case, act, where):
    args, options = make_inputs(CASES[case], device=where)
    check(args, options | {"act": act})


@fused
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides(view, memory_format, where):
    shape = (2, 48, 11, 12, 3, 1, 1)
    (x, *_), options = make_inputs(shape, memory_format=memory_format, device=where)
    x = view(x)
    weight = torch.randn(3, 3, 1, x.shape[1], device=where).permute(3, 2, 0, 1)
    check((x, weight, None, make_bn(x.shape[1], device=where)), options)


@fused
def test_output_is_channels_last_in_the_inputs_dtype(memory_format, where):
    args, options = make_inputs(CASES["channels-24"], torch.bfloat16, memory_format, where)
    out, sums = squeezed(*args, **options)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.bfloat16
    assert sums.shape == (1, 24) and sums.dtype == torch.float32 and sums.is_contiguous()
    assert torch.equal(depthwise_conv_bn_act(*args, **options), out)


def test_number_of_images_changes_nothing(native):
    """A fixed order of summation: equal bits for one image alone and beside others."""
    (x, *args), options = make_inputs((5, 200, 61, 9, 5, 1, 2))
    alone = zip(*(squeezed(image[None], *args, **options) for image in x), strict=True)
    for result, parts in zip(squeezed(x, *args, **options), alone, strict=True):
        assert torch.equal(result, torch.cat(parts))


@fused
@acts
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_come_through_as_in_pytorch(value, act, where):
    (x, weight, _, _), options = make_inputs(CASES["channels-24"], device=where)
    options["act"] = act
    x[0, 5, 3, 4] = x[0, 7, 0, 0] = value
    results, expected = squeezed(x, weight, **options), expected_of(x, weight, **options)
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert torch.allclose(ours, theirs, atol=1e-3, equal_nan=True)
    bounded = act == "relu6" and value == value  # NaN is not equal to itself
    assert expected[0].isfinite().all() == bounded


@fused
def test_silu_of_extreme_values(where):
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-1e38, 1e38, -0.0])])
    weight = torch.zeros(1, 1, 3, 3, device=where)
    weight[0, 0, 1, 1] = 1.0
    check((x.view(1, 1, 4, -1).to(where), weight), {"padding": 1, "act": "silu"})


@every_backend
def test_sums_do_not_overflow_a_half_dtype(where):
    x = torch.full((1, 8, 64, 64), 1000.0, dtype=torch.float16, device=where)
    weight = torch.zeros(8, 1, 3, 3, dtype=torch.float16, device=where)
    weight[:, :, 1, 1] = 1.0
    _, sums = squeezed(x, weight, padding=1)
    assert torch.equal(sums, torch.full_like(sums, 1000.0 * 64 * 64))


@fused
def test_channel_slices_and_cached_weights(where):
    (x, weight, *others), options = make_inputs(CASES["49-pixels"], device=where)
    wide = torch.randn(2, 48, 7, 7, device=where).contiguous(memory_format=torch.channels_last)
    check((wide[:, 16:40], weight, *others), options)
    cache = DerivedWeights()
    for _ in range(2):
        ours = squeezed(x, weight, *others, **options, cache=cache)
        assert all(map(torch.equal, ours, squeezed(x, weight, *others, **options)))
        weight.mul_(2)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    x = torch.zeros(36, 1024, 256, 256, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1, -1, -1, -1] = 1
    weight = torch.ones(1024, 1, 3, 3, dtype=torch.float16, device="cuda")
    out, sums = squeezed(x, weight, padding=1)
    assert out[-1, -1, -2:, -2:].sum() == 4 and sums.sum() == 4


# Gradients


@pytest.mark.parametrize("where", ["auto", "native", "triton"], indirect=True)
@acts
@pytest.mark.parametrize("case", ["channels-24", "channels-not-8", "unpadded"])
def test_gradients_match_reference(case, act, where):
    args, options = make_inputs(CASES[case], device=where)
    for leaf in (*args[:3], args[3].weight, args[3].bias):
        leaf.requires_grad_()
    assert_matches_grad(squeezed, expected_of, args, options | {"act": act})


# The choice of a backend, and what explain reports


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "native"),
        ({"stride": 3}, "reference"),
        ({"dilation": 2}, "reference"),
        ({"weight": torch.ones(24, 1, 7, 7), "padding": 3}, "reference"),
    ],
)
def test_auto_on_cpu_follows_its_rule(change, expected, native):
    (x, weight, bias, bn), options = make_inputs(CASES["49-pixels"])
    arguments = {"weight": weight, "bias": bias, "bn": bn} | options | change
    assert backend.chosen("depthwise_conv_bn_act", x, **arguments) == expected


@pytest.mark.parametrize(("batch", "kernels"), [(128, 1), (1, 2)])
def test_meta_tensors_are_planned_as_cuda(batch, kernels):
    """A batch of 128 fills the GPU with whole maps; the bands of one image are added afterwards."""
    pytest.importorskip("triton")
    x = torch.empty(batch, 96, 112, 112, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(96, 1, 3, 3, dtype=torch.bfloat16, device="meta")
    with record.recording(record.Recorder()) as recorder:
        out, sums = squeezed(x, weight, stride=2, padding=1)
        depthwise_conv_bn_act(x, weight, stride=2, padding=1)
    squeezing, plain = recorder.calls
    assert (squeezing.backend, squeezing.kernels) == ("triton", kernels)
    assert (plain.backend, plain.kernels) == ("triton", 1)
    assert plain.bytes_read == x.nbytes + weight.nbytes and plain.bytes_written == out.nbytes
    parts = squeezing.bytes_read - plain.bytes_read
    assert (parts == 0) == (kernels == 1)
    assert squeezing.bytes_written == out.nbytes + sums.nbytes + parts
    assert out.device.type == sums.device.type == "meta"
