"""What max_pool and avg_pool share: ``out``, threads, autograd, the choice of a backend, errors."""

import pytest
import torch
import torch.nn.functional as F

from cvkernels import record
from cvkernels.functional import BatchNormParams, avg_pool, max_pool

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GROWING = (3, 1, 1)  # a window that keeps H and W


@pytest.fixture(params=[max_pool, avg_pool], ids=["max_pool", "avg_pool"])
def pool(request):
    return request.param


def make_x(shape, dtype, memory_format, device):
    """Negative, so that padding would show as a maximum."""
    x = (torch.randn(shape, device=device) - 4).to(dtype)
    return x.contiguous(memory_format=memory_format)


def norm_of(pool, channels, device="cpu"):
    """Options that make avg_pool normalise; max_pool has none."""
    if pool is max_pool:
        return {}
    weight, bias, mean, var = torch.rand(4, channels, device=device) + 0.5
    return {"input_bn": BatchNormParams(weight, bias, mean, var, 1e-3)}


@pytest.mark.parametrize("start", [0, 8, 5], ids=["first", "aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 19])
def test_out_is_a_channel_slice(
    pool, start, dtype, channels, memory_format, implementation, device
):
    x = make_x((2, channels, 9, 10), dtype, torch.channels_last, device)
    buffer = torch.full((2, 48, 5, 5), 3.0, dtype=dtype, device=device)
    buffer = buffer.contiguous(memory_format=memory_format)
    expected, place = buffer.clone(), slice(start, start + channels)
    expected[:, place] = pool(x, 3, 2, 1, backend=implementation)
    out = buffer[:, place]
    assert pool(x, 3, 2, 1, out=out, backend=implementation) is out
    if pool is avg_pool:  # the layouts sum in different orders
        torch.testing.assert_close(buffer, expected)
        buffer[:, place] = expected[:, place] = 0
    assert torch.equal(buffer, expected)


def test_out_beside_x_in_one_buffer(pool, implementation, device):
    buffer = make_x((2, 48, 9, 9), torch.float32, torch.channels_last, device)
    expected = buffer.clone()
    expected[:, 16:32] = pool(expected[:, :16], *GROWING, backend=implementation)
    pool(buffer[:, :16], *GROWING, out=buffer[:, 16:32], backend=implementation)
    assert torch.equal(buffer, expected)


def test_result_is_never_a_view(pool, implementation, device):
    x = torch.ones(1, 8, 4, 4, device=device)
    pool(x, 1, 1, backend=implementation).zero_()
    assert x.min() == 1


def test_gradient_through_out(pool, device):
    x = torch.randn(1, 4, 6, 6, device=device, requires_grad=True)
    buffer = torch.zeros(1, 8, 3, 3, device=device)
    pool(x, 2, out=buffer[:, 4:])
    assert torch.autograd.grad(buffer.sum(), x)[0].sum() == 36


def test_autograd_notices_a_write_into_out(pool, native, device):
    out = torch.ones(1, 4, 3, 3, device=device)
    weight = torch.ones(1, 4, 3, 3, device=device, requires_grad=True)
    loss = (weight * out).sum()
    pool(torch.randn(1, 4, 6, 6, device=device), 2, out=out, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class TestChoice:
    def test_meta_tensor_is_planned_as_cuda_under_explain(self, pool):
        x = torch.empty(2, 64, 112, 112, dtype=torch.bfloat16, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        recorder, norm = record.Recorder(), norm_of(pool, 64, "meta")
        with record.recording(recorder):
            y = pool(x, 3, 2, 1, **norm)
        assert y.shape == (2, 64, 56, 56) and y.device.type == "meta"
        assert y.is_contiguous(memory_format=torch.channels_last)
        (call,) = recorder.calls
        assert (call.op, call.backend, call.kernels) == (pool.__name__, "native", 1)
        assert call.bytes_read == 2 * x.numel() + (4 * 4 * 64 if norm else 0)
        assert call.bytes_written == 2 * y.numel()

    def test_only_touched_elements_count_as_read(self, pool, native, device):
        recorder = record.Recorder()
        with record.recording(recorder):
            pool(torch.ones(1, 4, 8, 9, device=device), 1, 2, backend="native")
        assert recorder.calls[0].bytes_read == 4 * 4 * 4 * 5


ONES = torch.ones(1, 8, 4, 4)
INVALID = {
    "rank": (ValueError, r"shape \[N, C, H, W\], got \[8, 4, 4\].*x\[None\]", (ONES[0], 2)),
    "dtype": (TypeError, "must be float32.*got torch.int64", (ONES.long(), 2)),
    "kernel": (ValueError, "kernel_size must be at least 1, got 0", (ONES, 0)),
    "kernel-type": (TypeError, "kernel_size must be an integer", (ONES, 2.0)),
    "kernel-rank": (TypeError, "kernel_size must be an integer or a pair", (ONES, (2, 2, 2))),
    "stride": (ValueError, r"stride must be at least 1, got \(1, 0\)", (ONES, 2, (1, 0))),
    "negative-padding": (ValueError, "padding must be at least 0", (ONES, 3, 1, -1)),
    "padding": (ValueError, "at most half of kernel_size, got padding 2", (ONES, 3, 1, 2)),
    "too-small": (ValueError, r"no window fits x of shape \[1, 8, 4, 4\]", (ONES, 5)),
    "no-channels": (ValueError, r"no window fits x of shape \[1, 0, 4, 4\]", (ONES[:, :0], 2)),
    "no-rows": (ValueError, "no window fits", (ONES[:, :, :0], 2, 2, 1)),
}


@pytest.mark.parametrize(("error", "message", "args"), INVALID.values(), ids=INVALID.keys())
def test_invalid_arguments(pool, error, message, args):
    with pytest.raises(error, match=f"{pool.__name__}: .*{message}"):
        pool(*args)
    if error is ValueError and args[0].dim() == 4:  # where PyTorch refuses too
        with pytest.raises((RuntimeError, ValueError)):
            getattr(F, f"{pool.__name__}2d")(*args)


BUFFER = torch.ones(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
INVALID_OUT = {
    "shape": (
        ValueError, r"out must have shape \[1, 8, 4, 4\], got \[1, 8, 2, 2\]",
        lambda x: x.new_empty(1, 8, 2, 2),
    ),
    "dtype": (
        TypeError, "out must have x's dtype, torch.float32, got torch.float64",
        lambda x: torch.empty_like(x, dtype=torch.float64),
    ),
    "device": (
        ValueError, "out must be on x's device, cpu, got meta",
        lambda x: torch.empty_like(x, device="meta"),
    ),
    "expanded": (ValueError, "out must not overlap itself", lambda x: x[:, :1].expand(-1, 8, 4, 4)),
    "same": (ValueError, "out overlaps x", lambda x: x),
    "shifted": (ValueError, "out overlaps x", lambda x: BUFFER[:, 4:12]),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "out"), INVALID_OUT.values(), ids=INVALID_OUT.keys())
def test_invalid_out(pool, error, message, out, implementation):
    x = BUFFER[:, :8]
    with pytest.raises(error, match=message):
        pool(x, *GROWING, out=out(x), backend=implementation)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(pool, native, device):
    x = torch.zeros(36, 1024, 256, 256, dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1, -1, -1, -1] = 4
    y, expected = pool(x, 2, backend="native"), 4 if pool is max_pool else 1
    assert y[-1, -1, -1, -1] == expected and y.sum() == expected
