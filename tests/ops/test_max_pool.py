"""max_pool against torch.nn.functional.max_pool2d: every promise of its docstring."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from cvkernels import backend, extension, record
from cvkernels.backend import BackendError
from cvkernels.ops.max_pool.op import max_pool

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
    "large-kernel": (
        (2, 40, 13, 8),
        5,
        1,
        2,
        1,
        False,
    ),  # more taps than the inner loop takes at once
    "larger-than-x": ((1, 8, 2, 3), 4, 4, 2, 1, True),
    "one-pixel": ((2, 64, 1, 1), 3, 2, 1, 1, False),
    "only-padding": ((1, 8, 1, 1), 2, 2, 1, 3, True),  # both taps of a window outside x
    "stride-none": ((1, 16, 8, 8), 2, None, 0, 1, False),
    "empty-batch": ((0, 64, 14, 14), 3, 2, 1, 1, False),
}
GROWING = (3, 1, 1)  # a window that keeps H and W


def make_x(shape, dtype, memory_format, device):
    """A few distinct values, so that ties are common, and negative, so that padding would show."""
    x = torch.randint(-40, -1, shape, device=device).to(dtype) / 4
    return x.contiguous(memory_format=memory_format)


@pytest.fixture(params=["native", "reference"])
def implementation(request, device):
    if request.param == "native" and not extension.has(device.type):
        pytest.skip(extension.status()[device.type].reason)
    return request.param


@pytest.fixture
def native(device):
    if not extension.has(device.type):
        pytest.skip(extension.status()[device.type].reason)


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
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert y.isnan().any() and (y == -torch.inf).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number(dtype, native, device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)[torch.randperm(2**16)].view(1, 64, 32, 32)
    x = x.contiguous(memory_format=torch.channels_last).to(device)
    y, expected = max_pool(x, 2, 1, backend="native"), F.max_pool2d(x, 2, 1)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


STRIDED = {
    "channel-slice": lambda x: x[:, 8:40],
    "unaligned-channel-slice": lambda x: x[:, 3:36],
    "every-second-channel": lambda x: x[:, ::2],
    "window-of-an-image": lambda x: x[:, :, 2:9, 1:8],
    "every-second-column": lambda x: x[:, :, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "one-channel-expanded": lambda x: x[:, :1].expand(-1, 16, -1, -1),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(view, dtype, memory_format, implementation, device):
    x = view(make_x((2, 48, 11, 12), dtype, memory_format, device))
    y = max_pool(x, 3, 2, 1, backend=implementation)
    assert torch.equal(y, F.max_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize("start", [0, 8, 5], ids=["first", "aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 19])
def test_out_is_a_channel_slice(start, dtype, channels, memory_format, implementation, device):
    x = make_x((2, channels, 9, 10), dtype, torch.channels_last, device)
    buffer = torch.full((2, 48, 5, 5), 3.0, dtype=dtype, device=device)
    buffer = buffer.contiguous(memory_format=memory_format)
    expected = buffer.clone()
    expected[:, start : start + channels] = F.max_pool2d(x, 3, 2, 1)
    out = buffer[:, start : start + channels]
    assert max_pool(x, 3, 2, 1, out=out, backend=implementation) is out
    assert torch.equal(buffer, expected)


def test_out_beside_x_in_one_buffer(implementation, device):
    buffer = make_x((2, 48, 9, 9), torch.float32, torch.channels_last, device)
    expected = buffer.clone()
    expected[:, 16:32] = F.max_pool2d(expected[:, :16], *GROWING)
    max_pool(buffer[:, :16], *GROWING, out=buffer[:, 16:32], backend=implementation)
    assert torch.equal(buffer, expected)


def test_result_is_never_a_view(implementation, device):
    x = torch.ones(1, 8, 4, 4, device=device)
    y = max_pool(x, 1, 1, backend=implementation)
    y.zero_()
    assert x.min() == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_number_of_threads_changes_nothing(threads, memory_format, native):
    x = make_x((3, 35, 40, 41), torch.float32, memory_format, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(max_pool(x, 3, 2, 1, backend="native"), F.max_pool2d(x, 3, 2, 1))
    finally:
        torch.set_num_threads(before)


def test_gradient_is_max_pool2d_s(memory_format, device):
    x = torch.randn(2, 8, 9, 9, device=device).contiguous(memory_format=memory_format)
    x.requires_grad_()
    y = max_pool(x, 3, 2, 1)
    cotangent = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, cotangent)
    (theirs,) = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1), x, cotangent)
    assert torch.equal(ours, theirs)


def test_gradient_through_out(device):
    x = torch.randn(1, 4, 6, 6, device=device, requires_grad=True)
    buffer = torch.zeros(1, 8, 3, 3, device=device)
    max_pool(x, 2, out=buffer[:, 4:])
    assert torch.autograd.grad(buffer.sum(), x)[0].sum() == 36


def test_autograd_notices_a_write_into_out(native, device):
    out = torch.ones(1, 4, 3, 3, device=device)
    weight = torch.ones(1, 4, 3, 3, device=device, requires_grad=True)
    loss = (weight * out).sum()
    max_pool(torch.randn(1, 4, 6, 6, device=device), 2, out=out, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["auto", "native"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(name, dynamic, native, device):
    torch._dynamo.reset()
    x = make_x((2, 16, 9, 11), torch.float32, torch.channels_last, device)
    compiled = torch.compile(
        lambda x: max_pool(x * 2, 3, 2, 1, backend=name) + 1, fullgraph=True, dynamic=dynamic
    )
    y = compiled(x)
    assert torch.equal(y, F.max_pool2d(x * 2, 3, 2, 1) + 1)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_compiles_with_out(native, device):
    def pooled_beside_ones(x):
        buffer = torch.ones(2, 40, 9, 11, device=x.device).to(memory_format=torch.channels_last)
        max_pool(x, *GROWING, out=buffer[:, 8:24], backend="native")
        return buffer * 2

    torch._dynamo.reset()
    x = make_x((2, 16, 9, 11), torch.float32, torch.channels_last, device)
    y = torch.compile(pooled_beside_ones, fullgraph=True)(x)
    assert torch.equal(y, pooled_beside_ones(x))


@pytest.mark.parametrize("view", ["dense", "one-channel", "empty", "slice"])
def test_opcheck(view, memory_format, native, device):
    x = make_x((2, 16, 9, 11), torch.float32, memory_format, device)
    views = {"dense": x, "one-channel": x[:, :1], "empty": x[:0], "slice": x[:, 2:9]}
    window = ((3, 3), (1, 1), (1, 1), (1, 1), False)
    opcheck(torch.ops.cvkernels.max_pool.default, (views[view], *window))
    out = torch.zeros_like(views[view])
    opcheck(torch.ops.cvkernels.max_pool_out.default, (views[view], *window, out))


class TestChoice:
    def test_auto_is_native_where_it_can(self, native, device):
        x = torch.ones(1, 8, 4, 4, device=device)
        assert backend.chosen("max_pool", x, 2) == "native"

    def test_reference_where_a_gradient_is_needed(self, native, device):
        x = torch.ones(1, 8, 4, 4, device=device, requires_grad=True)
        assert max_pool.plan(x, 2).backend == "reference"
        assert "gradient" in max_pool.plan(x, 2).reason
        with torch.no_grad():
            assert max_pool.plan(x, 2).backend == "native"

    def test_native_cannot_give_a_gradient(self, native, device):
        x = torch.ones(1, 8, 4, 4, device=device, requires_grad=True)
        with pytest.raises(BackendError, match="a gradient is needed.*use backend='auto'"):
            max_pool(x, 2, backend="native")

    @pytest.mark.parametrize("name", ["triton", "cudnn", "onednn"])
    def test_no_such_backend(self, name):
        with pytest.raises(BackendError, match=f"no backend '{name}'; use 'auto', 'native'"):
            max_pool(torch.ones(1, 8, 4, 4), 2, backend=name)

    def test_use_is_obeyed(self, device):
        with backend.use("reference"):
            assert (
                backend.chosen("max_pool", torch.ones(1, 8, 4, 4, device=device), 2) == "reference"
            )

    def test_meta_tensor_is_planned_as_cuda_under_explain(self):
        x = torch.empty(2, 64, 112, 112, dtype=torch.bfloat16, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        recorder = record.Recorder()
        with record.recording(recorder):
            y = max_pool(x, 3, 2, 1)
        assert y.shape == (2, 64, 56, 56) and y.device.type == "meta"
        assert y.is_contiguous(memory_format=torch.channels_last)
        (call,) = recorder.calls
        assert (call.op, call.backend, call.kernels) == ("max_pool", "native", 1)
        assert call.bytes_read == 2 * x.numel() and call.bytes_written == 2 * y.numel()

    def test_meta_tensor_alone_is_the_reference_s(self):
        assert max_pool.plan(torch.empty(1, 8, 4, 4, device="meta"), 2).backend == "reference"

    def test_only_touched_elements_count_as_read(self, native, device):
        recorder = record.Recorder()
        with record.recording(recorder):
            max_pool(torch.ones(1, 4, 8, 9, device=device), 1, 2, backend="native")
        assert recorder.calls[0].bytes_read == 4 * 4 * 4 * 5


ONES = torch.ones(1, 8, 4, 4)
INVALID = {
    "rank": (ValueError, r"shape \[N, C, H, W\], got \[8, 4, 4\].*x\[None\]", lambda: (ONES[0], 2)),
    "dtype": (TypeError, "must be float32.*got torch.int64", lambda: (ONES.long(), 2)),
    "kernel": (ValueError, "kernel_size must be at least 1, got 0", lambda: (ONES, 0)),
    "kernel-type": (TypeError, "kernel_size must be an integer or a pair", lambda: (ONES, 2.0)),
    "kernel-rank": (
        TypeError,
        "kernel_size must be an integer or a pair",
        lambda: (ONES, (2, 2, 2)),
    ),
    "stride": (ValueError, r"stride must be at least 1, got \(1, 0\)", lambda: (ONES, 2, (1, 0))),
    "dilation": (ValueError, "dilation must be at least 1, got 0", lambda: (ONES, 2, 1, 0, 0)),
    "negative-padding": (ValueError, "padding must be at least 0", lambda: (ONES, 3, 1, -1)),
    "padding": (ValueError, "at most half of kernel_size, got padding 2", lambda: (ONES, 3, 1, 2)),
    "too-small": (ValueError, r"no window fits x of shape \[1, 8, 4, 4\]", lambda: (ONES, 5)),
    "no-channels": (
        ValueError,
        r"no window fits x of shape \[1, 0, 4, 4\]",
        lambda: (ONES[:, :0], 2),
    ),
    "no-rows": (ValueError, r"no window fits", lambda: (ONES[:, :, :0], 2, 2, 1)),
}


@pytest.mark.parametrize(("error", "message", "call"), INVALID.values(), ids=INVALID.keys())
def test_invalid_arguments(error, message, call):
    with pytest.raises(error, match=f"max_pool: .*{message}"):
        max_pool(*call())
    if error is ValueError:  # where max_pool2d refuses too
        x, *window = call()
        if x.dim() == 4:
            with pytest.raises((RuntimeError, ValueError)):
                F.max_pool2d(x, *window)


BUFFER = torch.ones(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
INVALID_OUT = {
    "shape": (ValueError, r"out must have shape \[1, 8, 4, 4\], got \[1, 8, 2, 2\]", (1, 8, 2, 2)),
    "dtype": (
        TypeError,
        "out must have x's dtype, torch.float32, got torch.float64",
        torch.float64,
    ),
    "device": (ValueError, "out must be on x's device, cpu, got meta", "meta"),
    "expanded": (ValueError, "out must not overlap itself", lambda x: x[:, :1].expand(-1, 8, 4, 4)),
    "same": (ValueError, "out must not overlap x", lambda x: x),
    "shifted": (ValueError, "out must not overlap x", lambda x: BUFFER[:, 4:12]),
}


@pytest.mark.parametrize(("error", "message", "out"), INVALID_OUT.values(), ids=INVALID_OUT.keys())
def test_invalid_out(error, message, out, implementation):
    x = BUFFER[:, :8]
    if callable(out):
        out = out(x)
    elif isinstance(out, tuple):
        out = torch.empty(out)
    elif isinstance(out, str):
        out = torch.empty(x.shape, device=out)
    else:
        out = torch.empty(x.shape, dtype=out)
    with pytest.raises(error, match=message):
        max_pool(x, *GROWING, out=out, backend=implementation)


def test_the_registered_op_checks_too(native, device):
    op = torch.ops.cvkernels.max_pool.default
    x = ONES.to(device)
    with pytest.raises(
        RuntimeError, match=r"max_pool: x must have 4 dimensions, got shape \[8, 4, 4\]"
    ):
        op(x[0], (2, 2), (2, 2), (0, 0), (1, 1), False)
    with pytest.raises(RuntimeError, match="padding must be between 0 and half .* got padding 2"):
        op(x, (2, 2), (2, 2), (2, 2), (1, 1), False)
    with pytest.raises(RuntimeError, match="max_pool: dtype must be float32, .* got Long"):
        op(x.long(), (2, 2), (2, 2), (0, 0), (1, 1), False)
    with pytest.raises(
        RuntimeError, match=r"out must have shape \[1, 8, 2, 2\], got \[1, 8, 4, 4\]"
    ):
        torch.ops.cvkernels.max_pool_out.default(
            x, (2, 2), (2, 2), (0, 0), (1, 1), False, torch.ones_like(x)
        )


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(native):
    x = torch.zeros(36, 1024, 256, 256, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1, -1, -1, -1] = 1
    y = max_pool(x, 2, backend="native")
    assert y[-1, -1, -1, -1] == 1 and y.sum() == 1
