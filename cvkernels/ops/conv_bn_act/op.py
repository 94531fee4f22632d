"""conv_bn_act: the contract, the table of implementations, plans, and the registered ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend, BackendError
from cvkernels.ops.common import convolution
from cvkernels.ops.common.activation import activate
from cvkernels.ops.common.arguments import check_not_differentiable, check_overlap
from cvkernels.ops.common.autograd import autocast_dtype, to_dtype
from cvkernels.ops.common.convolution import lacks_triton, new_output, norm_of
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference, refusal
from cvkernels.ops.common.layout import in_format, is_pixel_matrix
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.plan import Plan, plan_of, planned_by
from cvkernels.ops.common.registration import register
from cvkernels.ops.common.traffic import Traffic, nbytes
from cvkernels.ops.common.work import GPU, Work
from cvkernels.ops.conv_bn_act import cudnn, halo, native, onednn, tiles, tuning, work
from cvkernels.ops.conv_bn_act.problem import (
    OP,
    Arguments,
    Parameters,
    Problem,
    problem_of,
)
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_backward, conv_bn_act_reference
from cvkernels.ops.conv_bn_act.tiles import Config

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

# (x, residual=None, input_gate=None, out=None, output_gate=None) -> the output, which is out where
# that is given
Run = Callable[..., Tensor]


def plan(
    x_like: Tensor, weight: Tensor, bias: Tensor | None = None,
    bn: BatchNormParams | None = None, *,
    cache: DerivedWeights | None = None, backend: Backend = "auto", once: bool = False,
    implementation: Implementation | None = None, **options: Any,
) -> Plan:  # fmt: skip
    """A call of :func:`conv_bn_act`: ``plan(x, residual=None, input_gate=None, out=None,
    output_gate=None)``.

    ``x_like``, and of the options these four, are examples; ``once`` says that the plan is called
    once. ``implementation``, one of ``TABLE`` that can run the call, is not chosen then.
    """
    arguments = Arguments(x_like, weight, bias, bn, **options, autocast=autocast_dtype(x_like))
    problem, call = _checked(arguments, backend, once)
    planned = _plan(problem, call, arguments, cache, implementation)
    names = ("residual", "input_gate", "out", "output_gate")
    examples = dict(zip(names, arguments.like, strict=True))
    return planned.expecting(call, arguments.parameters, x=x_like, **examples)


@planned_by(plan)
def conv_bn_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, bn: BatchNormParams | None = None, *,
    stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1, groups: int = 1, act: str = "relu",
    residual: Tensor | None = None, input_bn: BatchNormParams | None = None,
    input_gate: Tensor | None = None, out: Tensor | None = None,
    projection: Tensor | None = None, projection_stride: int | tuple[int, int] = 1,
    output_gate: Tensor | None = None,
    cache: DerivedWeights | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Convolution, inference batch norm, residual and activation as one pass over the output.

    ``out = act(bn(conv2d(u, weight) + bias) * output_gate[:, :, None, None] + residual)`` with
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
        residual: Tensor[N, K, P, Q], dtype of x, added before the activation; with ``projection``
            Tensor[N, C', H', W'], any strides.
        projection, projection_stride: Tensor[K, C', 1, 1], dtype of x, any strides, and a stride:
            what is added is ``conv2d(residual, projection, stride=projection_stride)``, a ResNet
            stage's shortcut. Triton sums both convolutions at once where this one is 1x1 too and
            has no norm; elsewhere the projection is computed first.
        input_bn: vectors Tensor[C]; a ReLU follows it (DenseNet's norm1 and relu1).
        input_gate: Tensor[N, C] of multipliers, after their sigmoid (squeeze-and-excitation).
        output_gate: Tensor[N, K] of multipliers of the normed output, likewise.
        out: Tensor[N, K, P, Q] to write into, with channel stride 1: a channels_last tensor, or a
            channel slice of one. Not differentiable.
        cache: keeps what a backend derives from the parameters (folded, prepacked, cast); one per
            convolution. Without it oneDNN and cuDNN fold and pack at every call.
        backend: see :mod:`cvkernels.backend`. "auto" on CUDA tensors runs Triton or cuDNN's fused
            convolution, whichever the table of measured shapes or the heuristic names (Triton
            missing: cuDNN, else the reference); a 3x3 of few output channels in a 16-bit dtype runs
            in CUDA C++ ("halo"). On CPU tensors it runs the native convolution, in all dtypes but
            float64, without groups: in bfloat16 by AMX tiles or by pairs (AVX512-BF16)
            where the processor has them, else by floats, and a 3x3 of stride 1 by Winograd's
            minimal filtering where a model of its cost says so. oneDNN's, which has no prologue,
            runs the others, and float16 on processors with AMX. The reference runs when a gradient
            is needed, for float64, where oneDNN would hide a NaN or infinity in an image (C <= 4),
            and under torch.compile (inductor fuses it there).

    Returns:
        Tensor[N, K, P, Q], dtype of x (of autocast, where it is active), channels_last; the
        reference keeps the layout that PyTorch chooses. ``out`` itself where given, else never a
        view of an argument. Accumulation and the epilogue are in float32 (float64 for float64).
        Empty input gives empty output.

    Raises:
        ValueError: a shape, device, stride or option does not fit, ``out`` overlaps an argument
            (but for residual, which it may be) or itself, or a gradient is needed with it.
        TypeError: a dtype is not listed above, or dtypes differ; bn is not BatchNormParams; groups
            is no integer.
        RuntimeError: x and weight do not fit; the error is a ValueError or TypeError as well.
        BackendError: the requested backend cannot run this call.

    Differentiable in every tensor but ``out`` and the running statistics, any number of times. No
    atomics: equal inputs give equal bits. oneDNN's relu and relu6 turn a NaN that arises inside a
    network into 0 (PyTorch keeps it); Winograd's filtering spreads a NaN or infinity to the outputs
    of its tile (2 x 4), next to those whose window holds it. Source: Ioffe and Szegedy 2015,
    arXiv:1502.03167; He et al. 2016, arXiv:1512.03385; Lavin and Gray 2015, arXiv:1509.09308; the
    prologues: Huang et al. 2017, arXiv:1608.06993, and Hu et al. 2018, arXiv:1709.01507.
    """
    geometry = (stride, padding, dilation, groups)
    like = (residual, input_gate, out, output_gate)
    given = (x, weight, bias, bn, *geometry, act, residual, input_bn, input_gate, out)
    others = (projection, projection_stride, output_gate)
    if torch.compiler.is_compiling():
        return _traced(Arguments(*given, autocast_dtype(x), *others), backend)

    def make(once: bool = False) -> Plan:
        arguments = Arguments(*given, autocast_dtype(x), *others)
        return _plan(*_checked(arguments, backend, once), arguments, cache)

    planned = None
    if cache is not None and groups == 1 and projection is None and x.dtype in native.DTYPES:
        parameters = (weight, bias, bn, input_bn)
        planned = convolution.kept_plan(
            cache, backend, (x, *like), parameters, (geometry, act), make
        )
    if planned is None:
        planned = make(once=True)
    if out is not None:
        names = ("weight", "bias", "bn", "input_bn", "projection")
        held = dict(zip(names, (weight, bias, bn, input_bn, projection), strict=True))
        gates = {"input_gate": input_gate, "output_gate": output_gate}
        check_overlap(OP, out, {"x": x, "residual": residual, **held, **gates}, ("residual",))
    return planned.recorded(x, *like)


backends.answers(OP, plan)


def _checked(arguments: Arguments, backend: Backend, once: bool) -> tuple[Problem, Call]:
    problem, x = problem_of(*arguments), arguments.x
    gates = (arguments.input_gate, arguments.output_gate)
    tensors = (x, *arguments.parameters, arguments.residual, *gates)
    call = call_of(x, tensors, TABLE, backend, once, arguments.autocast)
    if arguments.out is not None:
        check_not_differentiable(OP, arguments.out, call.grad)
    return problem, call


def _why_not_halo(problem: Problem, call: Call) -> str:
    if call.device != "cuda":
        return f"it needs CUDA tensors, got {call.device}"
    reason = halo.why_not(problem, call.x)
    if reason or not call.automatic:
        return reason
    if not halo.packed(call.x):
        return "its copies need channels in multiples of 8 next to each other"
    config = tuning.choose(problem, *backends.gpu(call.x))
    return "" if config.backend == "halo" else "another backend is preferred for this shape"


def _why_not_cudnn(problem: Problem, call: Call) -> str:
    if call.device != "cuda":
        return f"it needs CUDA tensors, got {call.device}"
    reason = cudnn.why_not(problem)
    if reason or not call.automatic or lacks_triton(problem, call):
        return reason
    config = tuning.choose(problem, *backends.gpu(call.x))
    return "" if config.backend == "cudnn" else "Triton is preferred for this shape"


def _why_cudnn(problem: Problem, call: Call) -> str:
    return lacks_triton(problem, call) or "cuDNN is preferred for this shape"


def _on_cpu(why_not: Callable[[Problem], str]) -> Callable[[Problem, Call], str]:
    def refuses(problem: Problem, call: Call) -> str:
        if call.device != "cpu":
            return f"it needs CPU tensors, got {call.device}"
        if call.grad and call.automatic:
            return "a gradient is needed, and the fused convolutions on CPU have none"
        return why_not(problem)

    return refuses


def _plan_triton(
    problem: Problem, call: Call, parameters: Parameters, like: tuple,
    cache: DerivedWeights | None, config: Config | None = None,
) -> Run:  # fmt: skip
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.conv_bn_act import triton

    weight, bias, bn, input_bn, projection = parameters
    weight, (residual, gate, out, output_gate) = _nhwc(weight, cache), like
    if out is None:
        out = new_output(problem, torch.device("meta"))
    launch = triton.plan_launch(
        problem, call.x, weight, residual, gate, out, precision=_fp32_precision(), config=config,
        input_bn=input_bn, projection=projection, output_gate=output_gate,
    )  # fmt: skip

    def run(x, residual=None, input_gate=None, out=None, output_gate=None):
        out = new_output(problem, x.device) if out is None else out
        data = (residual, input_bn, input_gate, out, projection, output_gate)
        launch(x, weight, bias, bn, *data)
        return out

    return run


def _project(problem: Problem, residual: Tensor | None, projection: Tensor | None) -> Tensor | None:
    """The residual that is added."""
    if problem.projection is None or residual is None or projection is None:
        return residual
    return F.conv2d(residual, projection, stride=problem.projection.stride)


def _why_not_triton(problem: Problem, call: Call) -> str:
    if problem.projection is not None and tiles.kernel(problem) != "1x1":
        return "Triton projects the residual of 1x1 convolutions without padding and groups"
    if problem.projection is not None and problem.has_bn:
        return "Triton sums both convolutions, and a norm is of one; fold it into the weight"
    if problem.projection is not None and problem.has_output_gate:
        return "Triton sums both convolutions, and the output's gate is of one"
    return lacks_triton(problem, call)


def _plan_reference(problem: Problem, call: Call, parameters: Parameters, *_: Any) -> Run:
    weight, bias, bn, input_bn, projection = parameters
    options = (problem.stride, problem.padding, problem.dilation, problem.groups, problem.act)

    def run(x, residual=None, input_gate=None, out=None, output_gate=None):
        residual = _project(problem, residual, projection)
        data = (residual, input_bn, input_gate, output_gate)
        y = conv_bn_act_reference(x, weight, bias, bn, *options, *data)
        return y if out is None else out.copy_(y)

    return run


_fused = functools.partial(convolution.fused, allocate=new_output)


def triton_by(config: Config) -> Implementation:
    """Triton's convolution by this tile."""
    plan = _fused(functools.partial(_plan_triton, config=config))
    return Implementation(config.name, _why_not_triton, plan, device=None)


def halo_by(tile: halo.Tile) -> Implementation:
    """The halo kernel by this tile."""
    plan = _fused(functools.partial(halo.plan, tile=tile))
    return Implementation(
        tile.name, lambda problem, call: halo.why_not(problem, call.x), plan, device=None
    )


def _why_not_native(problem: Problem, call: Call) -> str:
    reason = _on_cpu(native.why_not)(problem, call)
    return reason or (native.left_to_onednn(problem.dtype) if call.automatic else "")


def _native_by(name: str, algorithm: int) -> Implementation:
    """One algorithm of the native convolution, where there are several to choose from."""

    def refuses(problem: Problem, call: Call) -> str:
        reason, others = _on_cpu(native.why_not)(problem, call), native.algorithms(problem)
        if reason or len(others) == 1 or algorithm not in others:
            return reason or "there is no such choice"
        return native.lacks_instructions(algorithm)

    plan = _fused(functools.partial(native.plan, algorithm=algorithm))
    return Implementation(name, refuses, plan, device=None)


TABLE = Table(
    OP,
    Implementation(
        "halo", _why_not_halo, _fused(halo.plan), "few output channels, weights resident", "cuda"
    ),
    Implementation("cudnn", _why_not_cudnn, _fused(cudnn.plan), _why_cudnn, "cuda"),
    Implementation(
        "triton",
        _why_not_triton,
        _fused(_plan_triton),
        "Triton is preferred for this shape",
        "cuda",
    ),
    Implementation("native", _why_not_native, _fused(native.plan), "compiled for CPU", "cpu"),
    _native_by("native direct", native.DIRECT),
    _native_by("native pairs", native.PAIRS),
    _native_by("native tiles", native.TILES),
    *(_native_by(f"native F(2x{width})", width) for width in native.WINOGRAD),
    Implementation("onednn", _on_cpu(onednn.why_not), _fused(onednn.plan), "fused on CPU", "cpu"),
    reference(_plan_reference),
)
IMPLEMENTATIONS = TABLE.names


def _plan(
    problem: Problem, call: Call, arguments: Arguments, cache: DerivedWeights | None = None,
    implementation: Implementation | None = None,
) -> Plan:  # fmt: skip
    """The plan of a checked call."""

    def traffic(name: str) -> Traffic:
        return _traffic(problem, name, arguments)

    def registered(name: str) -> Run:
        geometry = (problem.stride, problem.padding, problem.dilation)

        def run(x, residual=None, input_gate=None, out=None, output_gate=None):
            residual = _project(problem, residual, arguments.projection)
            data = {"x": x, "residual": residual, "input_gate": input_gate, "out": None}
            a = arguments._replace(**data, output_gate=output_gate)
            return _registered(a, geometry, name)

        return run

    def describe(name: str, gpu: GPU) -> tuple[Work, ...]:
        by_triton = name.startswith("triton")
        tile = tuning.named(problem, name, gpu.name, gpu.capability) if by_triton else None
        return work.of(problem, name, tile, gpu)

    operands = (arguments.parameters, arguments.like, cache)
    planned = plan_of(TABLE, problem, call, operands, traffic, registered, implementation, describe)
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


def supports_prologue_and_slices(x: Tensor, groups: int = 1) -> bool:
    """Whether a call on x can take ``input_bn`` or ``input_gate`` along, and channel slices.

    If not, apply them first: the rest is fused. Only Triton and the native convolution have these
    prologues. With one, every other backend leaves the whole call to the reference, or refuses.
    """
    requested = backends.requested("auto", IMPLEMENTATIONS)
    if requested not in ("auto", "native"):
        return requested == "triton"
    device = backends.device_type(x)
    if device == "cpu" and not torch.compiler.is_compiling():
        dtype = autocast_dtype(x) or x.dtype
        automatic = requested == "auto"
        return not native.lacks(dtype, groups) and not (automatic and native.left_to_onednn(dtype))
    # A compiled graph chooses when it runs; inductor on CUDA needs Triton too.
    return device != "cpu" and (torch.compiler.is_compiling() or not backends.lacks_triton(device))


def _traffic(problem: Problem, name: str, arguments: Arguments) -> Traffic:
    """The one kernel's, and each pass around it, which reads and writes as many bytes."""
    x, residual, out = arguments.x, arguments.residual, arguments.out
    passes: list[int] = []
    if name.startswith("native"):
        passes = [nbytes(x)] * native.converts(x)
        passes += [nbytes(t) for t in (residual, out) if t is not None and not is_pixel_matrix(t)]
    elif name.startswith("halo"):
        passes = [nbytes(t) for t in (x, out) if t is not None and not halo.packed(t)]
    elif name in ("cudnn", "onednn"):
        passes = [nbytes(x)] * (not x.is_contiguous(memory_format=torch.channels_last))
        copies = onednn.extra_passes(problem) if name == "onednn" else 0
        passes += [problem.bytes_written] * (copies + (out is not None))
    elif name.startswith("triton"):
        splits = tuning.named(problem, name, *backends.gpu(x)).split_k
        # the sums of a split reduction, which the second launch adds
        sums = 4 * problem.N * problem.K * problem.P * problem.Q
        passes += [sums * splits] * (splits > 1)
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


def _traced(arguments: Arguments, backend: Backend) -> Tensor:
    """The call under torch.compile: the registered op, or on CPU the reference for inductor."""
    a = arguments
    if a.projection is not None and a.residual is not None:
        residual = F.conv2d(a.residual, a.projection, stride=a.projection_stride)
        a = a._replace(residual=residual, projection=None)
    if (name := convolution.traced(TABLE, backend, a.x)) == "reference":
        y = conv_bn_act_reference(*a[:12], output_gate=a.output_gate)
        return y if a.out is None else a.out.copy_(y)
    return _registered(a, convolution.pairs(OP, a.stride, a.padding, a.dilation), name)


def _registered(a: Arguments, geometry: tuple[tuple[int, int], ...], name: str) -> Tensor:
    """The call of the registered op, whose operands have autocast's dtype; its norms lie flat.

    It has no gate of its output: that, and what follows it, are steps of their own then.
    """
    if a.output_gate is not None:
        y = _registered(
            a._replace(act="none", residual=None, out=None, output_gate=None), geometry, name
        )
        y = y * a.output_gate[:, :, None, None].to(y.dtype)
        y = y if a.residual is None else y + a.residual.to(y.dtype)
        y = activate(y, a.act)
        return y if a.out is None else a.out.copy_(y)
    x, weight, residual, gate, out = a.x, a.weight, a.residual, a.input_gate, a.out
    if a.autocast is not None:
        x, weight = x.to(a.autocast), weight.to(a.autocast)
        residual, gate = to_dtype(residual, a.autocast), to_dtype(gate, a.autocast)
    norm, input_norm = (a.bn or BatchNormParams()), (a.input_bn or BatchNormParams())
    options = (*geometry, a.groups, a.act)
    flat = (x, weight, a.bias, *norm, *options, residual, *input_norm, gate, name)
    if out is None:
        return torch.ops.cvkernels.conv_bn_act(*flat)
    torch.ops.cvkernels.conv_bn_act_out(*flat, out)
    return out


def _arguments_of(flat: Sequence[Any], out: Tensor | None = None) -> Arguments:
    """Those of a call of the registered op."""
    norm, input_norm = norm_of(flat[3:8]), norm_of(flat[14:19])
    given = (*flat[:3], norm, *flat[8:14], input_norm, flat[19], out)
    return Arguments(*given)


def _compute(flat: tuple, out: Tensor | None) -> Tensor:
    arguments, backend = _arguments_of(flat, out), flat[20]
    x = arguments.x
    call = Call(x, backends.device_type(x), backend, once=True)
    return _plan(problem_of(*arguments), call, arguments).recorded(x, *arguments.like)


def _conv_bn_act(*flat: Any) -> Tensor:
    return in_format(_compute(flat, None), torch.channels_last)


def _conv_bn_act_out(*flat_and_out: Any) -> None:
    _compute(flat_and_out[:-1], flat_and_out[-1])


def _gradients(grads, named):
    arguments = _arguments_of([named.get(name) for name in NAMES])
    return conv_bn_act_backward(grads[0], arguments, named.get("out"))


convolution.register(library, OP, NAMES, _conv_bn_act, convolution.fake_output, _gradients)
register(library, "conv_bn_act_out", _conv_bn_act_out)
