"""The gradients of the compiled depthwise convolution: what they are, and when they are chosen."""

import pytest
import torch

from cvkernels import extension
from cvkernels.ops.common import recycled
from cvkernels.ops.depthwise_conv_bn_act import native_training
from tests.support.numerics import assert_matches
from tests.support.surroundings import (
    assert_bits_do_not_depend_on_threads,
    each_instruction_set,
    other_defaults,
)

pytestmark = pytest.mark.skipif(
    not extension.has("cpu"), reason="the compiled extension is missing"
)
# Channels, height, width.
SIZES = {
    "whole": (32, 16, 16), "nothing-divides": (37, 9, 11), "two-bands": (16, 61, 20),
    "one-row": (24, 1, 13), "one-pixel": (40, 1, 1), "many-channels": (400, 5, 7),
}  # fmt: skip


instruction_set = each_instruction_set("baseline", "avx2", "avx512")


def maps_of(size, kernel, stride, padding):
    C, H, W = size
    x = torch.randn(3, C, H, W).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(C, 1, kernel, kernel)
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding, 1, C)
    return torch.randn_like(y), x, weight


def stock(grad, x, weight, stride, padding):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], x.shape[1],
        [True, True, False],
    )[:2]  # fmt: skip


def ours(grad, x, weight, stride, padding):
    return (
        native_training.input_gradient(grad, x, weight, stride, padding),
        native_training.weight_gradient(grad, x, weight, stride, padding),
    )


@pytest.mark.parametrize("padding", ["same", "most"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_follows_the_numerics_rule(size, kernel, stride, padding, instruction_set):
    pad = kernel // 2 if padding == "same" else kernel - 1
    geometry = ((stride, stride), (pad, pad))
    maps = maps_of(size, kernel, *geometry)
    assert native_training.suits(*maps[1:], *geometry, (1, 1), size[0])
    assert_matches(ours, stock, (*maps, *geometry))


def test_without_padding_and_with_one_side_alone(instruction_set):
    for padding in ((0, 0), (2, 0), (0, 1)):
        geometry = ((2, 2), padding)
        assert_matches(ours, stock, (*maps_of((20, 12, 15), 5, *geometry), *geometry))


def test_bits_do_not_depend_on_threads():
    geometry = ((1, 1), (2, 2))
    maps = maps_of((48, 61, 20), 5, *geometry)
    assert_bits_do_not_depend_on_threads(lambda: ours(*maps, *geometry))


def test_defaults_of_device_and_dtype_do_not_matter():
    geometry = ((1, 1), (2, 2))
    maps = maps_of((48, 12, 20), 5, *geometry)
    recycled._maker.cache_clear()
    with other_defaults():
        found = ours(*maps, *geometry)
    assert all(map(torch.equal, found, ours(*maps, *geometry)))


def test_small_integers_are_exact():
    geometry = ((2, 2), (1, 1))
    maps = [t.round() for t in maps_of((37, 40, 31), 3, *geometry)]
    for found, exact in zip(
        ours(*maps, *geometry), stock(*(t.double() for t in maps), *geometry), strict=True
    ):
        assert torch.equal(found, exact.float())


def test_other_convolutions_are_left_to_pytorch():
    def suits(x, weight, stride=(1, 1), padding=(1, 1), dilation=(1, 1)):
        return native_training.suits(x, weight, stride, padding, dilation, weight.shape[0])

    x, weight = torch.empty(1, 8, 9, 9), torch.empty(8, 1, 3, 3)
    assert suits(x, weight)
    assert not suits(x.double(), weight.double())
    assert not suits(x.to("meta"), weight.to("meta"))
    assert not suits(x, weight, stride=(1, 2))
    assert not suits(x, weight, padding=(3, 3))
    assert not suits(x, weight, dilation=(2, 2))
    assert not suits(x, torch.empty(16, 1, 3, 3))
    assert not suits(x, torch.empty(8, 1, 7, 7))
