"""The compiled convolution in training: what it computes, and when it is chosen."""

import functools

import pytest
import torch
import torch.nn.functional as F

from cvkernels import extension
from cvkernels.ops.common import recycled
from cvkernels.ops.conv_bn_act import native, native_training
from tests.support.cases.conv_bn_act import Conv
from tests.support.numerics import assert_matches
from tests.support.surroundings import (
    assert_bits_do_not_depend_on_threads,
    each_instruction_set,
    other_defaults,
)

pytestmark = pytest.mark.skipif(
    not extension.has("cpu"), reason="the compiled extension is missing"
)
CONVS = {
    "1x1": Conv(32, 9, 11, 40), "1x1-few": Conv(16, 20, 31, 5), "1x1-many": Conv(272, 3, 5, 210),
    "3x3": Conv(16, 8, 8, 16, 3, 3, 1, 1), "3x3-nothing-divides": Conv(19, 7, 9, 21, 3, 3, 1, 1),
    "3x3-no-padding": Conv(17, 9, 6, 70, 3, 3), "3x3-wide-padding": Conv(24, 5, 5, 16, 3, 3, 1, 2),
    "3x3-one-row": Conv(16, 1, 13, 33, 3, 3, 1, 1, N=3),
    "3x3-many-tiles": Conv(64, 40, 38, 48, 3, 3, 1, 1, N=4),
    "3x3-one-pixel": Conv(16, 3, 3, 16, 3, 3, N=1),
}  # fmt: skip
instruction_set = each_instruction_set("baseline", "avx2", "avx512")


def algorithms_of(conv):
    return [native.DIRECT] if conv.R == 1 else native.WINOGRAD


def maps_of(conv, sliced=False):
    """x, weight and a gradient in the result; ``sliced``: channels of wider maps."""
    x = torch.randn(conv.N, conv.C + 8 * sliced, conv.H, conv.W)
    weight = torch.randn(conv.K, conv.C, conv.R, conv.S) / (conv.C * conv.R * conv.S) ** 0.5
    P, Q = (size + 2 * conv.padding - conv.R + 1 for size in (conv.H, conv.W))
    grad = torch.randn(conv.N, conv.K + 8 * sliced, P, Q)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return x[:, 8 * sliced :], weight, grad[:, : conv.K]


def stock_gradients(grad, x, weight, padding):
    ones, none = [1, 1], [0, 0]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, ones, padding, ones, False, none, 1, [True, True, False]
    )[:2]


def weight_gradient(grad, x, weight, padding, algorithm):
    """Ours; by PyTorch where ours has none."""
    found = native_training.weight_gradient(grad, x, weight, padding, algorithm)
    assert (found is None) == (algorithm == native.DIRECT and x.shape[1] % native.PANEL > 0)
    return stock_gradients(grad, x, weight, padding)[1] if found is None else found


@pytest.mark.parametrize("sliced", [False, True], ids=["", "slices"])
@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
def test_follows_the_numerics_rule(conv, sliced, memory_format, instruction_set):
    x, weight, grad = maps_of(conv, sliced)
    weight = weight.contiguous(memory_format=memory_format)
    padding = (conv.padding, conv.padding)
    for algorithm in algorithms_of(conv):

        def native_ones(grad, x, weight, bias, algorithm=algorithm):
            return ours(grad, x, weight, padding, algorithm, bias)

        def stock(grad, x, weight, bias):
            return (
                F.conv2d(x, weight, bias, padding=padding),
                *stock_gradients(grad, x, weight, padding),
            )

        # A tile's points lose more than two roundings, a long sum by its parts fewer.
        few = conv.R == 3 and grad[:, 0].numel() < native_training.PIXELS
        args = (grad, x, weight, torch.randn(conv.K))
        assert_matches(native_ones, stock, args, factor=8.0 if few else 2.0)


def ours(grad, x, weight, padding, algorithm, bias=None):
    return (
        native_training.convolve(x, weight, bias, padding, algorithm),
        native_training.input_gradient(grad, weight, padding, algorithm),
        weight_gradient(grad, x, weight, padding, algorithm),
    )


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
def test_bits_do_not_depend_on_threads(conv):
    x, weight, grad = maps_of(conv)
    padding = (conv.padding, conv.padding)
    for algorithm in algorithms_of(conv):
        assert_bits_do_not_depend_on_threads(
            functools.partial(ours, grad, x, weight, padding, algorithm)
        )


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
def test_small_integers_are_exact_at_points_without_roots(conv, instruction_set):
    x, weight, grad = maps_of(conv)
    x, weight, grad = x.round(), weight.sign() * 4, grad.round()
    padding, algorithm = (conv.padding, conv.padding), algorithms_of(conv)[0]
    y = F.conv2d(x.double(), weight.double(), padding=padding)
    d_x, d_weight = stock_gradients(grad.double(), x.double(), weight.double(), padding)
    for found, exact in zip(
        ours(grad, x, weight, padding, algorithm), (y, d_x, d_weight), strict=True
    ):
        assert torch.equal(found, exact.float())


@pytest.mark.parametrize("conv", ["1x1", "3x3"])
def test_defaults_of_device_and_dtype_do_not_matter(conv):
    conv = CONVS[conv]
    x, weight, grad = maps_of(conv)
    args = (grad, x, weight, (conv.padding, conv.padding), algorithms_of(conv)[-1])
    recycled._maker.cache_clear()
    with other_defaults():
        found = ours(*args)
    assert all(map(torch.equal, found, ours(*args)))


def test_the_layout_of_a_weight_is_that_of_its_gradient(memory_format):
    x, weight, grad = maps_of(CONVS["3x3"])
    weight = weight.contiguous(memory_format=memory_format)
    found = native_training.weight_gradient(grad, x, weight, (1, 1), 4)
    assert found.stride() == weight.stride()


@pytest.mark.parametrize(
    ("conv", "algorithm"),
    [
        (Conv(64, 56, 56, 64, 3, 3, 1, 1), 4),
        (Conv(64, 14, 14, 64, 3, 3, 1, 1, N=8), 4),
        (Conv(64, 7, 7, 64, 3, 3, 1, 1, N=8), None),
        (Conv(8, 56, 56, 64, 3, 3, 1, 1), None),
        (Conv(64, 56, 56, 64, 3, 3, 1, 3), None),
        (Conv(64, 14, 14, 64), 0),
        (Conv(64, 28, 28, 64), None),
        (Conv(16, 112, 112, 96), 0),
        (Conv(64, 14, 14, 64, padding=1), None),
        (Conv(64, 14, 14, 64, 1, 3), None),
    ],
)
def test_is_chosen_where_it_saves_time(conv, algorithm):
    x = torch.empty(conv.N, conv.C, conv.H, conv.W)
    weight = torch.empty(conv.K, conv.C, conv.R, conv.S)
    padding = (conv.padding, conv.padding)
    assert native_training.algorithm_of(x, weight, padding) == algorithm
    assert native_training.algorithm_of(x.bfloat16(), weight, padding) is None
    assert native_training.algorithm_of(x.to("meta"), weight.to("meta"), padding) is None
