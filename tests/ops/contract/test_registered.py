"""Every registered op: what torch.library asks of it, and that it checks what it is given."""

import pytest
import torch
from torch.library import opcheck

from tests.ops.conftest import skip_without_native
from tests.support.cases.registered import registered_calls
from tests.support.numerics import map_floats

VIEWS = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x,
    "slice": lambda x: x[:, 2:9],
    "one-channel": lambda x: x[:, :1],
    "empty": lambda x: x[:0],
}
OPS = sorted(registered_calls(torch.ones(1, 8, 2, 2)))
# See tests/build/test_halo_on_host.py and test_cuda_on_host.py.
ON_CUDA_ALONE = {"conv_bn_act_halo", "depthwise_conv_bn_act_cuda"}
COMPILED = ("native", "quantised", "batch_norm")
PUBLIC = [op for op in OPS if not any(part in op for part in COMPILED)]
# Those with a norm or none, and those that are differentiable.
NORMED = [op for op in PUBLIC if op.startswith(("avg_pool", "dense_concat", "conv", "depthwise"))]
LEARNING = ["conv_bn_act", "depthwise_conv_bn_act", "depthwise_conv_bn_act_squeeze", "squeeze",
            "excite", "se_scale", "squeeze_excite"]  # fmt: skip


def views_of(op):
    """Those that the op takes: compiled parts are given what their callers made fit."""
    if op.startswith("batch_norm_act") or op.endswith(("_sums", "_shifted", "_weight_gradient")):
        return ["nhwc", "slice"] if op.startswith("batch_norm_act") else ["nhwc"]
    if "quantised" in op:
        return ["nhwc", "one-channel"]
    return ["nchw", "nhwc"] if "native" in op else list(VIEWS)


@pytest.fixture
def where(request, device):
    """What the op's tensors are on: of the compiled parts with a CPU version alone, the CPU."""
    skip_without_native(request)
    op = request.getfixturevalue("op")
    return device if op.startswith(("max", "avg", "dense", "batch")) else torch.device("cpu")


def make_x(device, shape=(2, 16, 5, 6)):
    return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)


def test_the_table_has_every_registered_op(native):
    names = (schema.name.split("::") for schema in torch._C._jit_get_all_schemas())
    registered = {name for library, name in names if library == "cvkernels"}
    unwritten = {"recycled"}  # its result may hold anything: nn/test_recycled.py
    assert registered == set(OPS) | ON_CUDA_ALONE | unwritten


def leaves_of(arguments):
    """The tensors that have a gradient, requiring one."""
    return {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and not name.endswith(("mean", "var"))
    }


@pytest.mark.parametrize(("op", "view"), [(op, view) for op in OPS for view in views_of(op)])
def test_opcheck(op, view, where):
    arguments = registered_calls(VIEWS[view](make_x(where)))[op]
    opcheck(getattr(torch.ops.cvkernels, op).default, (), arguments)


@pytest.mark.parametrize("op", NORMED)
def test_opcheck_without_a_norm(op, where):
    arguments = registered_calls(make_x(where), norm=False)[op]
    opcheck(getattr(torch.ops.cvkernels, op).default, (), arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", LEARNING)
def test_opcheck_with_gradients(op, backend, where):
    arguments = registered_calls(make_x(where))[op] | {"backend": backend}
    opcheck(getattr(torch.ops.cvkernels, op).default, (), arguments | leaves_of(arguments))


FORMULAS = [
    *((op, {"act": act}) for op in LEARNING[:3] for act in ("none", "relu", "relu6", "silu")),
    *((op, {"act": act}) for op in ("se_scale", "excite") for act in ("relu", "silu")),
    *(("squeeze_excite", {"out_act": act, "act": "silu"}) for act in ("none", "relu", "silu")),
    ("se_scale", {"act": "none"}),
    ("excite", {"act": "silu", "sigmoid": False}),
    ("squeeze", {}),
]


@pytest.mark.parametrize(("op", "options"), FORMULAS, ids=str)
def test_gradient_formulas_are_exact_in_float64(op, options):
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    arguments = map_floats(torch.Tensor.double, registered_calls(x)[op])
    arguments |= options | {"backend": "reference"}
    leaves = leaves_of(arguments)

    def run(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return getattr(torch.ops.cvkernels, op)(**arguments | named)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, tuple(leaves.values()))


class Ignore(torch.autograd.Function):
    """The first of two values; the other gets no gradient."""

    @staticmethod
    def forward(ctx, used, unused):
        ctx.set_materialize_grads(False)
        return used.clone(), unused.clone()

    @staticmethod
    def backward(ctx, grad, _):
        return grad, None


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("op", LEARNING)
def test_missing_gradients_stay_missing(op, where):
    """A gradient of zeros would let weight decay move what the loss leaves out."""
    arguments = registered_calls(make_x(where))[op]
    leaves = leaves_of(arguments)
    result = as_tuple(getattr(torch.ops.cvkernels, op)(**arguments | leaves))[0]
    used = result.detach().clone().requires_grad_()
    Ignore.apply(used, result)[0].sum().backward()
    assert used.grad is not None and all(leaf.grad is None for leaf in leaves.values())


# By op, what its error says and the change of good arguments, on x[2, 8, 4, 4], that it names.
REFUSED = {
    "max_pool": [
        (r"max_pool: x must have 4 dimensions, got shape \[8, 4", lambda a: {"x": a["x"][0]}),
        ("padding must be between 0 and half .* got padding 2", lambda a: {"padding": (2, 2)}),
        ("max_pool: dtype must be float32, .* got Long", lambda a: {"x": a["x"].long()}),
    ],
    "max_pool_out": [
        (r"out must have shape \[2, 8, 4, 4\], got \[2, 7", lambda a: {"out": a["out"][:, :7]}),
    ],
    "avg_pool": [
        (r"avg_pool: x must have 4 dimensions, got shape", lambda a: {"x": a["x"][0]}),
        ("divisor_override must not be 0", lambda a: {"divisor_override": 0}),
        (r"bias must have shape \[8\], got \[7\]", lambda a: {"bias": a["bias"][:7]}),
    ],
    "avg_pool_out": [
        (r"out must have shape \[2, 8, 4, 4\]", lambda a: {"out": a["out"][:, :7]}),
    ],
    "dense_concat": [
        (r"src must have 4 dimensions, got shape \[8, 4, 4\]", lambda a: {"src": a["src"][0]}),
        ("src and buffer must have one dtype, got Half", lambda a: {"src": a["src"].half()}),
        (r"channels \[9, 17\) are not within the buffer's 16", lambda a: {"start": 9}),
        ("src must have the buffer's N, H and W", lambda a: {"src": a["src"][:, :, :3]}),
        (r"weight must have shape \[8\], got \[7\]", lambda a: {"weight": a["weight"][:7]}),
        ("var must be float32 or have x's dtype", lambda a: {"var": a["var"].half()}),
    ],
    "batch_norm_act_apply": [
        ("out must have x's shape", lambda a: {"out": a["out"][:, :, 1:]}),
    ],
    "batch_norm_act_backward": [
        ("act must be 0, 1 or 3", lambda a: {"act": 2}),
        ("belong together", lambda a: {"grad_residual": None}),
        ("output goes with ReLU", lambda a: {"act": 0}),
        (r"vectors must have shape \[4, 8\]", lambda a: {"vectors": a["vectors"][:3]}),
        ("results must have dense rows", lambda a: {"results": a["x"].new_ones(8, 4).t()}),
    ],
    "batch_norm_act_recompute": [
        ("SiLU does not go with a residual", lambda a: {"act": 3}),
    ],
    "batch_norm_act_statistics": [
        ("channel slice", lambda a: {"x": a["x"].contiguous()}),
    ],
    "depthwise_conv_bn_act_native": [
        ("x must have 4 dimensions", lambda a: {"x": a["x"][0]}),
        ("dtype must be float32, float16 or bfloat16",
         lambda a: {"x": a["x"].double(), "out": a["out"].double()}),
        ("weight must hold 144 float32 numbers", lambda a: {"weight": a["weight"][:9]}),
        ("kernel must be 3 or 5, got 4", lambda a: {"kernel": 4}),
        ("stride must be 1 or 2, got 3", lambda a: {"stride": 3}),
        ("spread must be 1 or 2, got 0", lambda a: {"spread": 0}),
        ("act must be between 0 and 3", lambda a: {"act": 9}),
        (r"out must be dense with shape \[2, 4, 4, 8\], got \[2, 3, 4, 8\]",
         lambda a: {"out": a["out"][:, :3]}),
        ("sums must hold 16 float32 numbers", lambda a: {"sums": a["sums"][:1]}),
    ],
    "depthwise_conv_bn_act_native_weight_gradient": [
        (r"grad must be dense with shape \[2, 4, 4, 8\]", lambda a: {"grad": a["grad"][:1]}),
        ("out must hold 72 float32 numbers", lambda a: {"out": a["out"][1:]}),
        ("must have one dtype", lambda a: {"grad": a["grad"].half()}),
    ],
    "conv_bn_act_native": [
        ("output_gate must hold 16 numbers",
         lambda a: {"output_gate": a["x"].new_zeros(2, 7)}),
        (r"shift must hold 16 float32 numbers, got shape \[3\]",
         lambda a: {"shift": a["shift"][:3]}),
        ("weight must hold 128 float32 numbers", lambda a: {"weight": a["weight"][:16]}),
        ("x must be float32, bfloat16 or float16, got Double",
         lambda a: {"x": a["x"].double(), "out": a["out"].double()}),
        ("pairs are of bfloat16, got Float", lambda a: {"algorithm": 1}),
        (r"out must have shape \[2, 8, 4, 4\]", lambda a: {"out": a["out"][:, :, 1:]}),
        ("out must be channels_last or a channel slice", lambda a: {"out": a["out"].contiguous()}),
        ("residual must be channels_last", lambda a: {"residual": a["x"].contiguous()}),
        ("x must have channels", lambda a: {"x": a["x"][:, :0]}),
        ("algorithm must be between 0 and 4, got 5", lambda a: {"algorithm": 5}),
        ("need a 3x3 kernel of stride 1", lambda a: {"algorithm": 4}),
        ("act must be between 0 and 3, got 4", lambda a: {"act": 4}),
        (r"no window fits x of shape \[2, 8, 4, 4\]", lambda a: {"kernel_h": 9}),
    ],
    "conv_bn_act_quantised": [
        ("x must be uint8, got Float", lambda a: {"x": a["x"].float()}),
        ("out must be uint8 or float32 on the CPU, got Double",
         lambda a: {"out": a["out"].double()}),
        ("zero must be a byte, got 256", lambda a: {"zero": 256}),
        ("low and high must be in order, and bytes where out is", lambda a: {"high": 256.0}),
        ("low and high must be in order", lambda a: {"low": 9.0, "high": 3.0}),
        ("vectors must hold 48 float32 numbers", lambda a: {"vectors": a["vectors"][1:]}),
        ("weight must hold 32 float32 numbers", lambda a: {"weight": a["weight"][1:]}),
        ("input_gate must be Float", lambda a: {"input_gate": a["input_gate"].double()}),
        ("output_gate must hold 16 numbers", lambda a: {"output_gate": a["input_gate"][:1]}),
        ("residual must have out's shape", lambda a: {"residual": a["x"][:, :, 1:]}),
        (r"no window fits x of shape \[2, 8, 4, 4\]", lambda a: {"kernel_h": 9}),
    ],
    "depthwise_conv_bn_act_quantised": [
        ("x must be uint8, got Float", lambda a: {"x": a["x"].float()}),
        ("out must be dense with shape", lambda a: {"out": a["out"][:, :3]}),
        ("must have one dtype", lambda a: {"out": a["out"].float()}),
        ("quads must hold 64 float32 numbers", lambda a: {"quads": a["quads"][1:]}),
    ],
    "quantised_map": [
        ("x and out must be uint8 and float32, or both uint8, got Float and Float",
         lambda a: {"x": a["x"].float(), "out": a["out"].float()}),
        ("out must have the size of x and at least its channels",
         lambda a: {"out": a["out"][:, :7]}),
        ("out must be channels_last", lambda a: {"out": a["out"].contiguous()}),
    ],
    "quantised_mean": [
        ("x must be uint8, got Float", lambda a: {"x": a["x"].float()}),
        ("x must be channels_last", lambda a: {"x": a["x"].contiguous()}),
        ("out must hold 16 float32 numbers", lambda a: {"out": a["out"][:1]}),
        ("affine must hold 16 float32 numbers", lambda a: {"affine": a["affine"][:1]}),
        ("x must have between 1 and", lambda a: {"x": a["x"][:, :, :0]}),
    ],
    "conv_bn_act_native_filters": [
        (r"weight must be float32 of shape \[K, C, 3, 3\], got \[8, 8, 3, 2\]",
         lambda a: {"weight": a["weight"][..., 1:]}),
        ("algorithm must be 2 or 4, got 3", lambda a: {"algorithm": 3}),
        ("points must hold 3072 float32 numbers", lambda a: {"algorithm": 4}),
    ],
    "conv_bn_act_native_weight_gradient": [
        ("x must be float32, got Double",
         lambda a: {name: a[name].double() for name in ("grad", "x", "out")}),
        (r"out must have shape \[8, 8, 1, 1\]", lambda a: {"algorithm": 0}),
        (r"grad must have shape \[2, 8, 6, 4\]", lambda a: {"padding_h": 2}),
        ("grad must be channels_last or a channel slice",
         lambda a: {"grad": a["grad"].contiguous()}),
        ("x must have its channels together", lambda a: {"x": a["x"].contiguous()}),
        ("multiple of 16 input channels",
         lambda a: {"algorithm": 0, "padding_h": 0, "padding_w": 0, "out": a["out"][..., :1, :1]}),
        ("algorithm must be 2 or 4, got 1", lambda a: {"algorithm": 1}),
    ],
    "squeeze_native": [
        ("squeeze: x must have 4 dimensions", lambda a: {"x": a["x"][0]}),
        ("neither contiguous nor channels_last",
         lambda a: {"x": a["x"].contiguous().transpose(2, 3)[:, :, 1:]}),
        ("got Double", lambda a: {"x": a["x"].double()}),
    ],
    "se_scale_native_out": [
        (r"gate must be contiguous with shape \[2, 8\]", lambda a: {"gate": a["gate"][:, :7]}),
        ("out must have x's shape", lambda a: {"out": a["out"][:1].clone()}),
    ],
    "excite_native": [
        ("weight2 must have rows and 4 columns", lambda a: {"weight2": a["weight1"]}),
    ],
    "squeeze_excite_native_out": [
        (r"layers must be from 8 channels to as many, got weight1 \[4, 7\] and weight2 \[7, 4\]",
         lambda a: {"weight1": torch.ones(4, 7), "weight2": torch.ones(7, 4), "bias2": None}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "message", "change"),
    [
        pytest.param(op, message, change, id=f"{op}-{place}")
        for op, refused in REFUSED.items()
        for place, (message, change) in enumerate(refused)
    ],
)
def test_bad_arguments_are_refused(op, message, change, where):
    arguments = registered_calls(make_x(where, (2, 8, 4, 4)))[op]
    with pytest.raises(RuntimeError, match=message) as error:
        getattr(torch.ops.cvkernels, op)(**arguments | change(arguments))
    assert op.startswith(str(error.value).partition(":")[0])
