"""conv_bn_act: the contract, the table of implementations, plans, and the registered ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend, BackendError
from cvkernels.ops.common import convolution
from cvkernels.ops.common.autograd import autocast_dtype, to_dtype
from cvkernels.ops.common.convolution import TRITON_DTYPES
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference, refusal
from cvkernels.ops.common.layout import in_format, is_pixel_matrix
from cvkernels.ops.common.native import writes
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.plan import Plan, plan_of, planned_by
from cvkernels.ops.common.traffic import Traffic, nbytes
from cvkernels.ops.conv_bn_act import cudnn, native, onednn, tuning
from cvkernels.ops.conv_bn_act.problem import OP, Parameters, Problem, check_overlap, problem_of
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_backward, conv_bn_act_reference

ARGUMENTS = (
    f"Tensor x, Tensor weight, Tensor? bias, {convolution.BN}, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str act, Tensor? residual, "
    "Tensor? in_weight, Tensor? in_bias, Tensor? in_mean, Tensor? in_var, float in_eps, "
    "Tensor? gate, str backend"
)
NAMES = [argument.split()[1] for argument in ARGUMENTS.split(", ")]

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(f"conv_bn_act({ARGUMENTS}) -> Tensor")
library.define(f"conv_bn_act_out({ARGUMENTS}, Tensor(a!) out) -> ()")

# (x, residual=None, input_gate=None, out=None) -> the output, which is out where that is given
Run = Callable[..., Tensor]


def plan(
    x_like: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn: BatchNormParams | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    act: str = "relu",
    residual: Tensor | None = None,
    input_bn: BatchNormParams | None = None,
    input_gate: Tensor | None = None,
    out: Tensor | None = None,
    cache: DerivedWeights | None = None,
    backend: Backend = "auto",
    once: bool = False,
    implementation: Implementation | None = None,
) -> Plan:
    """A call of :func:`conv_bn_act`, as ``plan(x, residual=None, input_gate=None, out=None)``.

    ``x_like``, ``residual``, ``input_gate`` and ``out`` are examples; ``once`` says that the plan
    is called once. ``implementation``, one of ``TABLE`` that can run the call, is not chosen then.
    """
    tensors = (x_like, weight, bias, bn, residual, input_bn, input_gate)
    geometry = (stride, padding, dilation, groups)
    problem, call = _checked(tensors, geometry, act, out, backend, once)
    parameters = Parameters(weight, bias, bn, input_bn)
    like = (residual, input_gate, out)
    planned = _plan(problem, call, parameters, like, cache, implementation)
    return planned.expecting(
        call, parameters, x=x_like, residual=residual, input_gate=input_gate, out=out
    )


@planned_by(plan)
def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn: BatchNormParams | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    act: str = "relu",
    residual: Tensor | None = None,
    input_bn: BatchNormParams | None = None,
    input_gate: Tensor | None = None,
    out: Tensor | None = None,
    cache: DerivedWeights | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Convolution, inference batch norm, residual and activation as one pass over the output.

    ``out = act(bn(conv2d(u, weight) + bias) + residual)`` with
    ``u = relu(input_bn(x)) * input_gate[:, :, None, None]``, each part optional; zero padding is
    applied to ``u``. P and Q are conv2d's output height and width.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; any strides, channels_last and
            channel slices of a channels_last buffer are fast.
        weight: Tensor[K, C/groups, R, S], dtype and device of x; any strides.
        bias: Tensor[K], any floating dtype.
        bn: vectors Tensor[K] of any floating dtype; read live, at every call.
        stride, padding, dilation: in pixels, (height, width) or one number for both.
        groups: divides C and K.
        act: "none", "relu", "relu6" or "silu" (x * sigmoid(x)).
        residual: Tensor[N, K, P, Q], dtype of x, added before the activation.
        input_bn: vectors Tensor[C]; a ReLU follows it (DenseNet's norm1 and relu1).
        input_gate: Tensor[N, C] of multipliers, after their sigmoid (squeeze-and-excitation).
        out: Tensor[N, K, P, Q] to write into, with channel stride 1: a channels_last tensor, or a
            channel slice of one. Not differentiable.
        cache: keeps what a backend derives from the parameters (folded, prepacked, cast); one per
            convolution. Without it oneDNN and cuDNN fold and pack at every call.
        backend: see :mod:`cvkernels.backend`. "auto" on CUDA tensors runs Triton or cuDNN's fused
            convolution, whichever the table of measured shapes or the heuristic names (Triton
            missing: cuDNN, else the reference). On CPU tensors it runs the native convolution, in
            float32 without groups, a 3x3 of stride 1 by Winograd's minimal filtering where a model
            of its cost says so; else oneDNN's, which has no prologue, in float32 and in the half
            dtypes that the processor convolves natively. The reference runs when a gradient is
            needed, for float64, where oneDNN would hide a NaN or infinity in an image (C <= 4), and
            under torch.compile (inductor fuses it there).

    Returns:
        Tensor[N, K, P, Q], dtype of x (of autocast, where it is active), channels_last; the
        reference keeps the layout that PyTorch chooses. ``out`` itself where given, else never a
        view of an argument. Accumulation and the epilogue are in float32 (float64 for float64).
        Empty input gives empty output.

    Raises:
        ValueError: a shape, device, stride or option does not fit, or ``out`` overlaps an argument.
        TypeError: a dtype is not listed above, or dtypes differ; bn is not BatchNormParams.
        RuntimeError: x and weight do not fit; the error is a ValueError or TypeError as well.
        BackendError: the requested backend cannot run this call.

    Differentiable in every tensor but ``out`` and the running statistics, any number of times. No
    atomics: equal inputs give equal bits. oneDNN's relu and relu6 turn a NaN that arises inside a
    network into 0 (PyTorch keeps it); Winograd's filtering spreads a NaN or infinity to the outputs
    of its tile (2 x 4), next to those whose window holds it. Source: Ioffe and Szegedy 2015,
    arXiv:1502.03167; He et al. 2016, arXiv:1512.03385; Lavin and Gray 2015, arXiv:1509.09308; the
    prologues: Huang et al. 2017, arXiv:1608.06993, and Hu et al. 2018, arXiv:1709.01507.
    """
    tensors = (x, weight, bias, bn, residual, input_bn, input_gate)
    geometry = (stride, padding, dilation, groups)
    if torch.compiler.is_compiling():
        return _traced(tensors, geometry, act, out, backend)
    parameters, like = (weight, bias, bn, input_bn), (residual, input_gate, out)

    def make(once: bool = False) -> Plan:
        problem, call = _checked(tensors, geometry, act, out, backend, once)
        return _plan(problem, call, Parameters(*parameters), like, cache)

    planned = None
    if groups == 1 and x.dtype == torch.float32:
        planned = convolution.kept_plan(
            cache, backend, (x, *like), parameters, (geometry, act), make
        )
    if planned is None:
        planned = make(once=True)
    if out is not None:
        check_overlap(out, x, weight, residual)
    return planned.recorded(x, *like)


backends.answers(OP, plan)


def _checked(
    tensors: tuple,
    geometry: tuple[Any, Any, Any, int],
    act: str,
    out: Tensor | None,
    backend: Backend,
    once: bool,
) -> tuple[Problem, Call]:
    x, weight, bias, bn, residual, input_bn, input_gate = tensors
    autocast = autocast_dtype(x)
    problem = problem_of(
        x, weight, bias, bn, *geometry, act, residual, input_bn, input_gate, out, autocast
    )
    call = call_of(x, tensors, TABLE, backend, once, autocast)
    if call.grad and out is not None:
        raise ValueError(
            "conv_bn_act: out= is not differentiable, and an argument requires a gradient; "
            "call it under torch.no_grad(), or leave out= away"
        )
    return problem, call


def _why_not_cudnn(problem: Problem, call: Call) -> str:
    if call.device != "cuda":
        return f"it needs CUDA tensors, got {call.device}"
    reason = cudnn.why_not(problem)
    if reason or not call.automatic or _why_not_triton(problem, call):
        return reason
    config = tuning.choose(problem, *backends.gpu(call.x))
    return "" if config.backend == "cudnn" else "Triton is preferred for this shape"


def _why_cudnn(problem: Problem, call: Call) -> str:
    return _why_not_triton(problem, call) or "cuDNN is preferred for this shape"


def _why_not_triton(problem: Problem, call: Call) -> str:
    if problem.dtype not in TRITON_DTYPES:
        return f"Triton computes in float16, bfloat16 and float32, got {problem.dtype}"
    return backends.lacks_triton(call.device)


def _on_cpu(why_not: Callable[[Problem], str]) -> Callable[[Problem, Call], str]:
    def refuses(problem: Problem, call: Call) -> str:
        if call.device != "cpu":
            return f"it needs CPU tensors, got {call.device}"
        if call.grad and call.automatic:
            return "a gradient is needed, and the fused convolutions on CPU have none"
        return why_not(problem)

    return refuses


def _plan_triton(
    problem: Problem, call: Call, parameters: Parameters, like: tuple, cache: DerivedWeights | None
) -> Run:
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.conv_bn_act import triton

    weight, bias, bn, input_bn = parameters
    weight, (residual, gate, out) = _nhwc(weight, cache), like
    if out is None:
        out = new_output(problem, torch.device("meta"))
    launch = triton.plan_launch(
        problem, call.x, weight, residual, gate, out, precision=_fp32_precision()
    )

    def run(x, residual=None, input_gate=None, out=None):
        out = new_output(problem, x.device) if out is None else out
        launch(x, weight, bias, bn, residual, input_bn, input_gate, out)
        return out

    return run


def _plan_reference(
    problem: Problem, call: Call, parameters: Parameters, like: tuple, cache: DerivedWeights | None
) -> Run:
    weight, bias, bn, input_bn = parameters
    options: dict[str, Any] = {
        "stride": problem.stride, "padding": problem.padding, "dilation": problem.dilation,
        "groups": problem.groups, "act": problem.act, "input_bn": input_bn,
    }  # fmt: skip

    def run(x, residual=None, input_gate=None, out=None):
        y = conv_bn_act_reference(
            x, weight, bias, bn, residual=residual, input_gate=input_gate, **options
        )
        return y if out is None else out.copy_(y)

    return run


def new_output(problem: Problem, device: torch.device) -> Tensor:
    size = (problem.N, problem.K, problem.P, problem.Q)
    layout = torch.channels_last
    return torch.empty(size, dtype=problem.dtype, device=device, memory_format=layout)


def _fused(plan: Callable[..., Run]) -> Callable[..., Run]:
    return convolution.fused(plan, new_output)


def _native_by(name: str, tile: int) -> Implementation:
    """One algorithm of the native convolution, where there are several to choose from."""

    def refuses(problem: Problem, call: Call) -> str:
        reason, others = _on_cpu(native.why_not)(problem, call), native.tiles(problem)
        return reason or ("" if len(others) > 1 and tile in others else "there is no such choice")

    plan = _fused(functools.partial(native.plan, tile=tile))
    return Implementation(name, refuses, plan, device=None)


TABLE = Table(
    OP,
    Implementation("cudnn", _why_not_cudnn, _fused(cudnn.plan), _why_cudnn, "cuda"),
    Implementation(
        "triton", _why_not_triton, _fused(_plan_triton), "Triton is preferred for this shape",
        "cuda",
    ),
    Implementation(
        "native", _on_cpu(native.why_not), _fused(native.plan), "compiled for CPU", "cpu"
    ),
    _native_by("native direct", 0),
    _native_by("native F(2x2)", 2),
    _native_by("native F(2x4)", 4),
    Implementation("onednn", _on_cpu(onednn.why_not), _fused(onednn.plan), "fused on CPU", "cpu"),
    reference(_plan_reference),
)  # fmt: skip
IMPLEMENTATIONS = TABLE.names


def _plan(
    problem: Problem,
    call: Call,
    parameters: Parameters,
    like: tuple,
    cache: DerivedWeights | None = None,
    implementation: Implementation | None = None,
) -> Plan:
    """The plan of a checked call; ``like`` are examples of residual, input_gate and out."""
    weight, bias, bn, input_bn = parameters

    def traffic(name: str) -> Traffic:
        return _traffic(problem, name, call.x, *like)

    def registered(name: str) -> Run:
        geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)

        def run(x, residual=None, input_gate=None, out=None):
            tensors = (x, weight, bias, bn, residual, input_bn, input_gate)
            return _registered(tensors, geometry, problem.act, call.autocast, name)

        return run

    operands = (parameters, like, cache)
    planned = plan_of(TABLE, problem, call, operands, traffic, registered, implementation)
    if planned.backend != "onednn" or problem.C > 4:
        return planned
    run = _plan_reference(problem, call, *operands)
    stock = Plan(OP, "reference", BAD_IMAGE, run, traffic("reference"))
    return ImagePlan(planned, stock, call.automatic)


BAD_IMAGE = "the image holds NaN or infinity, which oneDNN's relu would hide"


class ImagePlan(Plan):
    """oneDNN's relu turns NaN into 0: a bad image must not come out as plausible logits."""

    __slots__ = ("_chosen",)

    def __init__(self, fused: Plan, stock: Plan, automatic: bool) -> None:
        def chosen(x: Tensor) -> Plan:
            if math.isfinite(x.sum().item()):
                return fused
            if automatic:
                return stock
            raise BackendError(refusal(OP, fused.backend, BAD_IMAGE))

        def run(x, *data):
            return chosen(x).run(x, *data)

        super().__init__(OP, fused.backend, fused.reason, run, fused._traffic)
        self._chosen = chosen

    def recorded(self, x: Tensor, *data: Tensor | None) -> Tensor:
        return self._chosen(x).recorded(x, *data)


def fuses_prologue(x: Tensor, groups: int = 1) -> bool:
    """Whether a call on x can take ``input_bn`` or ``input_gate`` along, and channel slices.

    If not, apply them first: the rest is fused. Only Triton and the native convolution have these
    prologues. With one, every other backend leaves the whole call to the reference, or refuses.
    """
    requested = backends.requested("auto", IMPLEMENTATIONS)
    if requested not in ("auto", "native"):
        return requested == "triton"
    device = backends.device_type(x)
    if device == "cpu" and not torch.compiler.is_compiling():
        return not native.lacks(autocast_dtype(x) or x.dtype, groups)
    # A compiled graph chooses when it runs; inductor on CUDA needs Triton too.
    return device != "cpu" and (torch.compiler.is_compiling() or not backends.lacks_triton(device))


def _traffic(
    problem: Problem,
    name: str,
    x: Tensor,
    residual: Tensor | None,
    input_gate: Tensor | None,
    out: Tensor | None,
) -> Traffic:
    """The one kernel's, and each pass around it, which reads and writes as many bytes."""
    passes: list[int] = []
    if name.startswith("native"):
        passes = [nbytes(x)] * native.converts(x)
        passes += [nbytes(t) for t in (residual, out) if t is not None and not is_pixel_matrix(t)]
    elif name in ("cudnn", "onednn"):
        passes = [nbytes(x)] * (not x.is_contiguous(memory_format=torch.channels_last))
        copies = onednn.extra_passes(problem) if name == "onednn" else 0
        passes += [problem.bytes_written] * (copies + (out is not None))
    around = sum(passes)
    return Traffic(1 + len(passes), problem.bytes_read + around, problem.bytes_written + around)


def _nhwc(weight: Tensor, cache: DerivedWeights | None) -> Tensor:
    """The weight with its input channels contiguous, where a cache makes that free."""
    if cache is None or weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    if weight.shape[2] * weight.shape[3] == 1:
        return weight
    return cache.get(
        "nhwc", [weight], lambda: weight.detach().contiguous(memory_format=torch.channels_last)
    )


def _fp32_precision() -> str:
    """ "tf32" or "ieee": what the user allows convolutions in float32 to do on CUDA."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def _traced(
    tensors: tuple, geometry: tuple, act: str, out: Tensor | None, backend: Backend
) -> Tensor:
    """The call under torch.compile: the registered op, or on CPU the reference for inductor."""
    x, weight, bias, bn, residual, input_bn, input_gate = tensors
    stride, padding, dilation, groups = geometry
    if (name := convolution.traced(TABLE, backend, x)) == "reference":
        y = conv_bn_act_reference(
            x, weight, bias, bn, stride=stride, padding=padding, dilation=dilation, groups=groups,
            act=act, residual=residual, input_bn=input_bn, input_gate=input_gate,
        )  # fmt: skip
        return y if out is None else out.copy_(y)
    pairs = convolution.pairs(OP, stride, padding, dilation)
    return _registered(tensors, (*pairs, groups), act, autocast_dtype(x), name, out)


def _registered(
    tensors: tuple,
    geometry: tuple,
    act: str,
    autocast: torch.dtype | None,
    name: str,
    out: Tensor | None = None,
) -> Tensor:
    x, weight, bias, bn, residual, input_bn, input_gate = tensors
    if autocast is not None:
        x, weight = x.to(autocast), weight.to(autocast)
        residual, input_gate = to_dtype(residual, autocast), to_dtype(input_gate, autocast)
    flat = (
        x, weight, bias, *(bn or BatchNormParams()), *geometry, act, residual,
        *(input_bn or BatchNormParams()), input_gate, name,
    )  # fmt: skip
    if out is None:
        return torch.ops.cvkernels.conv_bn_act(*flat)
    torch.ops.cvkernels.conv_bn_act_out(*flat, out)
    return out


def _unflatten(flat: tuple) -> tuple[tuple, tuple[Any, Any, Any, int], str, str]:
    """(tensors, geometry, act, backend) of a registered op's arguments."""
    x, weight, bias = flat[:3]
    norms = BatchNormParams(*flat[3:8]), BatchNormParams(*flat[14:19])
    bn, input_bn = (None if norm[:4] == (None,) * 4 else norm for norm in norms)
    stride, padding, dilation, groups, act, residual = flat[8:14]
    tensors = (x, weight, bias, bn, residual, input_bn, flat[19])
    return tensors, (tuple(stride), tuple(padding), tuple(dilation), groups), act, flat[20]


def _compute(flat: tuple, out: Tensor | None) -> Tensor:
    (x, weight, bias, bn, residual, input_bn, gate), geometry, act, backend = _unflatten(flat)
    problem = problem_of(x, weight, bias, bn, *geometry, act, residual, input_bn, gate, out)
    call = Call(x, backends.device_type(x), backend, once=True)
    parameters = Parameters(weight, bias, bn, input_bn)
    like = (residual, gate, out)
    return _plan(problem, call, parameters, like).recorded(x, *like)


def _conv_bn_act(*flat: Any) -> Tensor:
    return in_format(_compute(flat, None), torch.channels_last)


def _conv_bn_act_out(*flat_and_out: Any) -> None:
    _compute(flat_and_out[:-1], flat_and_out[-1])


for key in ("CPU", "CUDA"):
    library.impl("conv_bn_act", _conv_bn_act, key)
    library.impl("conv_bn_act_out", _conv_bn_act_out, key)


@torch.library.register_fake("cvkernels::conv_bn_act", lib=library)
def _(*flat):
    return convolution.fake_output(flat[0], flat[1], flat[8:11])


writes(library, "conv_bn_act_out")


def _gradients(grads, named):
    (x, weight, bias, bn, residual, input_bn, gate), geometry, act, _ = _unflatten(
        tuple(named.get(name) for name in NAMES)
    )
    return conv_bn_act_backward(
        grads[0], x, weight, bias, bn or BatchNormParams(), geometry, act, residual, input_bn, gate,
        named.get("out"),
    )  # fmt: skip


convolution.register_autograd(library, OP, NAMES, _gradients)
