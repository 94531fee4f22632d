"""depthwise_conv_bn_act: the contract, the table of implementations, plans, the registered ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import extension
from cvkernels.backend import Backend
from cvkernels.ops.common import convolution
from cvkernels.ops.common.autograd import autocast_dtype
from cvkernels.ops.common.convolution import TRITON_DTYPES
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference
from cvkernels.ops.common.layout import in_format
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.plan import Plan, plan_of, planned_by
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.conv_bn_act.problem import Parameters
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_backward
from cvkernels.ops.depthwise_conv_bn_act import native
from cvkernels.ops.depthwise_conv_bn_act.problem import OP, DepthwiseProblem, problem_of, sums_dtype
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
Tensors = tuple[Tensor, Tensor, Tensor | None, BatchNormParams | None]
Geometry = tuple[Any, Any, Any]


def plan(
    x_like: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn: BatchNormParams | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    act: str = "none",
    squeeze: bool = False,
    cache: DerivedWeights | None = None,
    backend: Backend = "auto",
    once: bool = False,
) -> Plan:
    """A call of :func:`depthwise_conv_bn_act`, as ``plan(x)``, which gives (out, sums or None).

    ``x_like`` is an example; ``once`` says that the plan is called once. The native op's plan for
    once also writes into memory that it is given, as ``plan(x, out, sums)``.
    """
    tensors, geometry = (x_like, weight, bias, bn), (stride, padding, dilation)
    problem, call = _checked(tensors, geometry, act, squeeze, backend, once)
    return _plan(problem, call, tensors, cache).expecting(call, tensors[1:], x=x_like)


@planned_by(plan)
def depthwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn: BatchNormParams | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    act: str = "none",
    squeeze: bool = False,
    cache: DerivedWeights | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
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
        backend: see :mod:`cvkernels.backend`. "auto" runs kernels of 3x3 and 5x5: on CUDA tensors
            by Triton, on CPU tensors by the native op, for strides of 1 and 2 without dilation. The
            reference runs other kernels, float64, and where Triton or the compiled part is missing;
            on CPU also when a gradient is needed and under torch.compile (inductor fuses it there).

    Returns:
        Tensor[N, C, P, Q], dtype of x (of autocast, where it is active), channels_last, never a
        view of an argument; the reference keeps the layout that PyTorch chooses. With ``squeeze``
        a pair of it and Tensor[N, C] float32 (float64 for float64). Accumulation, the epilogue and
        the sums are in float32; the sums are of out before it is rounded to its dtype, and finite
        where a half dtype overflows. Empty input gives empty output.

    Raises:
        ValueError: a shape, device, stride or option does not fit.
        TypeError: a dtype is not listed above, or dtypes differ; bn is not BatchNormParams.
        BackendError: the requested backend cannot run this call.

    Differentiable in every tensor but the running statistics, any number of times, through both
    results. No atomics: equal inputs give equal bits, whatever the number of threads. Padding is
    multiplied as zeros: a NaN or infinite weight reaches the borders too. Source: Howard et al.
    2017, arXiv:1704.04861; the squeeze: Hu et al. 2018, arXiv:1709.01507; together: Tan and Le
    2019, arXiv:1905.11946.
    """
    tensors, geometry = (x, weight, bias, bn), (stride, padding, dilation)
    if torch.compiler.is_compiling():
        return _traced(tensors, geometry, act, squeeze, backend)

    def make(once: bool = False) -> Plan:
        problem, call = _checked(tensors, geometry, act, squeeze, backend, once)
        return _plan(problem, call, tensors, cache)

    options = (geometry, act, squeeze)
    planned = convolution.kept_plan(cache, backend, (x,), tensors[1:], options, make)
    out, sums = (planned or make(once=True)).recorded(x)
    return (out, sums) if squeeze else out


backends.answers(OP, plan)


def _checked(
    tensors: Tensors, geometry: Geometry, act: str, squeeze: bool, backend: Backend, once: bool
) -> tuple[DepthwiseProblem, Call]:
    x = tensors[0]
    autocast = autocast_dtype(x)
    problem = problem_of(*tensors, *geometry, act, squeeze, autocast)
    return problem, call_of(x, tensors, TABLE, backend, once, autocast)


def _why_not_triton(problem: DepthwiseProblem, call: Call) -> str:
    if problem.dtype not in TRITON_DTYPES:
        return f"Triton computes in float16, bfloat16 and float32, got {problem.dtype}"
    if (problem.R, problem.S) not in KERNELS:
        return f"the Triton kernel is 3x3 or 5x5, got {problem.R}x{problem.S}"
    return backends.lacks_triton(call.device)


def _why_not_native(problem: DepthwiseProblem, call: Call) -> str:
    if call.grad and call.automatic:
        return "a gradient is needed, and the native op keeps nothing for one"
    return native.why_not(problem, call.device)


def _plan_triton(
    problem: DepthwiseProblem, call: Call, parameters: Parameters, like: tuple,
    cache: DerivedWeights | None,
) -> Run:  # fmt: skip
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.depthwise_conv_bn_act import triton

    _, bias, bn, _ = parameters
    weight = _rsc(parameters.weight, cache)
    out, _ = new_outputs(problem, torch.device("meta"))
    launch = triton.plan_launch(problem, call.x, weight, out)

    def run(x):
        out, sums = new_outputs(problem, x.device)
        launch(x, weight, bias, bn, out, sums)
        return out, sums

    return run


def _plan_reference(
    problem: DepthwiseProblem, call: Call, parameters: Parameters, like: tuple,
    cache: DerivedWeights | None,
) -> Run:  # fmt: skip
    weight, bias, bn, _ = parameters
    geometry = (problem.stride, problem.padding, problem.dilation)
    act, squeeze = problem.act, problem.squeeze

    def run(x):
        result = _reference((x, weight, bias, bn), geometry, act, squeeze)
        return result if squeeze else (result, None)

    return run


def _absent(name: str) -> Implementation:
    reason = f"{OP} has no {name} implementation"
    return Implementation(name, lambda problem, call: reason, _plan_reference, device=None)


def new_outputs(problem: DepthwiseProblem, device: torch.device) -> tuple[Tensor, Tensor | None]:
    size = (problem.N, problem.C, problem.P, problem.Q)
    layout = torch.channels_last
    out = torch.empty(size, dtype=problem.dtype, device=device, memory_format=layout)
    if not problem.squeeze:
        return out, None
    return out, torch.empty(size[:2], dtype=problem.sums_dtype, device=device)


TABLE = Table(
    OP,
    Implementation(
        "triton", _why_not_triton, convolution.fused(_plan_triton, new_outputs), "fused on cuda",
        "cuda",
    ),
    Implementation(
        "native", _why_not_native, convolution.fused(native.plan, new_outputs), "fused on cpu",
        "cpu",
    ),
    _absent("cudnn"),
    _absent("onednn"),
    reference(_plan_reference),
)  # fmt: skip
IMPLEMENTATIONS = TABLE.names


def _plan(
    problem: DepthwiseProblem, call: Call, tensors: tuple, cache: DerivedWeights | None = None
) -> Plan:
    """The plan of a checked call."""
    parameters = Parameters(*tensors[1:])

    def traffic(name: str) -> Traffic:
        parts = _bytes_of_parts(problem, backends.gpu(call.x)[1]) if name == "triton" else 0
        return Traffic(1 + (parts > 0), problem.bytes_read + parts, problem.bytes_written + parts)

    def registered(name: str) -> Run:
        geometry = (problem.stride, problem.padding, problem.dilation)

        def run(x):
            result = _registered(
                (x, *parameters[:3]), geometry, problem.act, problem.squeeze, call.autocast, name
            )
            return result if problem.squeeze else (result, None)

        return run

    return plan_of(TABLE, problem, call, (parameters, (), cache), traffic, registered)


def _bytes_of_parts(problem: DepthwiseProblem, gpu: tuple[int, int]) -> int:
    """What the second kernel, which adds the bands of Triton's sums, reads; 0 without one."""
    if not problem.squeeze or problem.N * problem.C == 0:
        return 0
    bands = tiling(problem, gpu).bands
    return 4 * problem.N * problem.C * bands if bands > 1 else 0


def runs_fused(x: Tensor, kernel_size: tuple[int, int], stride: tuple, dilation: tuple) -> bool:
    """Whether "auto" has a kernel for a convolution of this kind on x, gradients aside."""
    requested = backends.requested("auto", IMPLEMENTATIONS)
    if requested == "reference" or kernel_size not in KERNELS:
        return False
    dtype = autocast_dtype(x) or x.dtype
    device = backends.device_type(x)
    if device == "cpu" and requested != "triton":
        return (
            dtype in native.DTYPES
            and stride in ((1, 1), (2, 2))
            and dilation == (1, 1)
            and extension.has("cpu")
        )
    return dtype in TRITON_DTYPES and not backends.lacks_triton(device)


def _rsc(weight: Tensor, cache: DerivedWeights | None) -> Tensor:
    """The weight as [R, S, C], its channels contiguous where a cache makes that free."""
    if cache is None:
        return weight.squeeze(1).permute(1, 2, 0)
    return cache.get(
        "rsc", [weight], lambda: weight.detach().squeeze(1).permute(1, 2, 0).contiguous()
    )


def _reference(
    tensors: tuple, geometry: tuple, act: str, squeeze: bool
) -> Tensor | tuple[Tensor, Tensor]:
    stride, padding, dilation = geometry
    return depthwise_conv_bn_act_reference(
        *tensors, stride=stride, padding=padding, dilation=dilation, act=act, squeeze=squeeze
    )


def _traced(
    tensors: tuple, geometry: tuple, act: str, squeeze: bool, backend: Backend
) -> Tensor | tuple[Tensor, Tensor]:
    """The call under torch.compile: the registered op, or on CPU the reference for inductor."""
    x = tensors[0]
    if (name := convolution.traced(TABLE, backend, x)) == "reference":
        return _reference(tensors, geometry, act, squeeze)
    pairs = convolution.pairs(OP, *geometry)
    return _registered(tensors, pairs, act, squeeze, autocast_dtype(x), name)


def _registered(
    tensors: tuple,
    geometry: tuple,
    act: str,
    squeeze: bool,
    autocast: torch.dtype | None,
    name: str,
) -> Tensor | tuple[Tensor, Tensor]:
    x, weight, bias, bn = tensors
    if autocast is not None:
        x, weight = x.to(autocast), weight.to(autocast)
    ops = torch.ops.cvkernels
    op = ops.depthwise_conv_bn_act_squeeze if squeeze else ops.depthwise_conv_bn_act
    return op(x, weight, bias, *(bn or BatchNormParams()), *geometry, act, name)


def _unflatten(flat: tuple) -> tuple[Tensors, Geometry, str, str]:
    """(tensors, geometry, act, backend) of a registered op's arguments."""
    x, weight, bias = flat[:3]
    bn = BatchNormParams(*flat[3:8])
    tensors = (x, weight, bias, None if bn[:4] == (None,) * 4 else bn)
    stride, padding, dilation = (tuple(pair) for pair in flat[8:11])
    return tensors, (stride, padding, dilation), flat[11], flat[12]


def _compute(flat: tuple, squeeze: bool) -> tuple[Tensor, Tensor | None]:
    tensors, geometry, act, backend = _unflatten(flat)
    problem = problem_of(*tensors, *geometry, act, squeeze)
    call = Call(tensors[0], backends.device_type(tensors[0]), backend, once=True)
    out, sums = _plan(problem, call, tensors).recorded(tensors[0])
    return in_format(out, torch.channels_last), sums


def _depthwise_conv_bn_act(*flat: Any) -> Tensor:
    return _compute(flat, False)[0]


def _depthwise_conv_bn_act_squeeze(*flat: Any) -> tuple[Tensor, Tensor | None]:
    return _compute(flat, True)


for key in ("CPU", "CUDA"):
    library.impl("depthwise_conv_bn_act", _depthwise_conv_bn_act, key)
    library.impl("depthwise_conv_bn_act_squeeze", _depthwise_conv_bn_act_squeeze, key)


def _fake(*flat: Any) -> Tensor:
    return convolution.fake_output(flat[0], flat[1], flat[8:11])


def _fake_squeeze(*flat: Any) -> tuple[Tensor, Tensor]:
    x = flat[0]
    return _fake(*flat), torch.empty(x.shape[:2], dtype=sums_dtype(x.dtype), device=x.device)


torch.library.register_fake("cvkernels::depthwise_conv_bn_act", _fake, lib=library)
torch.library.register_fake("cvkernels::depthwise_conv_bn_act_squeeze", _fake_squeeze, lib=library)


def _gradients(grads, named):
    grad, *of_sums = grads
    (x, weight, bias, bn), geometry, act, _ = _unflatten(tuple(named.get(n) for n in NAMES))
    if of_sums and of_sums[0] is not None:
        grad = (grad + of_sums[0][:, :, None, None]).to(x.dtype)
    return conv_bn_act_backward(
        grad, x, weight, bias, bn or BatchNormParams(), (*geometry, x.shape[1]), act, None, None,
        None, named.get("out"),
    )  # fmt: skip


for name in ("depthwise_conv_bn_act", "depthwise_conv_bn_act_squeeze"):
    convolution.register_autograd(library, name, NAMES, _gradients)
