"""dense_concat against torch.cat and stock batch norm: every promise of its docstring."""

import pytest
import torch

from cvkernels import record
from cvkernels.functional import BatchNormParams, dense_concat
from cvkernels.ops.dense_concat.reference import dense_concat_reference
from tests.support.numerics import assert_matches, assert_same_numbers

pytestmark = pytest.mark.fast

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# N, H, W, then the buffer's channels, the source's, and where it starts
SHAPES = {
    "densenet121-block1": (2, 14, 14, 128, 32, 96),
    "densenet161-block4": (1, 7, 7, 240, 48, 192),
    "googlenet-3a": (2, 14, 14, 256, 32, 192),
    "first": (2, 5, 9, 48, 16, 0),
    "odd": (3, 5, 9, 37, 17, 11),  # nothing divides a vector
    "one-channel": (2, 9, 7, 5, 1, 3),
    "one-pixel": (2, 1, 1, 64, 32, 32),
    "whole-buffer": (2, 6, 6, 24, 24, 0),
    "wide": (1, 2, 3, 1200, 1100, 50),  # more packs of channels than a block has threads
    "empty-batch": (0, 14, 14, 64, 32, 32),
    "no-channels": (2, 4, 4, 16, 0, 16),
}


def make(shape, dtype, memory_format, device, src_format=None):
    N, H, W, total, C, start = shape
    buffer = torch.randn(N, total, H, W, device=device).to(dtype)
    src = torch.randn(N, C, H, W, device=device).to(dtype)
    buffer = buffer.contiguous(memory_format=memory_format)
    return buffer, src.contiguous(memory_format=src_format or memory_format), start


def make_bn(C, dtype=torch.float32, device="cpu"):
    weight, bias, mean = torch.randn(3, C, device=device).to(dtype)
    return BatchNormParams(weight, bias, mean, torch.rand(C, device=device).to(dtype) + 0.5, 1e-3)


def on_a_copy(buffer, *args, **kwargs):
    """dense_concat as a function: what it leaves in a copy of buffer."""
    return dense_concat(buffer.clone(), *args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_moves_bits(shape, dtype, memory_format, implementation, device):
    buffer, src, start = make(shape, dtype, memory_format, device)
    if src.numel():
        src[0, 0, 0, 0] = torch.nan
    expected = dense_concat_reference(buffer, src, start)
    assert dense_concat(buffer, src, start, backend=implementation) is buffer
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(buffer.view(kind), expected.contiguous().view(kind))


# PyTorch's batch norm takes no map without channels.
NORMED = {name: shape for name, shape in SHAPES.items() if name != "no-channels"}


@pytest.mark.parametrize("relu", [False, True], ids=["affine", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORMED.values(), ids=NORMED.keys())
def test_norm_and_relu_match_the_reference(
    shape, dtype, relu, memory_format, implementation, device
):
    buffer, src, start = make(shape, dtype, memory_format, device)
    args = (buffer, src, start, make_bn(src.shape[1], device=device), relu)
    assert_matches(
        lambda *a: on_a_copy(*a, backend=implementation if a[0].dtype == dtype else "reference"),
        dense_concat_reference,
        args,
    )


@pytest.mark.parametrize("vectors", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_vectors_of_any_dtype_and_float64(vectors, dtype, memory_format, native):
    buffer, src, start = make(SHAPES["odd"], dtype, memory_format, "cpu")
    wide = torch.promote_types(dtype, torch.float32)
    bn = make_bn(17, vectors)
    as_wide = BatchNormParams(*(v.to(wide) for v in bn[:4]), bn.eps)
    assert_matches(
        lambda *args: on_a_copy(buffer, src, start, bn, True, backend="native"),
        lambda buffer, src: dense_concat_reference(
            buffer, src, start, BatchNormParams(*(v.to(src.dtype) for v in as_wide[:4]), bn.eps)
            if src.dtype == torch.float64 else as_wide, True,
        ),
        (buffer, src),
    )  # fmt: skip


PARTS = {
    "relu-alone": (None, True),
    "weight": (BatchNormParams(weight=torch.tensor([2.0, -1.0, 0.5])), False),
    "bias": (BatchNormParams(bias=torch.tensor([2.0, -1.0, 0.5])), True),
    "statistics": (
        BatchNormParams(None, None, torch.tensor([0.0, 1, -1]), torch.tensor([1.0, 4, 0.25])),
        True,
    ),
    "every-second-of-a-vector": (BatchNormParams(weight=torch.arange(6.0)[::2]), False),
}


@pytest.mark.parametrize(("bn", "relu"), PARTS.values(), ids=PARTS.keys())
def test_parts_of_a_norm(bn, relu, memory_format, implementation, device):
    if bn is not None:
        bn = BatchNormParams(*(v if v is None else v.to(device) for v in bn[:4]), bn.eps)
    args = (*make((2, 4, 5, 8, 3, 4), torch.float32, memory_format, device), bn, relu)
    assert_matches(lambda *a: on_a_copy(*a, backend=implementation), dense_concat_reference, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_nan_and_infinity_go_through(relu, dtype, memory_format, implementation, device):
    buffer, src, start = make((2, 6, 7, 24, 16, 8), dtype, memory_format, device)
    for value, (h, w) in zip(
        (torch.nan, torch.inf, -torch.inf, -0.0), ((0, 0), (1, 2), (3, 4), (5, 6)), strict=True
    ):
        src[:, :, h, w] = value
    bn = BatchNormParams(weight=torch.full((16,), 2.0, device=device))
    y = dense_concat(buffer, src, start, bn, relu, backend=implementation)[:, 8:]
    assert y[:, :, 0, 0].isnan().all() and y.isnan().sum() == 32
    assert (y[:, :, 1, 2] == torch.inf).all()
    assert (y[:, :, 3, 4] == (0.0 if relu else -torch.inf)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_widens_and_rounds_as_in_torch(dtype, native, device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    src = bits.view(dtype).view(1, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    src = src.to(device)
    # Products with 17 bits that need rounding, to subnormals and to infinity too.
    for factor in (1.0, 1.0009765625, 0.3333, 3.1e-5, 70000.0):
        scale = torch.full((64,), factor, device=device)
        buffer = torch.empty_like(src)
        y = dense_concat(buffer, src, 0, BatchNormParams(weight=scale), backend="native")
        expected = (src.float() * factor + 0.0).to(dtype)
        assert_same_numbers(y, expected)


VIEWS = {
    "channel-slice": lambda t: t[:, 8:40],
    "unaligned-channel-slice": lambda t: t[:, 3:35],
    "every-second-channel": lambda t: t[:, ::2][:, :32],
    "window-of-an-image": lambda t: t[:, :32, 2:9, 1:8],
    "every-second-column": lambda t: t[:, :32, :, ::2],
    "transposed": lambda t: t[:, :32].transpose(2, 3),
    "one-row": lambda t: t[:, :32, 3:4],
    "one-column": lambda t: t[:, :32, :, 3:4],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("layouts", ["nchw-nchw", "nchw-nhwc", "nhwc-nchw", "nhwc-nhwc"])
@pytest.mark.parametrize("norm", [False, True], ids=["copy", "norm"])
def test_any_strides_of_both(view, layouts, norm, implementation, device):
    formats = dict(nchw=torch.contiguous_format, nhwc=torch.channels_last)
    to, fro = (formats[name] for name in layouts.split("-"))
    src = view(torch.randn(2, 64, 11, 12, device=device).contiguous(memory_format=fro))
    N, C, H, W = src.shape
    whole = torch.randn(N, 70, H + 1, W + 2, device=device).contiguous(memory_format=to)
    expected, buffer = whole.clone(), whole[:, 2:, 1:, 1:-1]
    bn = make_bn(C, device=device) if norm else None
    expected[:, 2:, 1:, 1:-1] = dense_concat_reference(buffer, src, 7, bn, norm)
    dense_concat(buffer, src, 7, bn, norm, backend=implementation)
    if norm:
        torch.testing.assert_close(whole, expected)
    else:
        assert torch.equal(whole, expected)


def test_source_may_be_broadcast(implementation, device):
    buffer = torch.zeros(3, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    src = torch.randn(1, 8, 1, 1, device=device).expand(3, -1, 4, 4)
    expected = dense_concat_reference(buffer, src, 4)
    assert torch.equal(dense_concat(buffer, src, 4, backend=implementation), expected)


def test_source_beside_the_slice_in_one_buffer(implementation, device):
    buffer = torch.randn(2, 48, 9, 9, device=device).contiguous(memory_format=torch.channels_last)
    expected = dense_concat_reference(buffer, buffer[:, :16].clone(), 16)
    dense_concat(buffer, buffer[:, :16], 16, backend=implementation)
    assert torch.equal(buffer, expected)


def test_autograd_notices_the_write(implementation, device):
    buffer = torch.ones(1, 8, 3, 3, device=device)
    weight = torch.ones(1, 8, 3, 3, device=device, requires_grad=True)
    loss = (weight * buffer).sum()
    dense_concat(buffer, torch.ones(1, 4, 3, 3, device=device), 4, backend=implementation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class TestChoice:
    def test_meta_tensors_are_planned_as_cuda_under_explain(self):
        with torch.device("meta"):
            args = make(SHAPES["odd"], torch.bfloat16, torch.channels_last, "meta")
            bn = make_bn(17, device="meta")
        recorder = record.Recorder()
        with record.recording(recorder):
            dense_concat(*args, bn)
        (call,) = recorder.calls
        assert (call.op, call.backend, call.kernels) == ("dense_concat", "native", 1)
        assert call.bytes_written == 2 * args[1].numel()
        assert call.bytes_read == 2 * args[1].numel() + 4 * 4 * 17


BUFFER = torch.ones(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
SRC = torch.ones(1, 8, 4, 4)
VECTOR = torch.ones(8)
INVALID = {
    "buffer-rank": (ValueError, r"buffer must have shape \[N, C, H, W\]", (BUFFER[0], SRC, 0)),
    "src-rank": (ValueError, r"got \[8, 4, 4\].*src\[None\]", (BUFFER, SRC[0], 0)),
    "dtype": (TypeError, "buffer must be float32.*int64", (BUFFER.long(), SRC.long(), 0)),
    "dtypes": (TypeError, "src must have buffer's dtype, torch.float32, got torch.float64",
               (BUFFER, SRC.double(), 0)),
    "device": (ValueError, "src must be on buffer's device, cpu, got meta",
               (BUFFER, SRC.to("meta"), 0)),
    "map": (ValueError, r"N, H and W, got shape \[1, 8, 3, 4\] for a buffer of \[1, 16, 4, 4\]",
            (BUFFER, SRC[:, :, :3], 0)),
    "batch": (ValueError, "must have buffer's N, H and W", (BUFFER, SRC.expand(2, -1, -1, -1), 0)),
    "negative": (ValueError, r"channels \[-1, 7\) are not within the buffer's 16",
                 (BUFFER, SRC, -1)),
    "too-small": (ValueError, r"channels \[9, 17\) are not within the buffer's 16",
                  (BUFFER, SRC, 9)),
    "expanded": (ValueError, r"buffer must not overlap itself, got strides \[\d+, 0, 4, 1\]",
                 (SRC[:, :1].contiguous().expand(-1, 16, -1, -1), SRC, 0)),
    "overlap": (ValueError, r"src overlaps the channels \[4, 12\)", (BUFFER, BUFFER[:, :8], 4)),
    "same": (ValueError, r"src overlaps the channels \[0, 8\)", (BUFFER, BUFFER[:, :8], 0)),
    "bn-kind": (TypeError, "bn must be BatchNormParams, got tuple", (BUFFER, SRC, 0, (VECTOR,))),
    "bn-half": (ValueError, "bn must have both mean and var",
                (BUFFER, SRC, 0, BatchNormParams(mean=VECTOR))),
    "bn-shape": (ValueError, r"bn.weight must have shape \[8\], got \[3\]",
                 (BUFFER, SRC, 0, BatchNormParams(weight=VECTOR[:3]))),
    "bn-dtype": (TypeError, "bn.bias must have a floating dtype, got torch.int64",
                 (BUFFER, SRC, 0, BatchNormParams(bias=VECTOR.long()))),
    "bn-device": (ValueError, "bn.bias must be on x's device cpu, got meta",
                  (BUFFER, SRC, 0, BatchNormParams(bias=VECTOR.to("meta")))),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "args"), INVALID.values(), ids=INVALID.keys())
def test_invalid_arguments(error, message, args, implementation):
    with pytest.raises(error, match=f"dense_concat: .*{message}"):
        dense_concat(*args, backend=implementation)


@pytest.mark.parametrize("which", ["buffer", "src", "bn"])
def test_tensors_that_need_a_gradient_are_refused(which, implementation, device):
    parts = dict(
        buffer=torch.zeros(1, 8, 3, 3, device=device),
        src=torch.ones(1, 4, 3, 3, device=device),
        bn=torch.ones(4, device=device),
    )
    parts[which].requires_grad_()
    args = (parts["buffer"], parts["src"], 4, BatchNormParams(weight=parts["bn"]))
    with pytest.raises(ValueError, match=r"requires? a gradient.*under torch.no_grad"):
        dense_concat(*args, backend=implementation)
    with torch.no_grad():
        assert dense_concat(*args, backend=implementation).sum() == 36


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(native):
    buffer = torch.zeros(36, 1032, 256, 256, dtype=torch.float16, device="cuda")
    buffer = buffer.contiguous(memory_format=torch.channels_last)
    src = torch.ones(36, 8, 256, 256, dtype=torch.float16, device="cuda")
    dense_concat(buffer, src.contiguous(memory_format=torch.channels_last), 1024, backend="native")
    assert buffer[:, 1024:].amin() == 1 and buffer[:, :1024].amax() == 0
