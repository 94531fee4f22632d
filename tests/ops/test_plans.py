"""Plans: a call that was checked once computes what the op does, and is never taken for another."""

from dataclasses import replace

import pytest
import torch

from cvkernels import backend, record
from cvkernels.functional import (
    DerivedWeights,
    avg_pool,
    batch_norm_act,
    conv_bn_act,
    dense_concat,
    depthwise_conv_bn_act,
    excite,
    max_pool,
    se_scale,
    squeeze,
    squeeze_excite,
)
from tests.support.cases.conv_bn_act import make_bn
from tests.support.cases.every_op import OPS, PLANNED, OpCall, calls_on
from tests.support.cases.squeeze_excite import SMALL, Map, make_layers, make_map
from tests.support.numerics import tensors_in

pytestmark = pytest.mark.usefixtures("native")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("m", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_computes_what_the_op_does(m, dtype, memory_format):
    for name, call in calls_on(make_map(m, dtype, memory_format, "cpu")).items():
        planned, other = call.plan(), call.on_other_data()
        expected = tensors_in(other(backend=planned.backend))
        for _ in range(2):
            ours, theirs = tensors_in(planned(*other.data)), tensors_in(other())
            for a, b, c in zip(ours, theirs, expected, strict=True):
                assert torch.equal(a, b) and torch.equal(a, c), name
                assert a.stride() == b.stride(), name


@pytest.mark.parametrize("name", PLANNED)
def test_errors_are_raised_when_a_call_is_planned(name):
    call = calls_on(torch.randn(2, 8, 5, 5))[name]
    with pytest.raises((ValueError, TypeError), match=f"{name}: "):
        replace(call, arguments=(call.arguments[0][0], *call.arguments[1:])).plan()
    with pytest.raises(backend.BackendError, match=f"{name}: .*'cudnn'"):
        call.plan(backend="cudnn")


@pytest.mark.parametrize("name", PLANNED)
def test_explain_hears_of_a_plan(name):
    call = calls_on(torch.randn(2, 8, 5, 5))[name]
    planned = call.plan()
    with record.recording(record.Recorder()) as recorder:
        planned(*call.data)
    (row,) = recorder.calls
    assert (row.op, row.backend, row.reason) == (name, planned.backend, planned.reason)
    assert (row.kernels, row.bytes_read, row.bytes_written) == tuple(planned.traffic)


def test_outputs_that_are_given_are_written():
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    gate, out = torch.randn(2, 8), torch.empty_like(x)
    buffer = torch.zeros(2, 20, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 3, 3)
    for into in (out, buffer[:, 4:12]):
        scale = se_scale.plan(x, gate, x, "relu", out=into)
        assert scale(x, gate, x, into) is into
        assert torch.equal(into, se_scale(x, gate, x, "relu"))
        pool = max_pool.plan(x, 3, 1, 1, out=into)
        assert pool(x, into) is into and torch.equal(into, max_pool(x, 3, 1, 1))
        convolve = conv_bn_act.plan(x, weight, padding=1, residual=x, out=into)
        assert convolve(x, x, None, into) is into
        assert torch.equal(into, conv_bn_act(x, weight, padding=1, residual=x))
    assert buffer[:, :4].abs().max() == 0 == buffer[:, 12:].abs().max()


def test_autograd_notices_what_a_plan_writes():
    x, out = torch.randn(1, 4, 3, 3), torch.ones(1, 4, 3, 3)
    weight = torch.ones(1, 4, 3, 3, requires_grad=True)
    for planned, data in (
        (max_pool.plan(x, 1, out=out), (x, out)),
        (se_scale.plan(x, x.mean((2, 3)), out=out), (x, x.mean((2, 3)), None, out)),
        (dense_concat.plan(out, x, 0), (out, x)),
    ):
        loss = (weight * out).sum()
        planned(*data)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestCallsAreNotMixedUp:
    """Calls whose plans are kept by their metadata."""

    x = torch.randn(2, 8, 6, 6)

    def test_options_of_another_type(self):
        assert max_pool(self.x, 2, 2).shape == (2, 8, 3, 3)
        with pytest.raises(TypeError, match="kernel_size must be an integer"):
            max_pool(self.x, 2.0, 2)
        avg_pool(self.x, 2, 2, 0, False, True, 1)
        with pytest.raises(TypeError, match="divisor_override must be an integer"):
            avg_pool(self.x, 2, 2, 0, False, True, 1.0)
        layers = make_layers(Map(2, 8, 6, 6, 6), torch.float32, "cpu")
        excite(torch.ones(2, 8), *layers, count=9)
        with pytest.raises(TypeError, match="count must be an integer"):
            excite(torch.ones(2, 8), *layers, count=9.0)

    def test_strides_shapes_and_dtypes(self):
        views = (
            self.x, self.x.contiguous(memory_format=torch.channels_last), self.x.transpose(2, 3),
            self.x[:, ::2], self.x[:1], self.x.bfloat16(), self.x.double(), self.x[:0],
        )  # fmt: skip
        for x in (*views, *views):
            assert torch.equal(max_pool(x, 3, 2, 1), max_pool(x, 3, 2, 1, backend="reference"))
            torch.testing.assert_close(squeeze(x), squeeze(x, backend="reference"))

    def test_gradients(self):
        x = self.x.clone().requires_grad_()
        for _ in range(2):
            assert max_pool(self.x, 2).grad_fn is None
            assert max_pool(x, 2).grad_fn is not None and squeeze(x).grad_fn is not None
            with torch.no_grad():
                assert max_pool(x, 2).grad_fn is None and squeeze(x).grad_fn is None

    def test_requests(self):
        for _ in range(2):
            squeeze(self.x)
            with backend.use("reference"), record.recording(record.Recorder()) as recorder:
                squeeze(self.x)
            assert recorder.calls == []
            with pytest.raises(backend.BackendError):
                squeeze(self.x, backend="cudnn")

    def test_transforms_and_modes(self):
        expected = max_pool(self.x, 2)
        mapped = torch.func.vmap(lambda x: squeeze(x[None], backend="reference")[0])(self.x)
        torch.testing.assert_close(mapped, squeeze(self.x))

        class Names(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(func._schema.name)
                return func(*args, **kwargs or {})

        for _ in range(2):
            names = []
            with Names():
                pooled = max_pool(self.x, 2)
            assert torch.equal(pooled, expected)
            assert names == ["cvkernels::max_pool"]
            with torch.profiler.profile() as profile:
                max_pool(self.x, 2)
            assert "cvkernels::max_pool" in {event.name for event in profile.events()}

    def test_subclasses_and_meta_tensors(self):
        class Named(torch.Tensor):
            pass

        max_pool(self.x, 2)
        assert isinstance(max_pool(self.x.as_subclass(Named), 2), torch.Tensor)
        meta = self.x.to("meta")
        for _ in range(2):
            assert max_pool.plan(meta, 2).backend == "reference"
            with record.recording(record.Recorder()) as recorder:
                max_pool(meta, 2)
            assert [call.backend for call in recorder.calls] == ["native"]

    def test_overlaps_are_seen_each_time(self):
        buffer = torch.zeros(2, 8, 5, 5)
        dense_concat(buffer, torch.ones(2, 3, 5, 5), 2)
        same = torch.zeros(2, 8, 5, 5)[:, :3]
        dense_concat(buffer, same, 2)
        with pytest.raises(ValueError, match="src overlaps the channels"):
            dense_concat(buffer, buffer[:, :3], 2)
        gate, other = torch.ones(2, 8), torch.zeros(2, 8, 5, 5)
        se_scale(other, gate, out=buffer)
        with pytest.raises(ValueError, match="out overlaps"):
            storage = torch.zeros(2 * 8 * 25 + 1)
            a, b = (storage[i : i + 400].view(2, 8, 5, 5) for i in (0, 1))
            se_scale(a, gate, out=b)


def test_a_plan_holds_the_weights_it_was_made_with():
    x, weight, cache = torch.randn(1, 8, 5, 5), torch.randn(6, 8, 3, 3), DerivedWeights()
    planned = conv_bn_act.plan(x, weight, cache=cache)
    expected = planned(x)
    weight.mul_(2)
    assert torch.equal(planned(x), expected)
    assert torch.equal(conv_bn_act.plan(x, weight, cache=cache)(x), conv_bn_act(x, weight))


def test_autocast_and_gradients_are_planned():
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(6, 8, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        planned = conv_bn_act.plan(x, weight)
        assert torch.equal(planned(x), conv_bn_act(x, weight))
        assert planned(x).dtype == torch.bfloat16
    weight.requires_grad_()
    planned = conv_bn_act.plan(x, weight, backend="native")
    for _ in range(2):
        planned(x).sum().backward()
    assert weight.grad is not None
    with pytest.raises(ValueError, match="out= is not differentiable"):
        out = torch.empty(2, 6, 3, 3).contiguous(memory_format=torch.channels_last)
        conv_bn_act.plan(x, weight, out=out)


def test_an_image_that_is_not_finite_runs_the_reference():
    """oneDNN's relu would hide it; the native convolution takes no groups."""
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 2, 3, 3)
    planned = conv_bn_act.plan(x, weight, groups=2)
    assert planned.backend == "onednn"
    bad = x.clone()
    bad[0, 0, 2, 2] = torch.nan
    assert planned(x).isfinite().all() and planned(bad).isnan().any()
    with pytest.raises(backend.BackendError, match="the image holds NaN or infinity"):
        conv_bn_act(bad, weight, groups=2, backend="onednn")


def test_batch_norm_act_answers():
    x = torch.randn(2, 8, 5, 5)
    assert batch_norm_act(x).out.shape == x.shape
    assert depthwise_conv_bn_act.plan(x, torch.randn(8, 1, 3, 3))(x)[1] is None
    assert squeeze_excite.plan(x, *make_layers(Map(2, 8, 6, 5, 5), x.dtype, "cpu")).op


def outputs(x):
    """A plan of each op that can write into out, and the data of a run."""
    out, gate = torch.zeros_like(x), torch.randn(x.shape[:2])
    layers = make_layers(Map(*x.shape[:2], 6, *x.shape[2:]), x.dtype, "cpu")
    weight = torch.randn(x.shape[1], x.shape[1], 1, 1)
    return {
        "max_pool": (max_pool.plan(x, 1, out=out), (x, out)),
        "avg_pool": (avg_pool.plan(x, 1, out=out), (x, out)),
        "se_scale": (se_scale.plan(x, gate, out=out), (x, gate, None, out)),
        "squeeze_excite": (squeeze_excite.plan(x, *layers, out=out), (x, None, out)),
        "conv_bn_act": (conv_bn_act.plan(x, weight, out=out), (x, None, None, out)),
    }


class TestDataAreWhatThePlanWasMadeFor:
    """Past the dispatcher nothing else looks at a shape: other memory would be written."""

    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)

    def plan(self, name):
        call = calls_on(self.x)[name] if name in PLANNED else OpCall(name, (self.x,))
        return call.plan(), list(call.data)

    @pytest.mark.parametrize("name", OPS)
    def test_other_data_are_refused(self, name):
        planned, data = self.plan(name)
        planned(*data)
        first, *others = data
        kinds = {
            "a larger batch": torch.cat([first, first]),
            "a smaller map": first[:, :-1],
            "another layout": first.transpose(-1, -2).contiguous().transpose(-1, -2),
            "another dtype": first.double(),
            "another device": first.to("meta"),
            "nothing": None,
            "no tensor": 1.0,
        }
        for kind, other in kinds.items():
            with pytest.raises(
                ValueError, match=rf"{name}: the plan is for \w+ = Tensor\[.*, got "
            ):
                planned(other, *others)
                pytest.fail(kind)
        with pytest.raises(ValueError, match=rf"make a plan for it with {name}\.plan"):
            planned()
        with pytest.raises(TypeError, match=f"{name}: the plan takes "):
            planned(*data, *[None] * 8)
        planned(*data)

    @pytest.mark.parametrize("name", ["se_scale", "squeeze_excite"])
    def test_a_residual_that_is_planned_is_given(self, name):
        planned, data = self.plan(name)
        with pytest.raises(ValueError, match="the plan is for residual = .*, got None"):
            planned(*data[:-1])
        with pytest.raises(ValueError, match="the plan is for residual = "):
            planned(*data[:-1], data[-1][:1])

    @pytest.mark.parametrize("name", sorted(outputs(torch.ones(1, 1, 1, 1))))
    def test_an_output_is_as_planned(self, name):
        planned, (*data, out) = outputs(self.x)[name]
        assert planned(*data, out) is out
        for other in (None, out[:, :4], out.contiguous(), out.double(), out[:1]):
            with pytest.raises(ValueError, match=f"{name}: the plan is for out = "):
                planned(*data, other)

    @pytest.mark.parametrize("name", OPS)
    def test_a_gradient_that_is_needed_is_refused(self, name):
        planned, (first, *others) = self.plan(name)
        learning = first.clone().requires_grad_()
        with pytest.raises(ValueError, match=f"{name}: the plan was made where no gradient"):
            planned(learning, *others)
        with torch.no_grad():
            planned(learning, *others)

    def test_parameters_that_learn_are_remembered(self):
        weight = torch.randn(4, 8, 1, 1, requires_grad=True)
        with torch.no_grad():
            planned = conv_bn_act.plan(self.x, weight)
            planned(self.x)
        with pytest.raises(ValueError, match="conv_bn_act: the plan was made where no gradient"):
            planned(self.x)

    def test_subclasses_and_transforms_are_refused(self):
        class Named(torch.Tensor):
            pass

        planned = max_pool.plan(self.x, 2)
        with pytest.raises(ValueError, match=r"got Named\[2, 8, 6, 6\]"):
            planned(self.x.as_subclass(Named))
        assert torch.equal(planned(torch.nn.Parameter(self.x, False)), max_pool(self.x, 2))
        with pytest.raises(ValueError, match="a transform, dispatch mode or tracer is active"):
            torch.func.vmap(lambda _: planned(self.x))(torch.ones(2))
        with torch.profiler.profile():
            assert torch.equal(planned(self.x), max_pool(self.x, 2))


class TestAPlanThatACacheKeeps:
    """The convolutions' functional calls keep their plans with the weights they derive."""

    @pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
    def test_is_made_anew_where_anything_changed(self, depthwise):
        op = depthwise_conv_bn_act if depthwise else conv_bn_act
        x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        weight, cache = torch.randn(8, 1 if depthwise else 8, 3, 3), DerivedWeights()
        bn = make_bn(8)

        def check(x, bn, **options):
            for _ in range(2):
                ours = op(x, weight, None, bn, cache=cache, **options)
                assert torch.equal(ours, op(x, weight, None, bn, **options))

        with torch.no_grad():
            check(x, bn)
            for other in (x[:1], x[:, :, :4], x.contiguous()):
                check(other, bn)
            check(x, bn, stride=2)
            check(x, bn, padding=(1, 1), act="silu")
            check(x, bn, padding=[1, 1])
            check(x, bn._replace(eps=0.5))
            check(x, None)
            weight.mul_(2)
            check(x, bn)
            weight.data[0, 0].add_(1)
            check(x, bn)
            bn.var.mul_(2)
            check(x, bn)
            with pytest.raises(ValueError, match="stride must be an int or two, got 2.0"):
                op(x, weight, None, bn, cache=cache, stride=2.0)
            with pytest.raises(TypeError, match="bn must be BatchNormParams"):
                op(x, weight, None, tuple(bn), cache=cache)
            with backend.use("reference"), record.recording(record.Recorder()) as recorder:
                op(x, weight, None, bn, cache=cache)
            assert recorder.calls == []
        learning = weight.clone().requires_grad_()
        with torch.no_grad():
            op(x, learning, None, bn, cache=cache)
        assert op(x, learning, None, bn, cache=cache).grad_fn is not None
