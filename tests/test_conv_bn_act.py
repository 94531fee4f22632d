import itertools

import pytest
import torch
from cases_conv_bn_act import ODD, RESNET50, Conv, make_bn, make_inputs
from numerics import assert_matches, assert_matches_grad
from torch import nn

import cvkernels
from cvkernels import BackendError, record
from cvkernels.functional import BatchNormParams, DerivedWeights, conv_bn_act
from cvkernels.ops.conv_bn_act import native, onednn
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference

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


# The choice of a backend


def test_auto_on_cpu_follows_its_rule():
    args, kwargs = make_inputs(ODD["channels-not-8"])
    chosen = cvkernels.backend.chosen
    assert chosen("conv_bn_act", *args, **kwargs) == "native"
    gate = torch.rand(2, 13)
    assert chosen("conv_bn_act", *args, **kwargs, input_gate=gate) == "native"
    double = (args[0].double(), args[1].double(), *args[2:])
    assert chosen("conv_bn_act", *double, **kwargs) == "reference"
    args[1].requires_grad_()
    assert chosen("conv_bn_act", *args, **kwargs) == "reference"
    with torch.no_grad():
        assert chosen("conv_bn_act", *args, **kwargs) == "native"
    grouped, options = make_inputs(ODD["grouped"])
    assert chosen("conv_bn_act", *grouped, **options) == "onednn"
    gate = torch.rand(2, 16)
    assert chosen("conv_bn_act", *grouped, **options, input_gate=gate) == "reference"


def test_use_requests_and_a_call_overrules_it():
    args, kwargs = make_inputs(ODD["channels-not-8"])
    chosen = cvkernels.backend.chosen
    with cvkernels.backend.use("reference"):
        assert chosen("conv_bn_act", *args, **kwargs) == "reference"
        assert chosen("conv_bn_act", *args, **kwargs, backend="onednn") == "onednn"
    assert chosen("conv_bn_act", *args, **kwargs) == "native"


@pytest.mark.parametrize(
    ("backend", "name", "reason"),
    [("cudnn", "grouped", "needs CUDA tensors"), ("native", "grouped", "has no groups, got 4")],
)
def test_explicit_backend_runs_or_raises(backend, name, reason):
    args, kwargs = make_inputs(ODD[name])
    with pytest.raises(
        BackendError, match=f"conv_bn_act: backend '{backend}' cannot run.*{reason}"
    ):
        conv_bn_act(*args, **kwargs, backend=backend)


def test_unknown_backend_and_op_are_named():
    args, kwargs = make_inputs(ODD["channels-not-8"])
    with pytest.raises(ValueError, match="backend must be one of .* got 'magic'"):
        conv_bn_act(*args, **kwargs, backend="magic")
    with pytest.raises(ValueError, match="no op named 'conv_bn_atc'"):
        cvkernels.backend.chosen("conv_bn_atc", *args)


# Bad input


def bad(error, message, **change):
    """A change of good arguments, and the error that names it."""
    return change, error, message


BAD = {
    "rank": bad(ValueError, r"x must have shape \[N, C, H, W\].*unsqueeze", x=torch.rand(13, 9, 7)),
    "weight-rank": bad(ValueError, "weight must have shape", weight=torch.rand(11, 13)),
    "channels": bad(ValueError, "weight must have C/groups", weight=torch.rand(11, 12, 3, 3)),
    "groups": bad(ValueError, "groups must divide the channels", groups=2),
    "mixed-dtype": bad(
        TypeError, "weight must have x's dtype", weight=torch.rand(11, 13, 3, 3).half()
    ),
    "int-dtype": bad(
        TypeError, "dtype must be float32",
        x=torch.ones(2, 13, 9, 7, dtype=torch.int64),
        weight=torch.ones(11, 13, 3, 3, dtype=torch.int64),
    ),
    "device": bad(
        ValueError, "weight must be on x's device", weight=torch.empty(11, 13, 3, 3, device="meta")
    ),
    "bias-shape": bad(ValueError, r"bias must have shape \[11\], got \[12\]", bias=torch.rand(12)),
    "bn-module": bad(
        TypeError, "bn must be BatchNormParams, got BatchNorm2d", bn=nn.BatchNorm2d(11)
    ),
    "bn-shape": bad(
        ValueError, "bn.weight must have shape", bn=BatchNormParams(weight=torch.rand(7))
    ),
    "bn-half": bad(ValueError, "both mean and var", bn=BatchNormParams(mean=torch.rand(11))),
    "residual-shape": bad(
        ValueError, "residual must have shape", residual=torch.rand(2, 11, 9, 9)
    ),
    "residual-dtype": bad(
        TypeError, "residual must have x's dtype", residual=torch.rand(2, 11, 9, 7).half()
    ),
    "gate-shape": bad(
        ValueError, r"input_gate must have shape \[N, C\]", input_gate=torch.rand(2, 11)
    ),
    "input-bn-shape": bad(
        ValueError, "input_bn.weight must have shape", input_bn=make_bn(11)
    ),
    "act": bad(ValueError, "act must be one of", act="gelu"),
    "stride": bad(ValueError, "stride must be at least 1", stride=0),
    "stride-triple": bad(ValueError, "stride must be an int or two", stride=(1, 1, 1)),
    "padding-same": bad(ValueError, "padding must be an int or two.*'same'", padding="same"),
    "too-small": bad(ValueError, "does not fit into the map of 9x7", padding=0, dilation=5),
    "out-shape": bad(ValueError, "out must have shape", out=torch.rand(2, 10, 9, 7)),
    "out-layout": bad(ValueError, "out must have channel stride 1", out=torch.rand(2, 11, 9, 7)),
    "out-dtype": bad(
        TypeError, "out must have dtype",
        out=torch.rand(2, 11, 9, 7).half().contiguous(memory_format=torch.channels_last),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_by_name(case):
    change, error, message = case
    (x, weight, bias, bn), kwargs = make_inputs(ODD["channels-not-8"])
    arguments = {"x": x, "weight": weight, "bias": bias, "bn": bn, **kwargs, **change}
    with pytest.raises(error, match=f"conv_bn_act: .*{message}"):
        conv_bn_act(**arguments)


def test_overlapping_out_is_refused():
    buffer = torch.randn(2, 24, 5, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 16, 1, 1)
    with pytest.raises(ValueError, match="out overlaps x: .*write into other channels"):
        conv_bn_act(buffer[:, :16], weight, out=buffer[:, 15:23])


def test_out_with_gradient_is_refused():
    out = torch.empty(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    x = torch.rand(2, 16, 5, 6, requires_grad=True)
    with pytest.raises(ValueError, match="out= is not differentiable"):
        conv_bn_act(x, torch.randn(8, 16, 1, 1), out=out)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (nn.SyncBatchNorm(4), TypeError),
        (nn.InstanceNorm2d(4), TypeError),
        (nn.BatchNorm2d(4), ValueError),
    ],
    ids=["sync", "instance", "training"],
)
def test_only_an_exact_batch_norm_in_eval_is_taken(module, error):
    with pytest.raises(error, match="BatchNormParams.of: module"):
        BatchNormParams.of(module)


# Derived weights


def test_derived_weights_follow_every_change_of_the_parameters():
    (x, weight, bias, bn), kwargs = make_inputs(ODD["channels-not-8"])
    cache = DerivedWeights()

    def call():
        return conv_bn_act(x, weight, bias, bn, **kwargs, cache=cache)

    for change in (
        lambda: None,
        lambda: weight.mul_(2),
        lambda: bn.var.add_(1),
        lambda: bias.zero_(),
        lambda: bn.weight.copy_(torch.ones(11)),
    ):
        change()
        expected = conv_bn_act(x, weight, bias, bn, **kwargs)
        assert torch.equal(call(), expected)
        assert torch.equal(call(), expected)
    assert len(cache) == 1


@pytest.mark.parametrize(
    ("backend", "expected", "kept"), [(native, 1, 1), (onednn, 4, 2)], ids=["native", "onednn"]
)
def test_derived_weights_are_reused_and_bounded(backend, expected, kept, monkeypatch):
    """oneDNN packs weights for a size of the map; for the native convolution they are the same."""
    args, kwargs = make_inputs(ODD["channels-not-8"])
    folds, fold = [], backend.fold
    monkeypatch.setattr(backend, "fold", lambda *a: folds.append(1) or fold(*a))
    cache = DerivedWeights(capacity=2)
    name = backend.__name__.rpartition(".")[2]
    for size in itertools.chain([9, 9, 9], [10, 11, 12]):
        conv_bn_act(
            torch.randn(1, 13, size, 7), *args[1:], **kwargs, cache=cache, backend=name
        )  # fmt: skip
    assert len(folds) == expected and len(cache) == kept


def test_explain_reports_the_call(device):
    args, kwargs = make_inputs(
        ODD["channels-not-8"], memory_format=torch.channels_last, device=device
    )
    with record.recording(record.Recorder()) as recorder, torch.no_grad():
        out = conv_bn_act(*args, **kwargs)
    (call,) = recorder.calls
    x, weight = args[:2]
    assert (call.op, call.kernels) == ("conv_bn_act", 1)
    assert call.bytes_read == x.nbytes + weight.nbytes + 5 * 11 * 4
    assert call.bytes_written == out.nbytes
