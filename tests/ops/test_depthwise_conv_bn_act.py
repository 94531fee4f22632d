"""depthwise_conv_bn_act: every promise of its docstring, on the native op and on the reference."""

import pytest
import torch

from cvkernels.functional import depthwise_conv_bn_act
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from tests.support.cases.conv_bn_act import make_bn
from tests.support.cases.depthwise_conv_bn_act import CASES, flat_arguments, make_inputs
from tests.support.cases.views import STRIDED
from tests.support.numerics import assert_close_as_eager, map_floats

ACTS = ("none", "relu", "relu6", "silu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_matches_both(op, args, options):
    """Output and sums by the rule; op returns both."""
    reference = depthwise_conv_bn_act_reference
    exact = reference(*map_floats(torch.Tensor.double, args), **options, squeeze=True)
    eager = reference(*args, **options, squeeze=True)
    actual = op(*args, **options, squeeze=True)
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert_close_as_eager(ours, theirs, truth)


def run(backend):
    return lambda *args, **kwargs: depthwise_conv_bn_act(*args, **kwargs, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_native_matches_reference(case, dtype, memory_format, native):
    args, options = make_inputs(case, dtype, memory_format)
    assert_matches_both(run("native"), args, options)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", ["channels-24", "channels-not-8", "bands"])
def test_every_activation(case, act, native):
    args, options = make_inputs(CASES[case])
    assert_matches_both(run("native"), args, options | {"act": act})


@pytest.mark.parametrize("dropped", ["bias", "bn", "weight", "shift", "statistics", "all"])
def test_every_vector_is_optional(dropped, native):
    (x, weight, bias, bn), options = make_inputs(CASES["channels-not-8"])
    if dropped in ("bias", "all"):
        bias = None
    bn = {
        "bn": None,
        "all": None,
        "weight": bn._replace(weight=None),
        "shift": bn._replace(bias=None),
        "statistics": bn._replace(mean=None, var=None),
    }.get(dropped, bn)
    assert_matches_both(run("native"), (x, weight, bias, bn), options)


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides(view, memory_format, native):
    (x, *_), options = make_inputs((2, 48, 11, 12, 3, 1, 1), memory_format=memory_format)
    x = view(x)
    weight = torch.randn(3, 3, 1, x.shape[1]).permute(3, 2, 0, 1)
    assert_matches_both(run("native"), (x, weight, None, make_bn(x.shape[1])), options)


def test_output_is_channels_last_in_the_inputs_dtype(memory_format, native):
    args, options = make_inputs(CASES["channels-24"], torch.bfloat16, memory_format)
    out, sums = depthwise_conv_bn_act(*args, **options, squeeze=True)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.bfloat16
    assert sums.shape == (1, 24) and sums.dtype == torch.float32 and sums.is_contiguous()
    assert torch.equal(depthwise_conv_bn_act(*args, **options), out)


def test_number_of_threads_and_images_changes_nothing(native):
    """A fixed order of summation: equal bits for one image alone and beside others."""
    args, options = make_inputs((5, 200, 61, 9, 5, 1, 2))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("native")(*args, **options, squeeze=True))
    finally:
        torch.set_num_threads(before)
    results.append(
        [
            torch.cat(parts)
            for parts in zip(
                *(
                    run("native")(image[None], *args[1:], **options, squeeze=True)
                    for image in args[0]
                ),
                strict=True,
            )
        ]
    )
    for out, sums in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(sums, results[0][1])


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_come_through_as_in_pytorch(value, act, native):
    (x, weight, _, _), options = make_inputs(CASES["channels-24"])
    options["act"] = act
    x[0, 5, 3, 4] = x[0, 7, 0, 0] = value
    out, sums = run("native")(x, weight, **options, squeeze=True)
    expected, expected_sums = depthwise_conv_bn_act_reference(x, weight, **options, squeeze=True)
    for ours, theirs in ((out, expected), (sums, expected_sums)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert torch.allclose(ours, theirs, atol=1e-3, equal_nan=True)
    bounded = act == "relu6" and value == value  # NaN is not equal to itself
    assert expected.isfinite().all() == bounded


def test_silu_of_extreme_values(native):
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-1e38, 1e38, -0.0])])
    x = x.view(1, 1, 4, -1)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1.0
    assert_matches_both(run("native"), (x, weight), {"padding": 1, "act": "silu"})


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_sums_do_not_overflow_a_half_dtype(backend, native):
    x = torch.full((1, 8, 64, 64), 1000.0, dtype=torch.float16)
    weight = torch.zeros(8, 1, 3, 3, dtype=torch.float16)
    weight[:, :, 1, 1] = 1.0
    _, sums = run(backend)(x, weight, padding=1, squeeze=True)
    assert torch.equal(sums, torch.full((1, 8), 1000.0 * 64 * 64))


def test_result_is_never_a_view(native):
    x, weight = torch.ones(1, 8, 4, 4), torch.ones(8, 1, 3, 3)
    depthwise_conv_bn_act(x, weight, padding=1).zero_()
    assert x.min() == 1 and weight.min() == 1


# Gradients


def leaves(values):
    return map_floats(lambda t: t.detach().requires_grad_(t.requires_grad), values)


def gradients_of(op, args, options):
    """Gradients of <out, c> + <sums, d> with fixed c and d, in every tensor that requires one."""
    out, sums = op(*args, **options, squeeze=True)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, sums)
    ]
    flat = [*args[:3], *(args[3][:2] if args[3] is not None else ())]
    wanted = [t for t in flat if t is not None and t.requires_grad]
    return torch.autograd.grad((out, sums), wanted, cotangents)


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", ["channels-24", "channels-not-8", "unpadded"])
def test_gradients_match_reference(case, act, backend, native):
    args, options = make_inputs(CASES[case])
    options["act"] = act
    for leaf in (*args[:3], args[3].weight, args[3].bias):
        leaf.requires_grad_()
    reference = depthwise_conv_bn_act_reference
    double = map_floats(lambda t: t.detach().double().requires_grad_(t.requires_grad), args)
    exact = gradients_of(reference, double, options)
    eager = gradients_of(reference, leaves(args), options)
    actual = gradients_of(run(backend), leaves(args), options)
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert_close_as_eager(ours, theirs, truth)


@pytest.mark.parametrize("act", ACTS)
def test_gradient_formula_is_exact_in_float64(act):
    x, weight, bias, gamma, beta, *rest = flat_arguments(
        (2, 3, 4, 5, 3, 2, 1), torch.float64, act, "reference"
    )
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias, gamma, beta)]

    def op(*tensors):
        return torch.ops.cvkernels.depthwise_conv_bn_act_squeeze(*tensors, *rest)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


def test_unneeded_gradients_are_not_computed(native):
    (x, weight, bias, bn), options = make_inputs(CASES["channels-24"])
    x.requires_grad_()
    run("native")(x, weight, bias, bn, **options).sum().backward()
    assert x.grad is not None and weight.grad is None
