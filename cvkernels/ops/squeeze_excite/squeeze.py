"""squeeze: the mean of each channel over a map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.common.dispatch import Call, call_of
from cvkernels.ops.common.layout import fits, is_nhwc
from cvkernels.ops.common.plan import Plan, PlanTable, plan_of, planned_by
from cvkernels.ops.common.registration import register
from cvkernels.ops.common.traffic import Traffic, nbytes
from cvkernels.ops.common.work import GPU, Work
from cvkernels.ops.squeeze_excite import native, tiles, work
from cvkernels.ops.squeeze_excite.problem import Problem, check_map, table_of
from cvkernels.ops.squeeze_excite.reference import squeeze_reference

OP = "squeeze"
_plans = PlanTable()

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define("squeeze(Tensor x, str backend) -> Tensor")


def plan(x_like: Tensor, *, backend: Backend = "auto", once: bool = False) -> Plan:
    """A call of :func:`squeeze`, as ``plan(x)``; ``x_like`` is an example."""
    check_map(OP, x_like)
    call = call_of(x_like, (x_like,), TABLE, backend, once)
    return _plan(call).expecting(call, x=x_like)


@planned_by(plan)
def squeeze(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The mean of each channel: ``out[n, c] = mean over h, w of x[n, c, h, w]``.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; contiguous, channels_last and
            channel slices of a channels_last buffer are fast, other strides are copied first.
        backend: see :mod:`cvkernels.backend`; the rule is that of :func:`se_scale`.

    Returns:
        Tensor[N, C], dtype of x, contiguous; never a view of x. Sums are in float32 (float64 for
        float64), so that no sum overflows a half dtype. NaN and infinity propagate. N = 0 gives an
        empty output.

    Raises:
        ValueError: x is not 4-dimensional, or has no channels or no pixels.
        TypeError: dtype not listed above.
        BackendError: the requested backend cannot run this call.

    Differentiable in x. Equal inputs give equal bits. Source: Hu et al. 2018, arXiv:1709.01507,
    eq. 2.
    """
    if torch.compiler.is_compiling():
        return plan(x, backend=backend, once=True).run(x)
    key = _plans.key_of_one(backend, x, ())
    if (planned := _plans.get(key)) is None:
        planned = _plans.keep(key, plan(x, backend=backend, once=key is None), x)
    return planned.recorded(x)


backends.answers(OP, plan)


def _plan_triton(problem: Problem, call: Call) -> Callable[..., Tensor]:
    if call.computes_nothing:
        return lambda x: x.new_empty(x.shape[:2])
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.squeeze_excite import triton

    return triton.plan_squeeze(call.x)


TABLE = table_of(OP, _plan_triton, native.plan_squeeze, lambda problem, call: squeeze_reference)


def _plan(call: Call) -> Plan:
    x = call.x

    def traffic(name: str) -> Traffic:
        launches = 2 if name == "triton" and tiles.parts_of(x, tiles.sms_of(x)) > 1 else 1
        copied = int(not fits(x, is_nhwc(x)))
        moved, means = nbytes(x) * copied, x.shape[:2].numel() * x.element_size()
        return Traffic(launches + copied, nbytes(x) + moved, means + moved)

    def registered(name: str) -> Callable[..., Tensor]:
        return lambda x: torch.ops.cvkernels.squeeze(x, name)

    def describe(name: str, gpu: GPU) -> tuple[Work, ...]:
        return (work.squeeze(x, gpu), *work.finish(x, gpu)) if name == "triton" else ()

    return plan_of(TABLE, Problem(OP), call, (), traffic, registered, work=describe)


def _squeeze(x: Tensor, backend: str) -> Tensor:
    return _plan(Call(x, backends.device_type(x), backend, once=True)).run(x)


def _context(ctx, inputs, output):
    ctx.shape = inputs[0].shape


def _backward(ctx, grad):
    pixels = ctx.shape[2] * ctx.shape[3]
    return (grad / pixels)[:, :, None, None].expand(ctx.shape), None


register(library, OP, _squeeze, lambda x, backend: x.new_empty(x.shape[:2]), _backward, _context)
