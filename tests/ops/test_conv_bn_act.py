"""conv_bn_act against its reference: shapes, options, gradients, registration, compilation."""

import pytest
import torch

from cvkernels import BackendError
from cvkernels.functional import DerivedWeights, conv_bn_act
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from tests.support.cases.conv_bn_act import (
    ODD,
    RESNET50,
    TILED,
    add_residual,
    make_bn,
    make_inputs,
)
from tests.support.numerics import assert_matches, assert_matches_grad, tensors_in

pytestmark = pytest.mark.fast

ACTS = ("none", "relu", "relu6", "silu")
FUSED = ["triton", "cudnn"] if torch.cuda.is_available() else ["native", "onednn", "triton"]


def run(backend, **fixed):
    """conv_bn_act on one backend; a call that it refuses is skipped with its reason."""

    def op(*args, **kwargs):
        try:
            return conv_bn_act(*args, **kwargs, **fixed, backend=backend)
        except BackendError as refusal:
            pytest.skip(str(refusal))

    return op


@pytest.mark.parametrize("conv", RESNET50.values(), ids=RESNET50.keys())
def test_resnet50_shapes_match_reference(conv, device):
    args, kwargs = make_inputs(conv, memory_format=torch.channels_last, device=device)
    assert_matches(
        run("cudnn" if device.type == "cuda" else "native"), conv_bn_act_reference, args, kwargs
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("conv", RESNET50.values(), ids=RESNET50.keys())
@pytest.mark.parametrize("backend", ["triton", "cudnn"])
def test_resnet50_shapes_match_reference_on_gpu(backend, conv, dtype):
    args, kwargs = make_inputs(conv, dtype, torch.channels_last, "cuda")
    assert_matches(run(backend), conv_bn_act_reference, args, add_residual(args, kwargs))


@pytest.mark.gpu
def test_cudnn_reads_nothing_of_the_memory_that_it_writes():
    """Its fused op takes the output for the summand that is multiplied by 0, too."""
    args, kwargs = make_inputs(
        RESNET50["layer2.1.conv2"], torch.bfloat16, torch.channels_last, "cuda"
    )
    out = run("cudnn")(*args, **kwargs)
    for _ in range(3):
        poison = [torch.full_like(out, torch.nan) for _ in range(8)]
        del poison
        assert torch.equal(run("cudnn")(*args, **kwargs), out)


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("conv", ODD.values(), ids=ODD.keys())
def test_odd_shapes_match_reference(conv, act, backend, memory_format, device):
    args, kwargs = make_inputs(conv, memory_format=memory_format, device=device)
    kwargs = {**add_residual(args, kwargs), "act": act}
    assert_matches(run(backend), conv_bn_act_reference, args, kwargs)


# What input_bn is without; its shift is positive, so that padding applied before it would show.
PROLOGUES = {
    "bn": (), "affine": ("mean", "var"), "no-weight": ("weight",), "no-shift": ("bias",),
    "statistics": ("weight", "bias"), "shift": ("weight", "mean", "var"),
}  # fmt: skip


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", [name for name in FUSED if name != "onednn"])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gate"])
@pytest.mark.parametrize("prologue", [None, *PROLOGUES])
@pytest.mark.parametrize(
    "conv", ["1x1", "1x1-stride", "pointwise-odd", "padded-pointwise", "3x3", "channels-not-8",
             "stem-3x3", "groups-of-4"],
)  # fmt: skip
def test_prologue_runs_before_padding(conv, prologue, gated, backend, memory_format, device):
    conv = (ODD | TILED)[conv]
    args, kwargs = make_inputs(conv, memory_format=memory_format, device=device)
    if prologue is not None:
        norm = make_bn(conv.C, device=device)
        norm = norm._replace(bias=torch.full_like(norm.bias, 2.0))
        kwargs["input_bn"] = norm._replace(**dict.fromkeys(PROLOGUES[prologue]))
    if gated:
        kwargs["input_gate"] = torch.rand(conv.N, conv.C, device=device)
    for cache in (None, DerivedWeights()):
        assert_matches(run(backend, cache=cache), conv_bn_act_reference, args, kwargs)


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", [name for name in FUSED if name not in ("onednn", "cudnn")])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("conv", ["1x1", "pointwise-odd", "3x3", "channels-not-8", "stem-3x3"])
def test_gates_of_the_output_come_before_the_residual(
    conv, act, residual, backend, memory_format, device
):
    conv = (ODD | TILED)[conv]
    args, kwargs = make_inputs(conv, memory_format=memory_format, device=device)
    kwargs["output_gate"] = torch.rand(conv.N, conv.K, device=device)
    kwargs = {**(add_residual(args, kwargs) if residual else kwargs), "act": act}
    for cache in (None, DerivedWeights()):
        assert_matches(run(backend, cache=cache), conv_bn_act_reference, args, kwargs)


def test_a_gate_of_the_output_is_of_the_convolution_alone(device):
    """Of what the projection adds there is none."""
    args, kwargs = make_inputs(ODD["pointwise-odd"], device=device)
    gate = torch.rand(args[0].shape[0], args[1].shape[0], device=device)
    other, filters = args[0][:, :9] + 1, torch.randn(args[1].shape[0], 9, 1, 1, device=device)
    y = conv_bn_act(*args, **kwargs, residual=other, projection=filters, output_gate=gate)
    added = torch.nn.functional.conv2d(other, filters)
    expected = conv_bn_act_reference(*args, **kwargs, residual=added, output_gate=gate)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_out_writes_its_slice_and_nothing_else(backend, device):
    conv = ODD["pointwise-odd"]
    args, kwargs = make_inputs(conv, memory_format=torch.channels_last, device=device)
    buffer = torch.full((conv.N, 40, conv.H, conv.W), 7.0, device=device)
    buffer = buffer.contiguous(memory_format=torch.channels_last)
    out = buffer[:, 5 : 5 + conv.K]

    def into_slice(*args, **kwargs):
        out.fill_(torch.nan)
        result = run(backend, out=out)(*args, **kwargs)
        assert result is out
        return out.clone()

    assert_matches(into_slice, conv_bn_act_reference, args, kwargs)
    assert torch.equal(buffer[:, :5], torch.full_like(buffer[:, :5], 7.0))
    assert torch.equal(buffer[:, 5 + conv.K :], torch.full_like(buffer[:, 5 + conv.K :], 7.0))


def test_reads_a_prefix_and_writes_behind_it_in_one_buffer(device):
    buffer = torch.randn(2, 24, 5, 6, device=device).contiguous(memory_format=torch.channels_last)
    weight, bn = torch.randn(8, 16, 1, 1, device=device), make_bn(8, device=device)
    kept = buffer[:, :16].clone()
    conv_bn_act(buffer[:, :16], weight, None, bn, out=buffer[:, 16:], backend="reference")
    expected = conv_bn_act_reference(kept, weight, None, bn)
    assert torch.equal(buffer[:, :16], kept) and torch.equal(buffer[:, 16:], expected)


@pytest.mark.parametrize("backend", FUSED)
def test_output_is_channels_last_in_the_inputs_dtype(backend, memory_format, device):
    args, kwargs = make_inputs(ODD["grouped"], memory_format=memory_format, device=device)
    out = run(backend)(*args, **kwargs)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == args[0].dtype


def test_nan_comes_through(device):
    args, kwargs = make_inputs(ODD["stem-small"], device=device)
    args[0][0, 0, 3, 3] = torch.nan
    out = conv_bn_act(*args, **kwargs)
    assert torch.equal(out.isnan(), conv_bn_act_reference(*args, **kwargs).isnan())
    assert out.isnan().any()


@pytest.mark.parametrize("where", ["native", "triton"], indirect=True)
@pytest.mark.parametrize("act", ACTS)
def test_nan_of_one_pixel_stays_there(act, where):
    x = torch.randn(1, 24, 6, 6, device=where).contiguous(memory_format=torch.channels_last)
    x[0, 5, 2, 3] = torch.nan
    y = conv_bn_act(x, torch.randn(12, 24, 1, 1, device=where), act=act)
    assert y[0, :, 2, 3].isnan().all() and y.isnan().sum() == 12
    y = conv_bn_act(x, torch.randn(12, 24, 3, 3, device=where), padding=1, act=act)
    assert y[0, :, 1:4, 2:5].isnan().all() and not y[0, :, 5].isnan().any()


GRAD_CASES = {
    "3x3-relu": (ODD["channels-not-8"], "relu", ()),
    "1x1-none": (ODD["pointwise-odd"], "none", ()),
    "grouped-relu6": (ODD["grouped"], "relu6", ()),
    "dilated-silu": (ODD["dilated"], "silu", ()),
    "strided-relu": (ODD["strided-pointwise"], "relu", ()),
    "1x1-prologue": (ODD["pointwise-odd"], "relu", ("input_bn", "input_gate")),
    "3x3-gate-silu": (ODD["channels-not-8"], "silu", ("input_gate",)),
    "1x1-output-gate": (ODD["pointwise-odd"], "relu", ("output_gate",)),
    "3x3-gates-silu": (ODD["channels-not-8"], "silu", ("input_gate", "output_gate")),
}


@pytest.mark.parametrize("case", GRAD_CASES.values(), ids=GRAD_CASES.keys())
@pytest.mark.parametrize("backend", FUSED)
def test_gradients_match_reference(case, backend, device):
    conv, act, others = case
    args, kwargs = make_inputs(conv, device=device)
    kwargs = add_residual(args, kwargs) | {"act": act}
    if "input_bn" in others:
        kwargs["input_bn"] = make_bn(conv.C, device=device)
    for name, channels in (("input_gate", conv.C), ("output_gate", conv.K)):
        if name in others:
            kwargs[name] = torch.rand(conv.N, channels, device=device).requires_grad_()
    norms = [bn for bn in (args[3], kwargs.get("input_bn")) if bn is not None]
    for leaf in tensors_in([args[:3], [bn[:2] for bn in norms], kwargs["residual"]]):
        leaf.requires_grad_()
    assert_matches_grad(run(backend), conv_bn_act_reference, args, kwargs)
