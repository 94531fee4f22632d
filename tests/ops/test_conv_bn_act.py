"""conv_bn_act against its reference: shapes, options, gradients, registration, compilation."""

import pytest
import torch

from cvkernels import BackendError
from cvkernels.functional import BatchNormParams, conv_bn_act
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from tests.support.cases.conv_bn_act import ODD, RESNET50, Conv, make_bn, make_inputs
from tests.support.numerics import assert_matches, assert_matches_grad

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


def with_residual(args, kwargs):
    out = conv_bn_act_reference(*args, **kwargs)
    return {**kwargs, "residual": torch.randn_like(out)}


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
    assert_matches(run(backend), conv_bn_act_reference, args, with_residual(args, kwargs))


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


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("conv", ODD.values(), ids=ODD.keys())
def test_odd_shapes_match_reference(conv, act, backend, memory_format, device):
    args, kwargs = make_inputs(conv, memory_format=memory_format, device=device)
    kwargs = {**with_residual(args, kwargs), "act": act}
    assert_matches(run(backend), conv_bn_act_reference, args, kwargs)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dropped", ["bias", "bn", "weight", "shift", "statistics", "all"])
def test_every_vector_is_optional(dropped, backend, device):
    (x, weight, bias, bn), kwargs = make_inputs(ODD["channels-not-8"], device=device)
    if dropped in ("bias", "all"):
        bias = None
    bn = {
        "bn": None,
        "all": None,
        "weight": bn._replace(weight=None),
        "shift": bn._replace(bias=None),
        "statistics": bn._replace(mean=None, var=None),
    }.get(dropped, bn)
    assert_matches(run(backend), conv_bn_act_reference, (x, weight, bias, bn), kwargs)


@pytest.mark.parametrize("conv", [ODD["pointwise-odd"], ODD["channels-not-8"]], ids=["1x1", "3x3"])
@pytest.mark.parametrize("prologue", ["bn", "affine", "gate", "bn+gate"])
def test_prologue_runs_before_padding(conv, prologue, device):
    args, kwargs = make_inputs(conv, memory_format=torch.channels_last, device=device)
    if "bn" in prologue or prologue == "affine":
        # A positive shift: padding applied before the affine would show.
        kwargs["input_bn"] = make_bn(conv.C, device=device)._replace(
            bias=torch.full((conv.C,), 2.0, device=device)
        )
    if prologue == "affine":
        kwargs["input_bn"] = kwargs["input_bn"]._replace(mean=None, var=None)
    if "gate" in prologue:
        kwargs["input_gate"] = torch.rand(conv.N, conv.C, device=device)
    assert_matches(run("triton"), conv_bn_act_reference, args, kwargs)


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


GRAD_CASES = {
    "3x3-relu": (ODD["channels-not-8"], "relu", ()),
    "1x1-none": (ODD["pointwise-odd"], "none", ()),
    "grouped-relu6": (ODD["grouped"], "relu6", ()),
    "dilated-silu": (ODD["dilated"], "silu", ()),
    "strided-relu": (ODD["strided-pointwise"], "relu", ()),
    "1x1-prologue": (ODD["pointwise-odd"], "relu", ("input_bn", "input_gate")),
    "3x3-gate-silu": (ODD["channels-not-8"], "silu", ("input_gate",)),
}


@pytest.mark.parametrize("case", GRAD_CASES.values(), ids=GRAD_CASES.keys())
@pytest.mark.parametrize("backend", FUSED)
def test_gradients_match_reference(case, backend, device):
    conv, act, prologue = case
    (x, weight, bias, bn), kwargs = make_inputs(conv, device=device)
    kwargs = {**with_residual((x, weight, bias, bn), kwargs), "act": act}
    if "input_bn" in prologue:
        kwargs["input_bn"] = make_bn(conv.C, device=device)
    if "input_gate" in prologue:
        kwargs["input_gate"] = torch.rand(conv.N, conv.C, device=device)
    for tensor in (
        x,
        weight,
        bias,
        bn.weight,
        bn.bias,
        kwargs["residual"],
        kwargs.get("input_gate"),
    ):
        if tensor is not None:
            tensor.requires_grad_()
    if "input_bn" in kwargs:
        kwargs["input_bn"].weight.requires_grad_()
        kwargs["input_bn"].bias.requires_grad_()
    assert_matches_grad(run(backend), conv_bn_act_reference, (x, weight, bias, bn), kwargs)


@pytest.mark.parametrize("act", ACTS)
def test_gradient_formula_is_exact_in_float64(act):
    (x, weight, bias, bn), kwargs = make_inputs(
        Conv(2, 3, 3, 2, 3, 3, 1, 1, groups=2), torch.float64
    )
    bn = BatchNormParams(*(v.double() for v in bn[:4]), bn.eps)
    gate = torch.rand(2, 2, dtype=torch.float64)
    input_bn = BatchNormParams(*(v.double() for v in make_bn(2)[:4]))
    residual = torch.randn_like(x)
    leaves = [
        x,
        weight,
        bias.double(),
        bn.weight,
        bn.bias,
        residual,
        input_bn.weight,
        input_bn.bias,
        gate,
    ]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def op(x, weight, bias, bn_weight, bn_bias, residual, in_weight, in_bias, gate):
        return torch.ops.cvkernels.conv_bn_act(
            x, weight, bias, bn_weight, bn_bias, bn.mean, bn.var, bn.eps, [1, 1], [1, 1], [1, 1], 2,
            act, residual, in_weight, in_bias, input_bn.mean, input_bn.var, input_bn.eps, gate,
            "reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


def test_unneeded_gradients_are_not_computed(device):
    (x, weight, bias, bn), kwargs = make_inputs(ODD["pointwise-odd"], device=device)
    x.requires_grad_()
    out = run(FUSED[0])(x, weight, bias, bn, **kwargs)
    out.sum().backward()
    assert x.grad is not None and weight.grad is None


def opcheck_arguments(backend, requires_grad):
    (x, weight, bias, bn), kwargs = make_inputs(ODD["grouped"])
    residual = torch.randn(conv_bn_act_reference(x, weight, bias, bn, **kwargs).shape)
    for leaf in (x, weight, bias, residual):
        leaf.requires_grad_(requires_grad)
    return (
        x, weight, bias, *bn, [1, 1], [1, 1], [1, 1], 4, "relu", residual,
        None, None, None, None, 1e-5, None, backend,
    )  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend, requires_grad):
    torch.library.opcheck(
        torch.ops.cvkernels.conv_bn_act.default, opcheck_arguments(backend, requires_grad)
    )


def test_opcheck_out():
    args = opcheck_arguments("reference", False)
    out = torch.empty(args[13].shape, memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.cvkernels.conv_bn_act_out.default, (*args, out))


@pytest.mark.parametrize("backend", ["auto", "onednn"])
def test_compiles_in_one_graph(backend):
    args, kwargs = make_inputs(ODD["channels-not-8"])

    def function(*args):
        return conv_bn_act(*args, **kwargs, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_matches(
            lambda *a: compiled(*a), lambda *a: conv_bn_act_reference(*a, **kwargs), args
        )


def test_autocast_computes_in_its_dtype(device):
    args, kwargs = make_inputs(ODD["channels-not-8"], device=device)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        out = conv_bn_act(*args, **kwargs)
        expected = conv_bn_act_reference(*args, **kwargs)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(out, expected, atol=0.1, rtol=0.05)
