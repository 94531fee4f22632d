"""Calls that are found and run in one native call, and those that must not be."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import cvkernels
from cvkernels.functional import avg_pool, batch_norm_act, dense_concat, max_pool
from cvkernels.ops.avg_pool import op as avg_pool_op
from cvkernels.ops.batch_norm_act import op as batch_norm_act_op
from cvkernels.ops.dense_concat import op as dense_concat_op
from cvkernels.ops.max_pool import op as max_pool_op

pytestmark = pytest.mark.fast

_C = pytest.importorskip("cvkernels._C")
IN_C = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


def image(*shape, **options):
    return torch.randn(*(shape or (2, 8, 5, 5)), **options)


def nhwc(x):
    return x.contiguous(memory_format=torch.channels_last)


class CallsMaxPool(torch.nn.Module):
    def forward(self, x):
        return max_pool(x, 2)


def normalised(x):
    return F.batch_norm(x, None, None, None, None, True)


CALLS = {
    "max_pool": (max_pool_op, lambda x: max_pool(x, 2), lambda x: F.max_pool2d(x, 2)),
    "avg_pool": (avg_pool_op, lambda x: avg_pool(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 3, 1, 1)),
    "batch_norm_act": (batch_norm_act_op, lambda x: batch_norm_act(x).out, normalised),
    "dense_concat": (
        dense_concat_op,
        lambda x: dense_concat(nhwc(torch.ones(2, 9, 5, 5)), x, 1),
        lambda x: torch.cat((torch.ones(2, 1, 5, 5), x), 1),
    ),
}
every_call = pytest.mark.parametrize(("op", "ours", "stock"), CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_the_second_call_is_kept(op, ours, stock, layout):
    for _ in range(3):
        x = image().contiguous(memory_format=layout)
        y = ours(x)
        torch.testing.assert_close(y, stock(x))
    assert y.stride() == ours(x).stride()
    with cvkernels.backend.use("reference"):
        torch.testing.assert_close(ours(x), y)


@pytest.mark.skipif(not IN_C, reason="needs PyTorch's C interface of tensors in Python, torch 2.14")
@every_call
@torch.no_grad()
def test_a_kept_call_does_not_reach_the_plans(monkeypatch, op, ours, stock):
    x = nhwc(image())
    expected = ours(x)
    monkeypatch.setattr(op._plans, "get", None)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)


@every_call
@torch.no_grad()
def test_other_data_is_no_kept_call(op, ours, stock):
    ours(image())
    for x in (nhwc(image()), image(2, 16, 5, 5)[:, ::2], image(2, 8, 10, 5)[:, :, ::2], image()):
        torch.testing.assert_close(ours(x), stock(x))
    if op is not dense_concat_op:
        for x in (image(1, 8, 5, 5), image()[:, :, :4, 1:], image().double()):
            torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("ours", [c[1] for c in list(CALLS.values())[:3]], ids=list(CALLS)[:3])
def test_a_gradient_is_kept_track_of(ours):
    with torch.no_grad():
        ours(image()), ours(image())
    x = image().requires_grad_()
    ours(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert not ours(image()).requires_grad


@torch.no_grad()
def test_surroundings_that_count_see_a_kept_call():
    x = image()
    expected = max_pool(x, 2)
    torch.testing.assert_close(torch.vmap(lambda u: max_pool(u[None], 2)[0])(x), expected)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(max_pool(x, 2), expected)
    with torch.profiler.profile() as profile:
        max_pool(x, 2)
    assert any("max_pool" in event.key for event in profile.key_averages())
    with cvkernels.backend.use("native"), torch.inference_mode():
        torch.testing.assert_close(max_pool(x, 2), expected)
    with torch.inference_mode():
        assert max_pool(x, 2).is_inference()
    assert "max_pool" in str(cvkernels.explain(CallsMaxPool(), x))
    with pytest.raises(cvkernels.BackendError):
        max_pool(x, 2, backend="triton")


@torch.no_grad()
def test_options_are_compared_by_value_and_type():
    x, window = image(), [2, 2]
    assert max_pool(x, window).shape[-1] == max_pool(x, window).shape[-1] == 2
    window[:] = 3, 3
    assert max_pool(x, window).shape[-1] == 1
    max_pool(x, 2), max_pool(x, 2)
    with pytest.raises(TypeError, match="kernel_size"):
        max_pool(x, 2.0)
    avg_pool(x, 1, divisor_override=1)
    with pytest.raises(TypeError, match="divisor_override"):
        avg_pool(x, 1, divisor_override=1.0)


@torch.no_grad()
def test_a_call_that_writes_over_its_input_is_refused_every_time():
    buffer = nhwc(image(2, 32, 5, 5))
    for _ in range(3):
        dense_concat(buffer, buffer[:, :8], 8)
        with pytest.raises(ValueError, match="overlaps"):
            dense_concat(buffer, buffer[:, :8], 4)
        with pytest.raises(ValueError, match="overlap"):
            avg_pool(buffer, 1, out=buffer)


@torch.no_grad()
@pytest.mark.parametrize("pool", [max_pool, avg_pool])
def test_a_view_that_negates_is_no_call_like_the_others(pool):
    x = image()
    negated = torch._neg_view(x)  # as the imaginary part of a conjugate is
    pool(x, 2), pool(x, 2)
    with pytest.raises(ValueError, match="x must not be a view that negates.*resolve_neg"):
        pool(negated, 2)
    with pytest.raises(ValueError, match="out must not be a view that negates"):
        pool(x, 1, out=torch._neg_view(image()))


def test_a_write_is_seen_by_autograd():
    buffer, src = nhwc(torch.zeros(2, 16, 5, 5)), image()
    with torch.no_grad():
        dense_concat(buffer, src, 8), dense_concat(buffer, src, 8)
    version = buffer._version
    dense_concat(buffer, src, 8)
    assert buffer._version == version + 1


@torch.no_grad()
def test_more_kinds_than_are_kept():
    for size in range(2, 90):
        x = image(1, 4, size, 3)
        torch.testing.assert_close(max_pool(x, 2), F.max_pool2d(x, 2))
    x = image(1, 4, 2, 3)
    torch.testing.assert_close(max_pool(x, 2), F.max_pool2d(x, 2))


@torch.no_grad()
def test_what_is_made_goes_with_its_last_reference():
    for _ in range(2):
        gone = weakref.ref(max_pool(image(), 2))
        assert gone() is None
        out, mean, var = batch_norm_act(nhwc(image()))
    assert mean.untyped_storage().data_ptr() == var.untyped_storage().data_ptr()
    del out, var
    assert mean.sum().isfinite()


@torch.no_grad()
def test_a_recipe_needs_addresses_that_tell_its_tensors_apart():
    x, residual = nhwc(image()), nhwc(image())
    for shortcut in (x, residual, x, residual):
        found = batch_norm_act(x, residual=shortcut).out
        torch.testing.assert_close(found, normalised(x) + shortcut)
