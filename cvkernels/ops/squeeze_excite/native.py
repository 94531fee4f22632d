"""The compiled se_scale and its parts: csrc/squeeze_excite/cpu.cpp, on the CPU.

Activations are passed as their number in ``ACTS``, and matrices without the 1x1 of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common import native
from cvkernels.ops.common.autograd import mark_written
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.layout import fits, fitting, is_nhwc
from cvkernels.ops.common.recycled import maker, new_like
from cvkernels.ops.squeeze_excite.problem import Layers, Problem

ACTS = {"none": 0, "relu": 1, "silu": 3}  # as csrc/common/act.h counts them
_LAYERS = "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, int act"

library = torch.library.Library("cvkernels", "FRAGMENT")
for schema in (
    "squeeze_native(Tensor x) -> Tensor",
    "squeeze_native_out(Tensor x, Tensor(a!) out) -> ()",
    f"excite_native(Tensor pooled, {_LAYERS}, bool sigmoid, int count) -> Tensor",
    "se_scale_native_out(Tensor x, Tensor gate, Tensor? residual, int act, Tensor(a!) out) -> ()",
    f"squeeze_excite_native_out(Tensor x, {_LAYERS}, Tensor? residual, int out_act, "
    "Tensor(a!) out) -> ()",
    "se_scale_native_sums(Tensor grad, Tensor x, Tensor? out, Tensor(a!)? masked, "
    "Tensor(b!) sums) -> ()",
    "se_scale_native_shifted(Tensor x, Tensor scale, Tensor shift, Tensor(a!) out) -> ()",
):
    library.define(schema)
extension.load()

squeeze_of = torch.ops.cvkernels.squeeze_native.default
squeeze_out = torch.ops.cvkernels.squeeze_native_out.default
excite_of = torch.ops.cvkernels.excite_native.default
se_scale_out = torch.ops.cvkernels.se_scale_native_out.default
squeeze_excite_out = torch.ops.cvkernels.squeeze_excite_native_out.default

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


def matrices(
    weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> Layers:
    """The two layers as the kernels read them: dense rows, in both layouts of a 1x1 convolution."""
    return _dense(weight1), _dense(bias1), _dense(weight2), _dense(bias2)


def _dense(t: OptionalTensor) -> OptionalTensor:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _directs(problem: Problem, call: Call) -> bool:
    """Whether a plan may call the op past the dispatcher: the operands are read as they are."""
    x, dense = call.x, (problem.gate, *problem.layers)
    return (
        native.directs(call)
        and x.shape[0] > 0
        and all(t is None or t.is_contiguous() for t in dense)
        and (_fits(problem, x) if x.dim() == 4 else x.is_contiguous())
    )


def _fits(problem: Problem, x: Tensor) -> bool:
    """Whether all maps are read and written as they are."""
    nhwc = is_nhwc(x)
    return all(t is None or fits(t, nhwc) for t in (x, problem.residual, problem.out))


def _detached(problem: Problem) -> Any:
    return tuple([t if t is None else t.detach() for t in problem.layers])


def plan_squeeze(problem: Problem, call: Call) -> Callable[..., Tensor]:
    """What squeezes maps like x."""

    def run(x):
        return squeeze_of(fitting(x, is_nhwc(x)))

    if not _directs(problem, call):
        return run
    x, out = call.x, call.x.new_empty(call.x.shape[:2])
    work, new_out = native.direct(lambda: squeeze_out(x, out)), maker(out)

    def run_directly(x):
        out = new_out()
        work(x.data_ptr(), out.data_ptr())
        return out

    return run_directly


def plan_excite(problem: Problem, call: Call) -> Callable[..., Tensor]:
    """What runs layers like these, as (layers, pooled)."""
    options = (ACTS[problem.act], problem.sigmoid, problem.pixels or 0)

    def run(layers, pooled):
        return excite_of(pooled.contiguous(), *matrices(*layers), *options)

    if not _directs(problem, call):
        return run
    x, weights = call.x, _detached(problem)
    work = native.direct(lambda: run(weights, x))
    dtype = x.dtype if problem.pixels is None else weights[0].dtype
    out = x.new_empty(len(x), problem.K, dtype=dtype)
    new_out = maker(out)

    def run_directly(layers, pooled):
        out = new_out()
        work(pooled.data_ptr(), *[0 if t is None else t.data_ptr() for t in layers], out.data_ptr())
        return out

    return run_directly


def plan_se_scale(problem: Problem, call: Call) -> Callable[..., Tensor]:
    """What scales maps like x, as (x, gate, residual, out)."""
    code = ACTS[problem.out_act]

    def run(x, gate, residual=None, out=None):
        nhwc = is_nhwc(x)
        y = new_like(x) if out is None else out
        residual = None if residual is None else fitting(residual, nhwc)
        se_scale_out(fitting(x, nhwc), gate.contiguous(), residual, code, y)
        return y

    if not _directs(problem, call):
        return writing(run, _fits(problem, call.x))
    x, gate, residual, out = call.x, problem.gate, problem.residual, problem.out
    y = new_like(x) if out is None else out
    work, new_result = native.direct(lambda: run(x, gate, residual, y)), maker(y)

    def run_directly(x, gate, residual=None, out=None):
        y = new_result() if out is None else out
        if out is not None:
            mark_written(out)
        r = 0 if residual is None else residual.data_ptr()
        work(x.data_ptr(), gate.data_ptr(), r, y.data_ptr())
        return y

    return run_directly


def plan_squeeze_excite(problem: Problem, call: Call) -> Callable[..., Tensor]:
    """What runs the block on maps like x, as (layers, x, residual, out)."""
    code, out_code = ACTS[problem.act], ACTS[problem.out_act]

    def run(layers, x, residual=None, out=None):
        nhwc = is_nhwc(x)
        y = new_like(x) if out is None else out
        residual = None if residual is None else fitting(residual, nhwc)
        layers = matrices(*layers)
        squeeze_excite_out(fitting(x, nhwc), *layers, code, residual, out_code, y)
        return y

    if not _directs(problem, call):
        return writing(run, _fits(problem, call.x))
    x, weights, residual, out = call.x, _detached(problem), problem.residual, problem.out
    y = new_like(x) if out is None else out
    work = native.direct(lambda: run(weights, x, residual, y))
    new_result = maker(y)

    def run_directly(layers, x, residual=None, out=None):
        y = new_result() if out is None else out
        if out is not None:
            mark_written(out)
        r = 0 if residual is None else residual.data_ptr()
        w = [0 if t is None else t.data_ptr() for t in layers]
        work(x.data_ptr(), *w, r, y.data_ptr())
        return y

    return run_directly


def writing(run: Callable[..., Tensor], fitted: bool) -> Callable[..., Tensor]:
    """``run``, whose result is copied into out where the kernels cannot write that directly."""

    def run_into(*data):
        if len(data) < 4 or (out := data[3]) is None:
            return run(*data)
        if not fitted:
            return out.copy_(run(*data[:3]))
        mark_written(out)
        return run(*data)

    return run_into


def has_gradient(x: Tensor, act: str) -> bool:
    """Whether :func:`backward` and :func:`scale_shifted` take maps like x and this activation."""
    return act in ("none", "relu") and is_nhwc(x) and fits(x, True)


def backward(
    grad: Tensor, x: Tensor, gate: Tensor, out: Tensor | None, act: str, input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.reference.se_scale_backward`, of channels_last maps."""
    grad = fitting(grad, True)
    masked = None
    if act == "relu":
        assert out is not None
        out, masked = fitting(out, True), new_like(x)
    sums = gate.new_empty(gate.shape, dtype=torch.float32)
    read = None if masked is None else out
    torch.ops.cvkernels.se_scale_native_sums.default(grad, x, read, masked, sums)
    s = torch.sigmoid(gate.float())
    dz = grad if masked is None else masked
    dx = scale_shifted(dz, s, torch.zeros_like(s)) if input_grad else x.new_empty(0)
    return dx, (sums * (s * (1 - s))).to(gate.dtype), x.new_empty(0) if masked is None else masked


def scale_shifted(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift``, both [N, C] in float32, of a channels_last x."""
    out = new_like(x)
    torch.ops.cvkernels.se_scale_native_shifted.default(
        x, scale.contiguous(), shift.contiguous(), out
    )
    return out


torch.library.register_fake(
    "cvkernels::squeeze_native", lambda x: x.new_empty(x.shape[:2]), lib=library
)


def fake_excite(pooled, weight1, bias1, weight2, bias2, act, sigmoid, count, backend=""):
    dtype = weight1.dtype if count else pooled.dtype
    return pooled.new_empty(pooled.shape[0], weight2.shape[0], dtype=dtype)


torch.library.register_fake("cvkernels::excite_native", fake_excite, lib=library)
native.writes(
    library, "squeeze_native_out", "se_scale_native_out", "squeeze_excite_native_out",
    "se_scale_native_sums", "se_scale_native_shifted",
)  # fmt: skip
