"""conv_bn_act: the contract, the choice of a backend, and the call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import record
from cvkernels.backend import Backend, BackendError, Choice
from cvkernels.ops.common.autograd import autocast_dtype, needs_grad
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.conv_bn_act import cudnn, native, onednn, tuning
from cvkernels.ops.conv_bn_act.checks import problem_of
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference

IMPLEMENTATIONS = ("triton", "cudnn", "native", "onednn")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
        return _traced(tensors, geometry, act, out, backends.requested(backend, IMPLEMENTATIONS))
    autocast = autocast_dtype(x)
    problem = problem_of(
        x, weight, bias, bn, *geometry, act, residual, input_bn, input_gate, out, autocast
    )
    grad = needs_grad(tensors)
    if grad and out is not None:
        raise ValueError(
            "conv_bn_act: out= is not differentiable, and an argument requires a gradient; "
            "call it under torch.no_grad(), or leave out= away"
        )
    choice = select(problem, x, grad, backends.requested(backend, IMPLEMENTATIONS))
    if choice.backend == "reference":
        return run_reference(tensors, geometry, act, out, choice.reason)
    if autocast is not None:
        tensors = _cast(tensors, autocast, None if grad else cache)
    if grad:
        pairs = (problem.stride, problem.padding, problem.dilation, groups)
        return torch.ops.cvkernels.conv_bn_act(*flatten(tensors, pairs, act, choice.backend))
    return execute(problem, choice, tensors, out, cache)


def choose(
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
) -> Choice:
    """The backend that :func:`conv_bn_act` runs for these arguments, and why."""
    problem = problem_of(
        x, weight, bias, bn, stride, padding, dilation, groups, act, residual, input_bn, input_gate,
        out, autocast_dtype(x),
    )  # fmt: skip
    tensors = (x, weight, bias, bn, residual, input_bn, input_gate)
    return select(problem, x, needs_grad(tensors), backends.requested(backend, IMPLEMENTATIONS))


backends.answers("conv_bn_act", choose)


def select(problem: Problem, x: Tensor, grad: bool, requested: str) -> Choice:
    """The backend for a checked call: ``requested`` if it can run it, or by the rule of "auto"."""
    device = backends.device_type(x)
    if requested == "auto":
        return _automatic(problem, x, device, grad)
    reason = _why_not(problem, x, requested, device)
    if reason:
        raise BackendError(
            f"conv_bn_act: backend {requested!r} cannot run this call: {reason}; "
            f"use backend='auto' or 'reference'"
        )
    return Choice(requested, "requested")


def _automatic(problem: Problem, x: Tensor, device: str, grad: bool) -> Choice:
    if device == "cpu":
        if grad:
            return Choice(
                "reference", "a gradient is needed, and the fused convolutions on CPU have none"
            )
        if not _why_not(problem, x, "native", device):
            return Choice("native", "compiled for CPU")
        reason = _why_not(problem, x, "onednn", device)
        return Choice("reference", reason) if reason else Choice("onednn", "fused on CPU")
    reason = _why_not(problem, x, "triton", device)
    if reason:
        if device == "cuda" and not _why_not(problem, x, "cudnn", device):
            return Choice("cudnn", reason)
        return Choice("reference", reason)
    config = tuning.choose(problem, *backends.gpu(x))
    if config.backend == "cudnn" and not _why_not(problem, x, "cudnn", device):
        return Choice("cudnn", "cuDNN is preferred for this shape")
    return Choice("triton", "Triton is preferred for this shape")


def _why_not(problem: Problem, x: Tensor, name: str, device: str) -> str:
    """Why backend ``name`` cannot run the call on ``device``; empty where it can."""
    if name == "reference":
        return ""
    if name == "triton":
        if problem.dtype not in TRITON_DTYPES:
            return f"Triton computes in float16, bfloat16 and float32, got {problem.dtype}"
        return backends.lacks_triton(device)
    if name == "cudnn":
        return (
            cudnn.why_not(problem) if device == "cuda" else f"it needs CUDA tensors, got {device}"
        )
    if device != "cpu":
        return f"it needs CPU tensors, got {device}"
    if name == "native":
        return native.why_not(problem)
    reason = onednn.why_not(problem)
    if not reason and problem.C <= 4 and not math.isfinite(x.sum().item()):
        # oneDNN's relu turns NaN into 0: a bad image must not come out as plausible logits.
        return "the image holds NaN or infinity, which oneDNN's relu would hide"
    return reason


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


def _cast(tensors: tuple, dtype: torch.dtype, cache: DerivedWeights | None) -> tuple:
    """x, weight, residual and gate in autocast's dtype; the norms' vectors stay as they are."""
    x, weight, bias, bn, residual, input_bn, input_gate = tensors
    if cache is not None and weight.dtype != dtype:
        weight = cache.get(("cast", dtype), [weight], lambda: weight.detach().to(dtype))
    else:
        weight = weight.to(dtype)
    residual = None if residual is None else residual.to(dtype)
    input_gate = None if input_gate is None else input_gate.to(dtype)
    return x.to(dtype), weight, bias, bn, residual, input_bn, input_gate


def run_reference(
    tensors: tuple, geometry: tuple, act: str, out: Tensor | None, reason: str
) -> Tensor:
    """The reference on this call's arguments; its aten calls carry ``reason`` in ``explain``."""
    x, weight, bias, bn, residual, input_bn, input_gate = tensors
    stride, padding, dilation, groups = geometry

    def reference() -> Tensor:
        y = conv_bn_act_reference(
            x, weight, bias, bn, stride=stride, padding=padding, dilation=dilation, groups=groups,
            act=act, residual=residual, input_bn=input_bn, input_gate=input_gate,
        )  # fmt: skip
        return y if out is None else out.copy_(y)

    if (recorder := record.active()) is None:
        return reference()
    with recorder.fallback(reason):
        return reference()


def execute(
    problem: Problem,
    choice: Choice,
    tensors: tuple,
    out: Tensor | None = None,
    cache: DerivedWeights | None = None,
) -> Tensor:
    """Run a checked call on a fused backend, without autograd; reports it to ``explain``."""
    if (recorder := record.active()) is None:
        return _run(problem, choice.backend, tensors, out, cache)
    passes = _extra_passes(problem, choice.backend, tensors[0], tensors[4], out)
    with recorder.call(
        "conv_bn_act",
        choice.backend,
        choice.reason,
        1 + len(passes),
        problem.bytes_read + sum(passes),
        problem.bytes_written + sum(passes),
    ):
        return _run(problem, choice.backend, tensors, out, cache)


def _extra_passes(
    problem: Problem, name: str, x: Tensor, residual: Tensor | None, out: Tensor | None
) -> list[int]:
    """Bytes that each pass of a library backend around its one kernel reads and writes again."""
    if name == "triton":
        return []
    if name == "native":
        converted = [x] * native.converts(x)
        if residual is not None and not native.has_regular_pixels(residual):
            converted.append(residual)
        if out is not None and not native.has_regular_pixels(out):
            converted.append(out)
        return [t.numel() * t.element_size() for t in converted]
    strided = not x.is_contiguous(memory_format=torch.channels_last)
    passes = [x.numel() * x.element_size()] * strided + [problem.bytes_written] * (out is not None)
    if name == "onednn":
        passes += [problem.bytes_written] * onednn.extra_passes(problem)
    return passes


def _run(
    problem: Problem, name: str, tensors: tuple, out: Tensor | None, cache: DerivedWeights | None
) -> Tensor:
    x, weight, bias, bn, residual, input_bn, input_gate = tensors
    empty = problem.bytes_written == 0
    if name == "triton" or empty or x.is_meta:
        if out is None:
            out = new_output(problem, x)
        if empty or x.is_meta:
            return out
        # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
        from cvkernels.ops.conv_bn_act import triton_launch

        triton_launch.run(
            problem, x, _nhwc(weight, cache), bias, bn, residual, input_bn, input_gate, out,
            precision=_fp32_precision(),
        )  # fmt: skip
        return out
    if name == "cudnn":
        return cudnn.run(problem, x, weight, bias, bn, residual, cache)
    if name == "native":
        run = native.prepared(problem, weight, bias, bn, input_bn, cache)
        return run(x, residual, out, input_gate)
    return onednn.run(problem, x, weight, bias, bn, residual, out, cache)


def new_output(problem: Problem, x: Tensor) -> Tensor:
    return torch.empty(
        (problem.N, problem.K, problem.P, problem.Q),
        dtype=problem.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


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
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def flatten(tensors: tuple, geometry: tuple, act: str, name: str) -> tuple:
    """The arguments of the registered op ``cvkernels::conv_bn_act``."""
    x, weight, bias, bn, residual, input_bn, input_gate = tensors
    return (
        x, weight, bias, *(bn or BatchNormParams()), *geometry, act, residual,
        *(input_bn or BatchNormParams()), input_gate, name,
    )  # fmt: skip


def _traced(
    tensors: tuple, geometry: tuple, act: str, out: Tensor | None, requested: str
) -> Tensor:
    """The call under torch.compile: the registered op, or on CPU the reference for inductor."""
    x = tensors[0]
    if requested == "reference" or (requested == "auto" and x.device.type == "cpu"):
        return run_reference(tensors, geometry, act, out, "inductor fuses it")
    autocast = autocast_dtype(x)
    if autocast is not None:
        tensors = _cast(tensors, autocast, None)
    pairs = tuple([(v, v) if isinstance(v, int) else tuple(v) for v in geometry[:3]])
    flat = flatten(tensors, (*pairs, geometry[3]), act, requested)
    if out is None:
        return torch.ops.cvkernels.conv_bn_act(*flat)
    torch.ops.cvkernels.conv_bn_act_out(*flat, out)
    return out
