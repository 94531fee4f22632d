"""se_scale: a map by its gates, with the shortcut and activation behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.common.arguments import check_act, check_overlap
from cvkernels.ops.common.differentiable import needs_stock
from cvkernels.ops.common.dispatch import Call, choose
from cvkernels.ops.common.layout import format_of, in_format, is_nhwc, new_like
from cvkernels.ops.common.plan import Plan, PlanTable, plan_of, planned_by
from cvkernels.ops.common.registration import register
from cvkernels.ops.common.traffic import Traffic, nbytes
from cvkernels.ops.common.work import GPU, Work
from cvkernels.ops.squeeze_excite import native, work
from cvkernels.ops.squeeze_excite.problem import (
    IN_PLACE,
    OUT_ACTS,
    Problem,
    check_gate,
    check_map,
    checked_call,
    copies,
    table_of,
)
from cvkernels.ops.squeeze_excite.reference import se_scale_backward, se_scale_reference

OP = "se_scale"
_plans = PlanTable()

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define("se_scale(Tensor x, Tensor gate, Tensor? residual, str act, str backend) -> Tensor")
library.define(
    "se_scale_backward(Tensor grad, Tensor x, Tensor gate, Tensor? residual, Tensor? out, "
    "str act, bool input_grad, str backend) -> (Tensor, Tensor, Tensor)"
)
library.define("se_scale_shifted(Tensor x, Tensor gate, Tensor shift, str backend) -> Tensor")


def plan(
    x_like: Tensor, gate_like: Tensor, residual: Tensor | None = None, act: str = "none", *,
    out: Tensor | None = None, backend: Backend = "auto", once: bool = False,
) -> Plan:  # fmt: skip
    """A call of :func:`se_scale`, as ``plan(x, gate, residual=None, out=None)``.

    The tensors are examples.
    """
    problem = Problem(OP, gate=gate_like, residual=residual, out_act=act, out=out)
    check_map(OP, x_like)
    check_act(OP, "act", act, OUT_ACTS)
    check_gate(OP, gate_like, x_like)
    call = checked_call(problem, x_like, (gate_like,), TABLE, backend, once)
    planned = _plan(problem, call)
    return planned.expecting(call, x=x_like, gate=gate_like, residual=residual, out=out)


@planned_by(plan)
def se_scale(
    x: Tensor, gate: Tensor, residual: Tensor | None = None, act: str = "none", *,
    out: Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Scale each channel by its gate: ``out = act(x * sigmoid(gate) + residual)``, gate per (n, c).

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; contiguous, channels_last and
            channel slices of a channels_last buffer are fast, other strides are copied first.
        gate: Tensor[N, C], dtype of x or float32. Logits, before the sigmoid.
        residual: Tensor[N, C, H, W], dtype of x, added before the activation; fast in x's layout.
        act: "none", "relu" or "silu".
        out: Tensor[N, C, H, W] to write into, dtype and device of x, any strides; x or residual
            itself (in place) or a tensor that shares no element with an argument. Not
            differentiable.
        backend: see :mod:`cvkernels.backend`. "auto" runs Triton on CUDA tensors and the native op
            on CPU tensors. The reference runs where these are missing, for float64, on CPU where a
            gradient is needed, and for CPU tensors under torch.compile (inductor generates this).

    Returns:
        Tensor[N, C, H, W], dtype of x; channels_last if x's channels have stride 1, else
        contiguous (the reference keeps the layout that PyTorch chooses). ``out`` itself where
        given, else never a view of an argument. Computed in float32 with one rounding at the end.
        NaN and infinity propagate. N = 0 gives an empty output.

    Raises:
        ValueError: a shape, device or act does not fit, x has no channels or no pixels, out
            overlaps an argument in part or itself, or a gradient is needed with out.
        TypeError: dtype not listed above, or dtypes differ.
        BackendError: the requested backend cannot run this call.

    Differentiable in x, gate and residual, any number of times. Equal inputs give equal bits.
    Source: Hu et al. 2018, arXiv:1709.01507, eq. 4; with the residual, figure 3.
    """
    if torch.compiler.is_compiling():
        y = plan(x, gate, residual, act, out=out, backend=backend, once=True).run(x, gate, residual)
        return y if out is None else out.copy_(y)
    key = _plans.key(backend, (x, gate, residual, out), act)
    if (planned := _plans.get(key)) is None:
        planned = plan(x, gate, residual, act, out=out, backend=backend, once=key is None)
        _plans.keep(key, planned, x, gate, residual, out)
    if out is not None:
        check_overlap(OP, out, {"x": x, "residual": residual, "gate": gate}, IN_PLACE)
    return planned.recorded(x, gate, residual, out)


backends.answers(OP, plan)


def _plan_triton(problem: Problem, call: Call) -> Callable[..., Tensor]:
    if call.computes_nothing:
        return lambda x, gate, residual=None, out=None: new_like(x) if out is None else out
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.squeeze_excite import triton

    fitted = not copies(problem, call.x)
    out = problem.out if fitted else None
    launch = triton.plan_se_scale(call.x, problem.residual, problem.out_act, out)
    return native.writing(launch, fitted)


def _plan_reference(problem: Problem, call: Call) -> Callable[..., Tensor]:
    act = problem.out_act

    def run(x, gate, residual=None, out=None):
        y = se_scale_reference(x, gate, residual, act)
        return y if out is None else out.copy_(y)

    return run


TABLE = table_of(OP, _plan_triton, native.plan_se_scale, _plan_reference)


def _plan(problem: Problem, call: Call) -> Plan:
    """The plan of a checked call."""
    act = problem.out_act

    def traffic(name: str) -> Traffic:
        copied, size = copies(problem, call.x), nbytes(call.x)
        read = size + nbytes(problem.gate, problem.residual)
        return Traffic(1 + copied, read + size * copied, size + size * copied)

    def registered(name: str) -> Callable[..., Tensor]:
        def run(x, gate, residual=None, out=None):
            return torch.ops.cvkernels.se_scale(x, gate, residual, act, name)

        return run

    def describe(name: str, gpu: GPU) -> tuple[Work, ...]:
        return (work.scale(call.x, problem.residual, gpu),) if name == "triton" else ()

    return plan_of(TABLE, problem, call, (), traffic, registered, work=describe)


def _se_scale(x, gate, residual, act, backend):
    problem = Problem(OP, gate=gate, residual=residual, out_act=act)
    call = Call(x, backends.device_type(x), backend, once=True)
    return in_format(_plan(problem, call).run(x, gate, residual), format_of(is_nhwc(x)))


def _backend_of(x: Tensor, backend: str) -> str:
    call = Call(x, backends.device_type(x), backend, once=True)
    return choose(TABLE, Problem(OP), call)[1].backend


def _se_scale_backward(grad, x, gate, residual, out, act, input_grad, backend):
    name, options = _backend_of(x, backend), (residual, out, act, input_grad)
    if name == "triton":
        from cvkernels.ops.squeeze_excite import triton

        run = triton.plan_se_scale_backward(grad, x, *options)
        dx, d_gate, dz = run((grad, x, residual, out), gate)
    elif name == "native" and native.has_gradient(x, act):
        dx, d_gate, dz = native.backward(grad, x, gate, out, act, input_grad)
    else:
        dx, d_gate, dz = se_scale_backward(grad, x, gate, *options)
    layout = format_of(is_nhwc(x))
    made = [in_format(d, layout) if d.dim() == 4 else d for d in (dx, dz)]
    return made[0], d_gate, made[1]


def _se_scale_shifted(x, gate, shift, backend):
    name = _backend_of(x, backend)
    if name == "triton":
        from cvkernels.ops.squeeze_excite import triton

        y = triton.plan_se_scale(x, None, "none")(x, gate, None, None, shift.contiguous())
    elif name == "native" and native.has_gradient(x, "none"):
        y = native.scale_shifted(x, torch.sigmoid(gate.float()), shift.float())
    else:
        scale = torch.sigmoid(gate)[:, :, None, None]
        y = (x * scale + shift[:, :, None, None]).to(x.dtype)
    return in_format(y, format_of(is_nhwc(x)))


def _fake_backward(grad, x, gate, residual, out, act, input_grad, backend):
    nothing = x.new_empty(0)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dz = nothing if act == "none" else new_like(x)
    return new_like(x) if input_grad else nothing, d_gate, dz


def saved_for_act(
    act: str, residual: Tensor | None, out: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(residual, out), as far as the gradient of act needs them."""
    return residual if act == "silu" else None, out if act == "relu" else None


def _context(ctx, inputs, output):
    x, gate, residual, ctx.act, ctx.backend = inputs
    ctx.save_for_backward(x, gate, *saved_for_act(ctx.act, residual, output))
    ctx.has_residual = residual is not None


def _backward(ctx, grad):
    x, gate, residual, out = ctx.saved_tensors
    operands = (grad, x, gate, residual, out, ctx.act, ctx.needs_input_grad[0])
    if needs_stock(grad):
        dx, d_gate, dz = se_scale_backward(*operands)
    else:
        dx, d_gate, dz = torch.ops.cvkernels.se_scale_backward(*operands, ctx.backend)
    d_residual = None
    if ctx.has_residual:
        d_residual = grad if ctx.act == "none" else dz
    return dx if ctx.needs_input_grad[0] else None, d_gate, d_residual, None, None


register(library, OP, _se_scale, lambda x, *_: new_like(x), _backward, _context)
register(library, "se_scale_backward", _se_scale_backward, _fake_backward)
register(library, "se_scale_shifted", _se_scale_shifted, lambda x, *_: new_like(x))
