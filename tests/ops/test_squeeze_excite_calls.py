"""se_scale and its parts as ops: gradients, registration, choice, explain and bad input."""

import contextlib

import pytest
import torch
from torch.library import opcheck

from cvkernels import backend, record
from cvkernels.backend import BackendError
from cvkernels.functional import excite, se_scale, squeeze, squeeze_excite
from cvkernels.ops.squeeze_excite.reference import (
    excite_reference,
    se_scale_reference,
    squeeze_excite_reference,
    squeeze_reference,
)
from tests.support.cases.squeeze_excite import (
    SMALL,
    Map,
    make_flat_layers,
    make_layers,
    make_map,
    of_flat_layers,
)
from tests.support.numerics import assert_matches_grad

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS_LAST = torch.channels_last
acts = pytest.mark.parametrize("act", ["none", "relu", "silu"])


# Gradients: on CPU the reference's own


def registered(out_act):
    """The registered block, whose gradient is written by hand, on the formulas in PyTorch."""
    call = torch.ops.cvkernels.squeeze_excite
    return lambda x, w1, b1, w2, b2, r: call(x, w1, b1, w2, b2, "silu", r, out_act, "reference")[0]


def block_of_x(x, w1, b1, w2, b2, r):
    return squeeze_excite(x, w1, b1, w2, b2, "silu", r, "relu")


def test_gradcheck_in_float64():
    m = Map(2, 3, 2, 2, 3)
    x, residual = (make_map(m, torch.float64, CHANNELS_LAST, "cpu") for _ in range(2))
    layers = make_layers(m, torch.float64, "cpu")
    gate = torch.randn(2, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, *layers, residual, gate)]
    x, w1, b1, w2, b2, residual, gate = leaves
    for act in ("none", "relu", "silu"):
        assert torch.autograd.gradcheck(lambda *a, act=act: se_scale(*a, act), (x, gate, residual))
    assert torch.autograd.gradcheck(squeeze, (x,))
    assert torch.autograd.gradcheck(
        lambda *a: excite(*a, "silu", sigmoid=True), (x.mean((2, 3)), w1, b1, w2, b2)
    )
    block_call = (x, w1, b1, w2, b2, residual)
    for function in (registered("silu"), block_of_x):
        assert torch.autograd.gradcheck(function, block_call)


@acts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_written_gradients(act, dtype, memory_format):
    m = Map(3, 17, 5, 5, 9)
    x, residual = (make_map(m, dtype, memory_format, "cpu").requires_grad_() for _ in range(2))
    layers = make_flat_layers(m, dtype, "cpu").requires_grad_()
    gate, pooled = (torch.randn(m.N, m.C).to(dtype).requires_grad_() for _ in range(2))
    ops = torch.ops.cvkernels

    def stock(x, w1, b1, w2, b2, r):
        return squeeze_excite_reference(x, w1, b1, w2, b2, "silu", r, act)

    both = (of_flat_layers(function, m) for function in (registered(act), stock))
    assert_matches_grad(*both, (x, layers, residual))
    assert_matches_grad(
        lambda x, g, r: ops.se_scale(x, g, r, act, "reference"),
        lambda x, g, r: se_scale_reference(x, g, r, act),
        (x, gate, residual),
    )
    assert_matches_grad(lambda x: ops.squeeze(x, "reference"), squeeze_reference, (x,))
    assert_matches_grad(
        of_flat_layers(lambda p, *w: ops.excite(p, *w, "relu", True, 0, "reference"), m),
        of_flat_layers(lambda p, *w: excite_reference(p, *w, "relu", sigmoid=True), m),
        (pooled, layers),
    )


@pytest.mark.parametrize("m", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["none", "relu"])
def test_native_gradients(m, dtype, act, native):
    """Of channels_last maps; one channel has no layout."""
    x, residual = (
        make_map(m, dtype, torch.channels_last, "cpu").requires_grad_() for _ in range(2)
    )
    gate = torch.randn(m.N, m.C).to(dtype).requires_grad_()
    layers = make_flat_layers(m, dtype, "cpu").requires_grad_()
    ops = torch.ops.cvkernels
    if act == "relu":  # what is nearly zero passes by a rounding
        with torch.no_grad():
            residual += residual.sign() * 4 * x.abs()
    assert_matches_grad(
        lambda x, g, r: ops.se_scale(x, g, r, act, "native"),
        lambda x, g, r: se_scale_reference(x, g, r, act),
        (x, gate, residual),
    )

    def block(x, w1, b1, w2, b2, r):
        return ops.squeeze_excite(x, w1, b1, w2, b2, "silu", r, act, "native")[0]

    def stock(x, w1, b1, w2, b2, r):
        return squeeze_excite_reference(x, w1, b1, w2, b2, "silu", r, act)

    both = (of_flat_layers(function, m) for function in (block, stock))
    assert_matches_grad(*both, (x, layers, residual))


# Registration and compilation


@pytest.mark.parametrize("view", ["dense", "slice", "empty"])
def test_opcheck(view, memory_format):
    m = Map(2, 16, 4, 5, 6)
    whole = make_map(m._replace(C=24), torch.float32, memory_format, "cpu")
    dense = whole[:, :16].contiguous(memory_format=memory_format)
    x = {"dense": dense, "slice": whole[:, 4:20], "empty": dense[:0]}[view]
    layers = [t.requires_grad_() for t in make_layers(m, torch.float32, "cpu")]
    gate = torch.randn(x.shape[:2])
    residual = torch.randn(x.shape)
    ops = torch.ops.cvkernels
    leaf = x.detach().requires_grad_()
    for act in ("none", "relu", "silu") if view == "dense" else ("silu",):
        opcheck(ops.se_scale.default, (leaf, gate, residual, act, "auto"))
        opcheck(ops.squeeze_excite.default, (leaf, *layers, "silu", residual, act, "auto"))
    opcheck(ops.squeeze.default, (leaf, "auto"))
    opcheck(ops.excite.default, (gate, *layers, "relu", True, 0, "auto"))
    opcheck(ops.excite.default, (gate, *layers, "relu", False, 30, "auto"))
    opcheck(ops.se_scale_backward.default, (residual, x, gate, None, None, "none", True, "auto"))
    opcheck(ops.se_scale_backward.default, (residual, x, gate, x, x, "silu", False, "auto"))
    opcheck(ops.se_scale_shifted.default, (x, gate, gate, "auto"))


def test_opcheck_native(memory_format, native):
    m = Map(2, 16, 4, 5, 6)
    x = make_map(m, torch.float32, memory_format, "cpu")
    w1, b1, w2, b2 = make_layers(m, torch.float32, "cpu")
    layers, gate, out = (w1.flatten(1), b1, w2.flatten(1), b2), torch.randn(2, 16), x.clone()
    ops = torch.ops.cvkernels
    opcheck(ops.squeeze_native.default, (x,))
    opcheck(ops.excite_native.default, (gate, *layers, 2, True, 9))
    opcheck(ops.se_scale_native_out.default, (x, gate, None, 1, out))
    if x.stride(1) == 1:
        sums = torch.zeros(2, 16)
        opcheck(ops.se_scale_native_sums.default, (x, x, None, None, sums))
        opcheck(ops.se_scale_native_sums.default, (x, x, x, out, sums))
        opcheck(ops.se_scale_native_shifted.default, (x, gate, gate, out))
    opcheck(ops.squeeze_excite_native_out.default, (x, *layers, 1, x, 2, out))


@pytest.mark.parametrize("name", ["auto", "native", "reference"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(name, dynamic, native):
    torch._dynamo.reset()
    m = Map(2, 16, 4, 5, 6)
    x = make_map(m, torch.float32, CHANNELS_LAST, "cpu")
    layers = make_layers(m, torch.float32, "cpu")

    def run(x):
        y = squeeze_excite(2 * x, *layers, "silu", x, "relu", backend=name)
        gate = excite(squeeze(y, backend=name), *layers, backend=name)
        return se_scale(y, gate, out=torch.empty_like(y), backend=name) + 1

    with torch.no_grad():
        y = torch.compile(run, fullgraph=True, dynamic=dynamic)(x)
        assert torch.allclose(y, run(x), atol=1e-5)
    assert y.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("function", [registered("relu"), block_of_x], ids=["op", "auto"])
def test_compiles_with_gradients(function):
    torch._dynamo.reset()
    m = Map(2, 16, 4, 5, 6)
    maps = [make_map(m, torch.float32, CHANNELS_LAST, "cpu") for _ in range(2)]
    leaves = [t.requires_grad_() for t in (maps[0], *make_layers(m, torch.float32, "cpu"), maps[1])]
    ours, theirs = (
        torch.autograd.grad(run(*leaves), leaves, torch.ones_like(maps[0]))
        for run in (torch.compile(function, fullgraph=True), function)
    )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


# Choice and explain


class TestChoice:
    def test_auto_is_native_on_cpu(self, native):
        x, gate = torch.ones(1, 8, 4, 4), torch.ones(1, 8)
        assert backend.chosen("se_scale", x, gate) == "native"
        assert se_scale.plan(x, gate).reason == "native on cpu"

    def test_reference_where_a_gradient_is_needed(self, native):
        x, gate = torch.ones(1, 8, 4, 4), torch.ones(1, 8, requires_grad=True)
        choice = se_scale.plan(x, gate)
        assert choice.backend == "reference" and "a gradient is needed" in choice.reason
        with torch.no_grad():
            assert se_scale.plan(x, gate).backend == "native"
        with pytest.raises(BackendError, match="se_scale: backend 'native' .* gradient is needed"):
            se_scale(x, gate, backend="native")

    def test_reference_for_float64(self):
        x = torch.ones(1, 8, 4, 4, dtype=torch.float64)
        assert squeeze.plan(x).backend == "reference"
        with pytest.raises(BackendError, match="computes in float32, float16 and bfloat16"):
            squeeze(x, backend="native")
        with pytest.raises(BackendError, match="Triton computes in float16"):
            squeeze(x, backend="triton")

    @pytest.mark.parametrize("name", ["cudnn", "onednn"])
    def test_no_such_backend(self, name):
        with pytest.raises(BackendError, match=f"squeeze: there is no backend '{name}'"):
            squeeze(torch.ones(1, 8, 4, 4), backend=name)

    def test_use_is_obeyed(self):
        with backend.use("reference"):
            assert squeeze.plan(torch.ones(1, 8, 4, 4)).backend == "reference"

    def test_triton_refuses_a_wide_hidden_layer(self):
        layers = (torch.ones(513, 8), None, torch.ones(8, 513), None)
        with pytest.raises(BackendError, match="R = 513 is over 512"):
            excite(torch.ones(1, 8), *layers, backend="triton")
        with record.recording(record.Recorder()):
            pooled, *layers = (t and t.to("meta") if t is None else t.to("meta") for t in
                               (torch.ones(1, 8), *layers))  # fmt: skip
            assert excite.plan(pooled, *layers).backend == "reference"

    def test_meta_tensor_alone_is_the_reference_s(self):
        assert squeeze.plan(torch.empty(1, 8, 4, 4, device="meta")).backend == "reference"


def planned(m, run, dtype=torch.bfloat16):
    """The calls of run(x, layers, gate) on meta tensors under a recorder."""
    x = make_map(m, dtype, CHANNELS_LAST, "meta")
    recorder = record.Recorder()
    with record.recording(recorder):
        y = run(x, make_layers(m, dtype, "meta"), torch.empty(m.N, m.C, dtype=dtype, device="meta"))
    assert y.device.type == "meta"
    return recorder.calls


class TestExplain:
    m = Map(128, 256, 16, 56, 56)
    map_bytes = 2 * 128 * 256 * 56 * 56
    layer_bytes = 2 * (2 * 256 * 16 + 256 + 16)

    def test_squeeze(self):
        (call,) = planned(self.m, lambda x, layers, gate: squeeze(x))
        assert (call.op, call.backend, call.kernels) == ("squeeze", "triton", 1)
        assert (call.bytes_read, call.bytes_written) == (self.map_bytes, 2 * 128 * 256)
        # Few large maps: parts, and a launch that adds them.
        (call,) = planned(self.m._replace(N=1), lambda x, layers, gate: squeeze(x))
        assert call.kernels == 2

    def test_excite(self):
        (call,) = planned(self.m, lambda x, layers, gate: excite(gate, *layers))
        assert (call.op, call.backend, call.kernels) == ("excite", "triton", 1)
        assert call.bytes_read == 2 * 128 * 256 + self.layer_bytes

    def test_se_scale(self):
        (call,) = planned(self.m, lambda x, layers, gate: se_scale(x, gate, x, "relu"))
        assert (call.op, call.backend, call.kernels) == ("se_scale", "triton", 1)
        assert call.bytes_read == 2 * self.map_bytes + 2 * 128 * 256
        assert call.bytes_written == self.map_bytes

    def test_squeeze_excite(self):
        (call,) = planned(self.m, lambda x, layers, gate: squeeze_excite(x, *layers, out=x))
        assert (call.op, call.backend, call.kernels) == ("squeeze_excite", "triton", 3)
        assert call.bytes_read == 2 * self.map_bytes + self.layer_bytes + 8 * 128 * 256
        assert call.bytes_written == self.map_bytes + 8 * 128 * 256

    def test_copies_around_the_kernels_count(self):
        def strided(x, layers, gate):
            return se_scale(x[:, :, :, ::2].transpose(2, 3), gate)

        (call,) = planned(self.m, strided)
        assert call.kernels == 2 and call.bytes_written == self.map_bytes

    def test_native_reads_the_map_once(self, native):
        m = Map(2, 16, 4, 5, 6)
        x, recorder = make_map(m, torch.float32, CHANNELS_LAST, "cpu"), record.Recorder()
        with record.recording(recorder):
            squeeze_excite(x, *make_layers(m, torch.float32, "cpu"))
        (call,) = recorder.calls
        assert (call.backend, call.kernels) == ("native", 1)
        assert call.bytes_read == 4 * (x.numel() + 2 * 16 * 4 + 16 + 4)
        assert call.bytes_written == 4 * x.numel()

    def test_reference_gives_its_reason(self):
        x, reasons = torch.ones(1, 8, 4, 4, dtype=torch.float64), []
        recorder = record.Recorder()
        recorder.fallback = lambda reason: reasons.append(reason) or contextlib.nullcontext()
        with record.recording(recorder):
            squeeze(x)
        assert reasons[0].startswith("squeeze: the native implementation computes in float32")


# Bad input


X, GATE = torch.ones(2, 8, 4, 4), torch.ones(2, 8)
W1, B1, W2, B2 = torch.ones(3, 8, 1, 1), torch.ones(3), torch.ones(8, 3, 1, 1), torch.ones(8)
INVALID = {
    "rank": (ValueError, r"squeeze: x must have shape \[N, C, H, W\], got \[8, 4, 4\]",
             lambda: squeeze(X[0])),
    "dtype": (TypeError, "squeeze: x must be float32.*got torch.int64", lambda: squeeze(X.long())),
    "no-pixels": (ValueError, "squeeze: x must have channels and pixels, got .*no pixel",
                  lambda: squeeze(X[:, :, :0])),
    "no-channels": (ValueError, "se_scale: x must have channels and pixels",
                    lambda: se_scale(X[:, :0], GATE[:, :0])),
    "block-no-pixels": (ValueError, "squeeze_excite: x must have channels and pixels",
                        lambda: squeeze_excite(X[:, :, :, :0], W1, B1, W2, B2)),
    "gate-shape": (ValueError, r"se_scale: gate must have shape \[N, C\] = \[2, 8\].*flatten",
                   lambda: se_scale(X, GATE[:, :, None, None])),
    "gate-dtype": (TypeError, "se_scale: gate must have x's dtype, torch.float32, or float32, got "
                   "torch.float16", lambda: se_scale(X, GATE.half())),
    "gate-wide": (TypeError, "se_scale: gate must have x's dtype, torch.float64",
                  lambda: se_scale(X.double(), GATE)),
    "gate-device": (ValueError, "se_scale: gate must be on the input's device, cpu, got meta",
                    lambda: se_scale(X, GATE.to("meta"))),
    "residual-shape": (ValueError, "se_scale: residual must have x's shape",
                       lambda: se_scale(X, GATE, X[:1])),
    "residual-dtype": (TypeError, "squeeze_excite: residual must have x's dtype",
                       lambda: squeeze_excite(X, W1, B1, W2, B2, "relu", X.half())),
    "residual-device": (ValueError, "se_scale: residual must be on x's device",
                        lambda: se_scale(X, GATE, X.to("meta"))),
    "act": (ValueError, r"se_scale: act must be one of \['none', 'relu', 'silu'\], got 'gelu'",
            lambda: se_scale(X, GATE, None, "gelu")),
    "inner-act": (ValueError, r"excite: act must be one of \['relu', 'silu'\], got 'none'",
                  lambda: excite(GATE, W1, B1, W2, B2, "none")),
    "out-act": (ValueError, "squeeze_excite: out_act must be one of",
                lambda: squeeze_excite(X, W1, B1, W2, B2, "relu", None, "relu6")),
    "weight-kernel": (ValueError, "excite: weight1 must be a matrix or the weight of a 1x1",
                      lambda: excite(GATE, torch.ones(3, 8, 3, 3), B1, W2, B2)),
    "weight1": (ValueError, r"excite: weight1 must have shape \[R, C\] = \[3, 8\]",
                lambda: excite(GATE, W1[:, :7], B1, W2, B2)),
    "weight2": (ValueError, r"squeeze_excite: weight2 must have shape \[C, R\] = \[8, 3\]",
                lambda: squeeze_excite(X, W1, B1, W1, B2)),
    "bias1": (ValueError, r"excite: bias1 must have shape \[R\]",
              lambda: excite(GATE, W1, B2, W2, B2)),
    "bias2": (ValueError, r"excite: bias2 must have shape \[C\]",
              lambda: excite(GATE, W1, B1, W2, B1)),
    "no-hidden": (ValueError, "excite: weight1 must have shape .* with R > 0",
                  lambda: excite(GATE, W1[:0], B1[:0], W2[:, :0], B2)),
    "parameters-mixed": (TypeError, "excite: bias2 must have weight1's dtype",
                         lambda: excite(GATE, W1, B1, W2, B2.half())),
    "parameters-half": (TypeError, "squeeze_excite: weights and biases must be torch.float32, got",
                        lambda: squeeze_excite(X, W1.half(), B1.half(), W2.half(), B2.half())),
    "parameters-device": (ValueError, "excite: weight2 must be on the input's device",
                          lambda: excite(GATE, W1, B1, W2.to("meta"), B2)),
    "pooled-shape": (ValueError, "excite: pooled must have shape .*flatten",
                     lambda: excite(GATE[:, :, None, None], W1, B1, W2, B2)),
    "pooled-dtype": (TypeError, "excite: pooled must be float32",
                     lambda: excite(GATE.int(), W1, B1, W2, B2)),
    "count": (ValueError, "excite: count must be a positive number of pixels, got 0",
              lambda: excite(GATE, W1, B1, W2, B2, count=0)),
    "half-sums": (TypeError, "excite: with count=, pooled holds sums and must be float32",
                  lambda: excite(GATE.half(), W1, B1, W2, B2, count=16)),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), INVALID.values(), ids=INVALID.keys())
def test_invalid_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_the_registered_ops_check_too(native):
    ops = torch.ops.cvkernels
    with pytest.raises(RuntimeError, match="squeeze: x must have 4 dimensions"):
        ops.squeeze_native(X[0])
    with pytest.raises(RuntimeError, match="neither contiguous nor channels_last"):
        ops.squeeze_native(X.transpose(2, 3)[:, :, 1:])
    with pytest.raises(RuntimeError, match="got Double"):
        ops.squeeze_native(X.double())
    with pytest.raises(RuntimeError, match=r"gate must be contiguous with shape \[2, 8\]"):
        ops.se_scale_native_out(X, GATE[:, :7], None, 0, X.clone())
    with pytest.raises(RuntimeError, match="out must have x's shape"):
        ops.se_scale_native_out(X, GATE, None, 0, X[:1].clone())
    with pytest.raises(RuntimeError, match=r"weight2 must have shape \[8, 3\]"):
        ops.excite_native(GATE, W1.flatten(1), None, W1.flatten(1), None, 1, False, 0)
    with pytest.raises(RuntimeError, match=r"weight1 must have shape \[R, 8\], got \[3, 7\]"):
        ops.squeeze_excite_native_out(
            X, torch.ones(3, 7), None, torch.ones(7, 3), None, 1, None, 0, X.clone()
        )
