"""max_pool against torch.nn.functional.max_pool2d: every promise of its docstring."""

import pytest
import torch
import torch.nn.functional as F

from cvkernels.functional import max_pool
from tests.support.cases.views import STRIDED
from tests.support.numerics import assert_same_numbers

pytestmark = pytest.mark.fast

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# shape of x, then kernel_size, stride, padding, dilation, ceil_mode
CALLS = {
    "resnet-stem": ((2, 64, 28, 28), 3, 2, 1, 1, False),
    "densenet-pool0": ((1, 96, 14, 14), 3, 2, 1, 1, False),
    "googlenet-pool1": ((1, 64, 28, 28), 3, 2, 0, 1, True),
    "googlenet-pool4": ((2, 832, 14, 14), 2, 2, 0, 1, True),
    "googlenet-branch": ((1, 480, 14, 14), 3, 1, 1, 1, True),
    "senet-pool0": ((2, 64, 15, 15), 3, 2, 0, 1, True),
    "odd": ((3, 17, 5, 9), 3, 2, 1, 1, False),  # nothing divides a vector
    "five-channels-ceil": ((2, 5, 7, 10), 3, 3, 1, 1, True),
    "one-channel": ((2, 1, 9, 9), 3, 2, 1, 1, False),
    "pair": ((2, 24, 9, 11), (3, 2), (1, 2), (1, 0), (2, 3), True),
    # more taps than the inner loop takes at once
    "large-kernel": ((2, 40, 13, 8), 5, 1, 2, 1, False),
    "larger-than-x": ((1, 8, 2, 3), 4, 4, 2, 1, True),
    "one-pixel": ((2, 64, 1, 1), 3, 2, 1, 1, False),
    "only-padding": ((1, 8, 1, 1), 2, 2, 1, 3, True),  # both taps of a window outside x
    "stride-none": ((1, 16, 8, 8), 2, None, 0, 1, False),
    "empty-batch": ((0, 64, 14, 14), 3, 2, 1, 1, False),
}


def make_x(shape, dtype, memory_format, device):
    """A few distinct values, so that ties are common, and negative, so that padding would show."""
    x = torch.randint(-40, -1, shape, device=device).to(dtype) / 4
    return x.contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_equals_max_pool2d(call, dtype, memory_format, implementation, device):
    shape, *window = call
    x = make_x(shape, dtype, memory_format, device)
    y = max_pool(x, *window, backend=implementation)
    assert torch.equal(y, F.max_pool2d(x, *window))
    assert y.dtype == dtype
    if x.numel():
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_float64_on_cpu(call, memory_format, native):
    shape, *window = call
    x = make_x(shape, torch.float64, memory_format, "cpu")
    assert torch.equal(max_pool(x, *window, backend="native"), F.max_pool2d(x, *window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 8, 67])
def test_every_bit_pattern_of_infinities_and_nan(dtype, channels, memory_format, native, device):
    torch.manual_seed(1)
    x = torch.randn(2, channels, 12, 13).to(dtype).contiguous(memory_format=memory_format)
    special = [torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0, torch.finfo(dtype).max]
    where = torch.rand(x.shape) < 0.3
    x[where] = torch.tensor(special, dtype=dtype)[torch.randint(7, (int(where.sum()),))]
    x[:, :, :6] = -torch.inf
    x = x.to(device)
    y, expected = max_pool(x, 3, 2, 1, backend="native"), F.max_pool2d(x, 3, 2, 1)
    assert_same_numbers(y, expected)
    assert y.isnan().any() and (y == -torch.inf).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number(dtype, native, device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)[torch.randperm(2**16)].view(1, 64, 32, 32)
    x = x.contiguous(memory_format=torch.channels_last).to(device)
    y, expected = max_pool(x, 2, 1, backend="native"), F.max_pool2d(x, 2, 1)
    assert_same_numbers(y, expected)


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(view, dtype, memory_format, implementation, device):
    x = view(make_x((2, 48, 11, 12), dtype, memory_format, device))
    y = max_pool(x, 3, 2, 1, backend=implementation)
    assert torch.equal(y, F.max_pool2d(x, 3, 2, 1))


# Rows of x, kernel, stride, padding, dilation, ceil_mode: rows -1 and 1; -2, 1.
@pytest.mark.parametrize("window", [(1, 2, 1, 1, 2, False), (1, 4, 9, 2, 3, True)])
def test_windows_of_padding_alone_have_no_gradient(window, memory_format, device):
    rows, *window = window
    x = torch.randn(1, 3, rows, 12, device=device).contiguous(memory_format=memory_format)
    y = max_pool(x.requires_grad_(), *window)
    assert y.isneginf().all() and torch.equal(y, F.max_pool2d(x.detach(), *window))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not gradient.any()


def test_gradient_is_max_pool2d_s(memory_format, device):
    x = torch.randn(2, 8, 9, 9, device=device).contiguous(memory_format=memory_format)
    x.requires_grad_()
    y = max_pool(x, 3, 2, 1)
    cotangent = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, cotangent)
    (theirs,) = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1), x, cotangent)
    assert torch.equal(ours, theirs)


ONES = torch.ones(1, 8, 4, 4)


def test_dilation_is_checked():
    with pytest.raises(ValueError, match="max_pool: .*dilation must be at least 1, got 0"):
        max_pool(ONES, 2, 1, 0, 0)
    with pytest.raises((RuntimeError, ValueError)):
        F.max_pool2d(ONES, 2, 1, 0, 0)
