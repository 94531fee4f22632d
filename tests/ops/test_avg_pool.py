"""avg_pool against torch.nn.functional.avg_pool2d: every promise of its docstring."""

import pytest
import torch

from cvkernels.functional import BatchNormParams, avg_pool
from cvkernels.ops.avg_pool.reference import avg_pool_reference
from tests.support.cases.views import STRIDED
from tests.support.numerics import assert_matches, assert_matches_grad, assert_same_numbers

pytestmark = pytest.mark.fast

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# shape of x, then kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
CALLS = {
    "densenet-transition": ((2, 64, 14, 14), 2, 2, 0, False, True, None),
    "densenet-last": ((2, 96, 7, 7), 7, None, 0, False, True, None),
    "inception-branch": ((1, 48, 9, 9), 3, 1, 1, False, True, None),
    "excluding-padding": ((1, 48, 9, 9), 3, 1, 1, False, False, None),
    "resnet-d": ((2, 24, 9, 11), 2, 2, 0, True, False, None),
    "ceil-over-the-padding": ((2, 8, 8, 9), 3, 2, 1, True, True, None),
    "ceil-excluding": ((2, 8, 8, 9), 3, 2, 1, True, False, None),
    "divisor": ((1, 16, 8, 8), 3, 2, 1, True, True, 5),
    "negative-divisor": ((1, 16, 8, 8), 2, 2, 0, False, True, -3),
    "odd": ((3, 17, 5, 9), 3, 2, 1, False, True, None),  # nothing divides a vector
    "pair": ((2, 24, 9, 11), (3, 2), (1, 2), (1, 0), True, True, None),
    "large-kernel": ((1, 40, 13, 8), 5, 1, 2, False, True, None),
    "larger-than-x": ((1, 8, 2, 3), 4, 4, 2, True, True, None),
    "one-channel": ((2, 1, 9, 9), 3, 2, 1, False, True, None),
    "one-pixel": ((2, 64, 1, 1), 2, 2, 1, False, True, None),
    "empty-batch": ((0, 64, 14, 14), 2, 2, 0, False, True, None),
}


def make_x(shape, dtype, memory_format, device):
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)


def make_bn(C, device="cpu"):
    weight, bias, mean = torch.randn(3, C, device=device)
    return BatchNormParams(weight, bias, mean, torch.rand(C, device=device) + 0.5, 1e-3)


def pooling(implementation, dtype):
    """avg_pool with ``implementation``, input_bn as its last positional argument."""

    def pooled(x, *args):
        assert x.dtype == dtype
        return avg_pool(x, *args[:6], input_bn=args[6], backend=implementation)

    return pooled


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_matches_avg_pool2d(call, dtype, norm, memory_format, implementation, device):
    shape, *window = call
    x = make_x(shape, dtype, memory_format, device)
    bn = make_bn(shape[1], device) if norm else None
    assert_matches(pooling(implementation, dtype), avg_pool_reference, (x, *window, bn))
    y = avg_pool(x, *window, input_bn=bn, backend=implementation)
    if x.numel():
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_float64_on_cpu(call, norm, memory_format, native):
    shape, *window = call
    x = make_x(shape, torch.float64, memory_format, "cpu")
    bn = make_bn(shape[1]) if norm else None
    if norm:
        bn = BatchNormParams(*(v.double() for v in bn[:4]), bn.eps)
    y = avg_pool(x, *window, input_bn=bn, backend="native")
    torch.testing.assert_close(y, avg_pool_reference(x, *window, bn), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(view, dtype, norm, memory_format, implementation, device):
    x = view(make_x((2, 48, 11, 12), dtype, memory_format, device))
    bn = make_bn(x.shape[1], device) if norm else None
    window = (3, 2, 1, False, True, None)
    assert_matches(pooling(implementation, dtype), avg_pool_reference, (x, *window, bn))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_where_their_windows_are(dtype, memory_format, native, device):
    x = torch.ones(1, 24, 6, 6, dtype=dtype, device=device)
    x[:, :, 0, 0], x[:, :, 2, 2], x[:, :, 4, 5] = torch.nan, torch.inf, -torch.inf
    x = x.contiguous(memory_format=memory_format)
    for bn in (None, BatchNormParams(weight=torch.ones(24, device=device))):
        y = avg_pool(x, 2, input_bn=bn, backend="native")
        expected = avg_pool_reference(x, 2, input_bn=bn)
        assert_same_numbers(y, expected)
        assert y.isnan().any()


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_gradients_match_the_reference(norm, memory_format, device):
    x = make_x((2, 8, 9, 9), torch.float32, memory_format, device).requires_grad_()
    bn = None
    if norm:
        bn = make_bn(8, device)
        bn = BatchNormParams(*(v.requires_grad_() for v in bn[:2]), *bn[2:])
    assert_matches_grad(
        lambda *args: avg_pool(*args[:-1], input_bn=args[-1]),
        avg_pool_reference,
        (x, 3, 2, 1, False, True, None, bn),
    )


ONES = torch.ones(1, 8, 4, 4)
INVALID = {
    "divisor": (ValueError, "divisor_override must not be 0", dict(divisor_override=0)),
    "divisor-type": (TypeError, "divisor_override must be an integer", dict(divisor_override=0.5)),
    "bn": (ValueError, r"input_bn.weight must have shape \[8\], got \[4\]",
           dict(input_bn=BatchNormParams(weight=torch.ones(4)))),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "kwargs"), INVALID.values(), ids=INVALID.keys())
def test_invalid_options(error, message, kwargs):
    with pytest.raises(error, match=f"avg_pool: .*{message}"):
        avg_pool(ONES, 2, **kwargs)
