"""depthwise_conv_bn_act: the contract, the table of implementations, plans, the registered ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.common import convolution
from cvkernels.ops.common.autograd import autocast_dtype
from cvkernels.ops.common.convolution import TRITON_DTYPES, norm_of
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference
from cvkernels.ops.common.layout import in_format
from cvkernels.ops.common.norm import BatchNormParams, accumulator
from cvkernels.ops.common.plan import Plan, plan_of, planned_by
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.conv_bn_act.problem import Arguments as GroupedArguments
from cvkernels.ops.conv_bn_act.problem import Parameters
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_backward
from cvkernels.ops.depthwise_conv_bn_act import cuda, native, work
from cvkernels.ops.depthwise_conv_bn_act.problem import OP, Arguments, DepthwiseProblem, problem_of
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from cvkernels.ops.depthwise_conv_bn_act.tiling import tiling

KERNELS = ((3, 3), (5, 5))
ARGUMENTS = (
    f"Tensor x, Tensor weight, Tensor? bias, {convolution.BN}, "
    "int[2] stride, int[2] padding, int[2] dilation, str act, str backend"
)
NAMES = [argument.split()[1] for argument in ARGUMENTS.split(", ")]

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(f"depthwise_conv_bn_act({ARGUMENTS}) -> Tensor")
library.define(f"depthwise_conv_bn_act_squeeze({ARGUMENTS}) -> (Tensor, Tensor)")


# x -> (out, sums), which are None where they were not asked for
Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def plan(
    x_like: Tensor, weight: Tensor, bias: Tensor | None = None,
    bn: BatchNormParams | None = None, *,
    cache: DerivedWeights | None = None, backend: Backend = "auto", once: bool = False,
    **options: Any,
) -> Plan:  # fmt: skip
    """A call of :func:`depthwise_conv_bn_act`, as ``plan(x)``, which gives (out, sums or None).

    ``x_like`` is an example; ``once`` says that the plan is called once. The native op's plan for
    once also writes into memory that it is given, as ``plan(x, out, sums)``.
    """
    arguments = Arguments(x_like, weight, bias, bn, **options, autocast=autocast_dtype(x_like))
    problem, call = _checked(arguments, backend, once)
    return _plan(problem, call, arguments, cache).expecting(call, arguments[1:4], x=x_like)


@planned_by(plan)
def depthwise_conv_bn_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, bn: BatchNormParams | None = None, *,
    stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1, act: str = "none", squeeze: bool = False,
    cache: DerivedWeights | None = None, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Depthwise convolution, inference batch norm and activation in one pass, and its squeeze.

    ``out = act(bn(conv2d(x, weight, groups=C) + bias))``, and on request
    ``sums[n, c] = sum over p, q of out[n, c, p, q]``, which squeeze-and-excitation divides by P*Q.
    P and Q are conv2d's output height and width.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; any strides, channels_last and
            channel slices of a channels_last buffer are fast.
        weight: Tensor[C, 1, R, S], dtype and device of x; any strides.
        bias: Tensor[C], any floating dtype.
        bn: vectors Tensor[C] of any floating dtype; read live, at every call.
        stride, padding, dilation: in pixels, (height, width) or one number for both.
        act: "none", "relu", "relu6" or "silu" (x * sigmoid(x)).
        squeeze: return (out, sums).
        cache: keeps what a backend derives from the parameters (folded, repacked, cast); one per
            convolution. Without it the native op folds at every call, and Triton gathers weights.
        backend: see :mod:`cvkernels.backend`. "auto" runs kernels of 3x3 and 5x5: for strides of 1
            and 2 without dilation on CUDA tensors in CUDA C++ ("cuda"), where the compiled part is
            there and x is channels_last with channels and strides in packs of 16 bytes, and on CPU
            tensors by the native op; on other CUDA tensors by Triton. The reference runs other
            kernels, float64, and where these are missing; on CPU also when a gradient is needed and
            under torch.compile (inductor fuses it there).

    Returns:
        Tensor[N, C, P, Q], dtype of x (of autocast, where it is active), channels_last, never a
        view of an argument; the reference keeps the layout that PyTorch chooses. With ``squeeze``
        a pair of it and Tensor[N, C] float32 (float64 for float64). Accumulation, the epilogue and
        the sums are in float32; the sums are of out before it is rounded to its dtype, and finite
        where a half dtype overflows. Empty input gives empty output.

    Raises:
        ValueError: a shape, device, stride or option does not fit.
        TypeError: a dtype is not listed above, or dtypes differ; bn is not BatchNormParams.
        RuntimeError: x and weight do not fit; the error is a ValueError or TypeError as well.
        BackendError: the requested backend cannot run this call.

    Differentiable in every tensor but the running statistics, any number of times, through both
    results. No atomics: equal inputs give equal bits, whatever the number of threads. Padding is
    multiplied as zeros: a NaN or infinite weight reaches the borders too. Source: Howard et al.
    2017, arXiv:1704.04861; the squeeze: Hu et al. 2018, arXiv:1709.01507; together: Tan and Le
    2019, arXiv:1905.11946.
    """
    geometry = (stride, padding, dilation)
    given = (x, weight, bias, bn, *geometry, act, squeeze)
    if torch.compiler.is_compiling():
        return _traced(Arguments(*given, autocast_dtype(x)), backend)

    def make(once: bool = False) -> Plan:
        arguments = Arguments(*given, autocast_dtype(x))
        return _plan(*_checked(arguments, backend, once), arguments, cache)

    options = (geometry, act, squeeze)
    planned = convolution.kept_plan(cache, backend, (x,), (weight, bias, bn), options, make)
    out, sums = (planned or make(once=True)).recorded(x)
    return (out, sums) if squeeze else out


backends.answers(OP, plan)


def _checked(arguments: Arguments, backend: Backend, once: bool) -> tuple[DepthwiseProblem, Call]:
    problem, autocast = problem_of(*arguments), arguments.autocast
    return problem, call_of(arguments.x, arguments[:4], TABLE, backend, once, autocast)


def _why_not_triton(problem: DepthwiseProblem, call: Call) -> str:
    if problem.dtype in TRITON_DTYPES and (problem.R, problem.S) not in KERNELS:
        return f"the Triton kernel is 3x3 or 5x5, got {problem.R}x{problem.S}"
    return convolution.lacks_triton(problem, call)


def _why_not_native(problem: DepthwiseProblem, call: Call) -> str:
    if call.grad and call.automatic:
        return "a gradient is needed, and the native op keeps nothing for one"
    return native.why_not(problem, call.device)


def _plan_cuda(
    problem: DepthwiseProblem, call: Call, parameters: Parameters, like: tuple,
    cache: DerivedWeights | None,
) -> Run:  # fmt: skip
    weight, bias, bn = parameters[:3]
    launch = cuda.plan_launch(problem, call.x, _rsc(weight, cache), bias, bn)

    def run(x):
        out, sums = new_outputs(problem, x.device)
        launch(x, out, sums)
        return out, sums

    return run


def _plan_triton(
    problem: DepthwiseProblem, call: Call, parameters: Parameters, like: tuple,
    cache: DerivedWeights | None,
) -> Run:  # fmt: skip
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.depthwise_conv_bn_act import triton

    _, bias, bn = parameters[:3]
    weight = _rsc(parameters.weight, cache)
    out, _ = new_outputs(problem, torch.device("meta"))
    launch = triton.plan_launch(problem, call.x, weight, out)

    def run(x):
        out, sums = new_outputs(problem, x.device)
        launch(x, weight, bias, bn, out, sums)
        return out, sums

    return run


def _plan_reference(problem: DepthwiseProblem, call: Call, parameters: Parameters, *_: Any) -> Run:
    weight, bias, bn = parameters[:3]
    squeeze = problem.squeeze
    options = (problem.stride, problem.padding, problem.dilation, problem.act, squeeze)

    def run(x):
        result = depthwise_conv_bn_act_reference(x, weight, bias, bn, *options)
        return result if squeeze else (result, None)

    return run


def _absent(name: str) -> Implementation:
    reason = f"{OP} has no {name} implementation"
    return Implementation(name, lambda problem, call: reason, _plan_reference, device=None)


def new_outputs(problem: DepthwiseProblem, device: torch.device) -> tuple[Tensor, Tensor | None]:
    out = convolution.new_output(problem, device)
    if not problem.squeeze:
        return out, None
    return out, torch.empty(out.shape[:2], dtype=accumulator(problem.dtype), device=device)


_fused = functools.partial(convolution.fused, allocate=new_outputs)
TABLE = Table(
    OP,
    Implementation("cuda", cuda.why_not, _fused(_plan_cuda), "fused on cuda", "cuda"),
    Implementation("triton", _why_not_triton, _fused(_plan_triton), "fused on cuda", "cuda"),
    Implementation("native", _why_not_native, _fused(native.plan), "fused on cpu", "cpu"),
    _absent("cudnn"),
    _absent("onednn"),
    reference(_plan_reference),
)
IMPLEMENTATIONS = TABLE.names


def _plan(
    problem: DepthwiseProblem, call: Call, arguments: Arguments, cache: DerivedWeights | None = None
) -> Plan:
    """The plan of a checked call."""

    def traffic(name: str) -> Traffic:
        parts = _bytes_of_parts(problem, name, backends.gpu(call.x)[1])
        return Traffic(1 + (parts > 0), problem.bytes_read + parts, problem.bytes_written + parts)

    def registered(name: str) -> Run:
        geometry = (problem.stride, problem.padding, problem.dilation)

        def run(x):
            result = _registered(arguments._replace(x=x), geometry, name)
            return result if problem.squeeze else (result, None)

        return run

    operands = (Parameters(*arguments[1:4]), (), cache)
    describe = functools.partial(work.of, problem)
    return plan_of(TABLE, problem, call, operands, traffic, registered, work=describe)


def _bytes_of_parts(problem: DepthwiseProblem, name: str, gpu: tuple[int, int]) -> int:
    """What the second kernel, which adds a GPU kernel's partial sums, reads; 0 without one."""
    if not problem.squeeze or problem.N * problem.C == 0 or name not in ("cuda", "triton"):
        return 0
    in_triton = name == "triton"
    parts = tiling(problem, gpu).bands if in_triton else cuda.cut(problem, gpu).parts(problem)
    return 4 * problem.N * problem.C * parts if parts > 1 else 0


def runs_fused(x: Tensor, kernel_size: tuple[int, int], stride: tuple, dilation: tuple) -> bool:
    """Whether "auto" has a kernel for a convolution of this kind on x, gradients aside."""
    requested = backends.requested("auto", IMPLEMENTATIONS)
    if requested == "reference" or kernel_size not in KERNELS:
        return False
    dtype = autocast_dtype(x) or x.dtype
    device = backends.device_type(x)
    if device == "cpu" and requested != "triton":
        return not native.lacks(dtype, kernel_size, stride, dilation)
    return dtype in TRITON_DTYPES and not backends.lacks_triton(device)


def _rsc(weight: Tensor, cache: DerivedWeights | None) -> Tensor:
    """The weight as [R, S, C], its channels contiguous where a cache makes that free."""
    if cache is None:
        return weight.squeeze(1).permute(1, 2, 0)
    return cache.get(
        "rsc", [weight], lambda: weight.detach().squeeze(1).permute(1, 2, 0).contiguous()
    )


def _traced(arguments: Arguments, backend: Backend) -> Tensor | tuple[Tensor, Tensor]:
    """The call under torch.compile: the registered op, or on CPU the reference for inductor."""
    a = arguments
    if (name := convolution.traced(TABLE, backend, a.x)) == "reference":
        return depthwise_conv_bn_act_reference(*a[:-1])
    return _registered(a, convolution.pairs(OP, a.stride, a.padding, a.dilation), name)


def _registered(
    a: Arguments, geometry: tuple[tuple[int, int], ...], name: str
) -> Tensor | tuple[Tensor, Tensor]:
    """The call of the registered op, whose operands have autocast's dtype; its norm lies flat."""
    x, weight = a.x, a.weight
    if a.autocast is not None:
        x, weight = x.to(a.autocast), weight.to(a.autocast)
    ops = torch.ops.cvkernels
    op = ops.depthwise_conv_bn_act_squeeze if a.squeeze else ops.depthwise_conv_bn_act
    return op(x, weight, a.bias, *(a.bn or BatchNormParams()), *geometry, a.act, name)


def _compute(flat: tuple, squeeze: bool) -> tuple[Tensor, Tensor | None]:
    x, *_, backend = flat
    arguments = Arguments._make([*flat[:3], norm_of(flat[3:8]), *flat[8:12], squeeze, None])
    call = Call(x, backends.device_type(x), backend, once=True)
    out, sums = _plan(problem_of(*arguments), call, arguments).recorded(x)
    return in_format(out, torch.channels_last), sums


def _fake_squeeze(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    sums = torch.empty(x.shape[:2], dtype=accumulator(x.dtype), device=x.device)
    return convolution.fake_output(x, *others), sums


def _gradients(grads, named):
    x, weight, bias, *norm, stride, padding, dilation, act, _ = map(named.get, NAMES)
    grad, *of_sums = grads
    if of_sums and of_sums[0] is not None:
        through = of_sums[0][:, :, None, None]
        size = convolution.output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        grad = through.expand(-1, -1, *size) if grad is None else grad + through
        grad = grad.to(x.dtype)
    geometry = (stride, padding, dilation, x.shape[1])
    arguments = GroupedArguments(x, weight, bias, norm_of(norm), *geometry, act)
    return conv_bn_act_backward(grad, arguments, named.get("out"))


for name, function, fake in (
    (OP, lambda *flat: _compute(flat, False)[0], convolution.fake_output),
    (f"{OP}_squeeze", lambda *flat: _compute(flat, True), _fake_squeeze),
):
    convolution.register(library, name, NAMES, function, fake, _gradients)
