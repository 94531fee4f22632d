"""depthwise_conv_bn_act: the contract, the choice of a backend, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import record
from cvkernels.backend import Backend, BackendError, Choice
from cvkernels.ops.common.arguments import pair
from cvkernels.ops.common.autograd import autocast_dtype, needs_grad
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.depthwise_conv_bn_act import native
from cvkernels.ops.depthwise_conv_bn_act.problem import OP, DepthwiseProblem, problem_of
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from cvkernels.ops.depthwise_conv_bn_act.tiling import tiling

IMPLEMENTATIONS = ("triton", "native")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNELS = ((3, 3), (5, 5))


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
    tensors = (x, weight, bias, bn)
    geometry = (stride, padding, dilation)
    requested = backends.requested(backend, IMPLEMENTATIONS)
    if torch.compiler.is_compiling():
        return _traced(tensors, geometry, act, squeeze, requested)
    autocast = autocast_dtype(x)
    problem = problem_of(*tensors, *geometry, act, squeeze, autocast)
    grad = needs_grad(tensors)
    choice = select(problem, x, grad, requested)
    if choice.backend == "reference":
        return run_reference(tensors, geometry, act, squeeze, choice.reason)
    if autocast is not None:
        tensors = _cast(tensors, autocast, None if grad else cache)
    if grad:
        pairs = (problem.stride, problem.padding, problem.dilation)
        return _registered(squeeze)(*flatten(tensors, pairs, act, choice.backend))
    out, sums = execute(problem, choice, tensors, cache)
    return (out, sums) if squeeze else out


def choose(
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
) -> Choice:
    """The backend that :func:`depthwise_conv_bn_act` runs for these arguments, and why."""
    tensors = (x, weight, bias, bn)
    problem = problem_of(*tensors, stride, padding, dilation, act, squeeze, autocast_dtype(x))
    return select(problem, x, needs_grad(tensors), backends.requested(backend, IMPLEMENTATIONS))


backends.answers("depthwise_conv_bn_act", choose)


def select(problem: DepthwiseProblem, x: Tensor, grad: bool, requested: str) -> Choice:
    """The backend for a checked call: ``requested`` if it can run it, or by the rule of "auto"."""
    device = backends.device_type(x)
    if requested == "auto":
        if device == "cpu" and grad:
            return Choice(
                "reference", "a gradient is needed, and the native op keeps nothing for one"
            )
        name = "native" if device == "cpu" else "triton"
        reason = _why_not(problem, name, device)
        return Choice("reference", reason) if reason else Choice(name, f"fused on {device}")
    reason = _why_not(problem, requested, device)
    if reason:
        raise BackendError(
            f"{OP}: backend {requested!r} cannot run this call: {reason}; "
            f"use backend='auto' or 'reference'"
        )
    return Choice(requested, "requested")


def _why_not(problem: DepthwiseProblem, name: str, device: str) -> str:
    """Why backend ``name`` cannot run the call on ``device``; empty where it can."""
    if name == "reference":
        return ""
    if name == "native":
        return native.why_not(problem, device)
    if name != "triton":
        return f"{OP} has no {name} implementation"
    if problem.dtype not in TRITON_DTYPES:
        return f"Triton computes in float16, bfloat16 and float32, got {problem.dtype}"
    if (problem.R, problem.S) not in KERNELS:
        return f"the Triton kernel is 3x3 or 5x5, got {problem.R}x{problem.S}"
    return backends.lacks_triton(device)


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
            and native.extension.has("cpu")
        )
    return dtype in TRITON_DTYPES and not backends.lacks_triton(device)


def run_reference(
    tensors: tuple, geometry: tuple, act: str, squeeze: bool, reason: str
) -> Tensor | tuple[Tensor, Tensor]:
    """The reference on this call's arguments; its aten calls carry ``reason`` in ``explain``."""
    stride, padding, dilation = geometry
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    if (recorder := record.active()) is None:
        return depthwise_conv_bn_act_reference(*tensors, **options, act=act, squeeze=squeeze)
    with recorder.fallback(reason):
        return depthwise_conv_bn_act_reference(*tensors, **options, act=act, squeeze=squeeze)


def execute(
    problem: DepthwiseProblem, choice: Choice, tensors: tuple, cache: DerivedWeights | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run a checked call on a fused backend, without autograd; reports it to ``explain``."""
    if (recorder := record.active()) is None:
        return _run(problem, choice.backend, tensors, cache)
    parts = _bytes_of_parts(problem, choice.backend, tensors[0])
    with recorder.call(
        OP,
        choice.backend,
        choice.reason,
        1 + (parts > 0),
        problem.bytes_read + parts,
        problem.bytes_written + parts,
    ):
        return _run(problem, choice.backend, tensors, cache)


def _bytes_of_parts(problem: DepthwiseProblem, name: str, x: Tensor) -> int:
    """What the second kernel, which adds the bands of Triton's sums, reads; 0 without one."""
    if name != "triton" or not problem.squeeze or problem.N * problem.C == 0:
        return 0
    bands = tiling(problem, backends.gpu(x)[1]).bands
    return 4 * problem.N * problem.C * bands if bands > 1 else 0


def _run(
    problem: DepthwiseProblem, name: str, tensors: tuple, cache: DerivedWeights | None
) -> tuple[Tensor, Tensor | None]:
    x, weight, bias, bn = tensors
    out = torch.empty(
        (problem.N, problem.C, problem.P, problem.Q),
        dtype=problem.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    sums = None
    if problem.squeeze:
        sums = torch.empty(x.shape[:2], dtype=problem.sums_dtype, device=x.device)
    if out.numel() == 0 or x.is_meta:
        return out, sums
    if name == "native":
        native.run(problem, x, weight, bias, bn, out, sums, cache)
        return out, sums
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.depthwise_conv_bn_act import triton_launch

    triton_launch.run(problem, x, _rsc(weight, cache), bias, bn, out, sums)
    return out, sums


def _rsc(weight: Tensor, cache: DerivedWeights | None) -> Tensor:
    """The weight as [R, S, C], its channels contiguous where a cache makes that free."""
    if cache is None:
        return weight.squeeze(1).permute(1, 2, 0)
    return cache.get(
        "rsc", [weight], lambda: weight.detach().squeeze(1).permute(1, 2, 0).contiguous()
    )


def _cast(tensors: tuple, dtype: torch.dtype, cache: DerivedWeights | None) -> tuple:
    """x and weight in autocast's dtype; the norm's vectors stay as they are."""
    x, weight, bias, bn = tensors
    if cache is not None and weight.dtype != dtype:
        weight = cache.get(("cast", dtype), [weight], lambda: weight.detach().to(dtype))
    return x.to(dtype), weight.to(dtype), bias, bn


def flatten(tensors: tuple, geometry: tuple, act: str, name: str) -> tuple:
    """The arguments of the registered ops."""
    x, weight, bias, bn = tensors
    return (x, weight, bias, *(bn or BatchNormParams()), *geometry, act, name)


def _registered(squeeze: bool):
    ops = torch.ops.cvkernels
    return ops.depthwise_conv_bn_act_squeeze if squeeze else ops.depthwise_conv_bn_act


def _traced(
    tensors: tuple, geometry: tuple, act: str, squeeze: bool, requested: str
) -> Tensor | tuple[Tensor, Tensor]:
    """The call under torch.compile: the registered op, or on CPU the reference for inductor."""
    x = tensors[0]
    if requested == "reference" or (requested == "auto" and x.device.type == "cpu"):
        return run_reference(tensors, geometry, act, squeeze, "inductor fuses it")
    autocast = autocast_dtype(x)
    if autocast is not None:
        tensors = _cast(tensors, autocast, None)
    names = ("stride", "padding", "dilation")
    pairs = tuple([pair(OP, name, value) for name, value in zip(names, geometry, strict=True)])
    return _registered(squeeze)(*flatten(tensors, pairs, act, requested))
