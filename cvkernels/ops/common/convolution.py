"""What the convolutions share: their geometry, how they are planned, and their gradient's frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common import registration
from cvkernels.ops.common.arguments import check_bn, check_device, check_size, check_vector, pair
from cvkernels.ops.common.autograd import to_dtype
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.dispatch import Call, Table
from cvkernels.ops.common.errors import InputTypeError, InputValueError
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.plan import Plan, PlanTable

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TRITON_DTYPES = DTYPES[:3]
# A norm's place in the schema of a registered op.
BN = "Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, float bn_eps"
_grad_enabled = torch.is_grad_enabled
GEOMETRY = ("stride", "padding", "dilation")
Pair = int | tuple[int, int]


def pairs(op: str, stride: Pair, padding: Pair, dilation: Pair) -> tuple[tuple[int, int], ...]:
    return pair(op, "stride", stride), pair(op, "padding", padding), pair(op, "dilation", dilation)


def output_size(
    size: Sequence[int], taps: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:  # fmt: skip
    """P and Q."""
    P, Q = (
        (n + 2 * p - d * (r - 1) - 1) // s + 1
        for n, r, s, p, d in zip(size, taps, stride, padding, dilation, strict=True)
    )
    return P, Q


def check_options(
    op: str, x: torch.Size, dtype: torch.dtype, geometry: Sequence[Sequence[int]]
) -> None:
    """What is asked of x and of the options before the sizes of a problem are known."""
    if len(x) != 4:
        way_out = "; add the batch dimension with x.unsqueeze(0)" if len(x) == 3 else ""
        raise InputValueError(f"{op}: x must have shape [N, C, H, W], got {list(x)}{way_out}")
    if dtype not in DTYPES:
        raise InputTypeError(
            f"{op}: dtype must be float32, float16, bfloat16 or float64, got {dtype}; "
            f"convert x and weight with .to(torch.float32)"
        )
    for name, values, least in zip(GEOMETRY, geometry, (1, 0, 1), strict=True):
        if min(values) < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {list(values)}")


def check_fits(op: str, problem: Any) -> None:
    if problem.P < 1 or problem.Q < 1:
        raise InputValueError(
            f"{op}: the {problem.R}x{problem.S} kernel with dilation {list(problem.dilation)} does "
            f"not fit into the map of {problem.H}x{problem.W} with padding "
            f"{list(problem.padding)}; the input is too small"
        )
    elements = problem.N * problem.K * problem.P * problem.Q
    check_size(op, "the output", elements, problem.dtype)


def check_parameters(
    op: str, problem: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
    bn: BatchNormParams | None, autocast: torch.dtype | None,
) -> None:  # fmt: skip
    """The dtype and device of weight, and the vectors of bias and norm."""
    if autocast is None and weight.dtype != x.dtype:
        raise InputTypeError(
            f"{op}: weight must have x's dtype {x.dtype}, got {weight.dtype}; "
            f"convert one with .to(), or run under torch.autocast"
        )
    check_device(op, "weight", weight, x)
    if bias is not None:
        check_vector(op, "bias", bias, problem.K, x)
    if bn is not None:
        check_bn(op, "bn", bn, problem.K, x)


def lacks_triton(problem: Any, call: Call) -> str:
    """Why no Triton kernel convolves in this dtype on this device."""
    if problem.dtype not in TRITON_DTYPES:
        return f"Triton computes in float16, bfloat16 and float32, got {problem.dtype}"
    return backends.lacks_triton(call.device)


def dilation_of(op: str, kernel: Sequence[int], dilation: Pair) -> tuple[int, int]:
    """1 along a side of the kernel that has one tap. With another, which means the same, oneDNN may
    read past a bfloat16 map (torch 2.14)."""
    steps = pair(op, "dilation", dilation)
    down, along = (1 if taps == 1 else step for taps, step in zip(kernel, steps, strict=True))
    return down, along


def norm_of(flat: Sequence[Any]) -> BatchNormParams | None:
    """The norm of its five arguments of a registered op; None where it has no vector."""
    return None if tuple(flat[:4]) == (None,) * 4 else BatchNormParams(*flat)


def new_output(problem: Any, device: torch.device) -> Tensor:
    size = (problem.N, problem.K, problem.P, problem.Q)
    layout = torch.channels_last
    return torch.empty(size, dtype=problem.dtype, device=device, memory_format=layout)


def fake_output(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """What a registered op on these returns: channels_last. After the norm comes the geometry."""
    size = output_size(x.shape[2:], weight.shape[2:], *options[5:8])
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def traced(table: Table, backend: str, x: Tensor) -> str:
    """The backend of a call on x under torch.compile: on CPU, inductor fuses the reference."""
    requested = backends.requested(backend, table.names, table.op)
    return "reference" if requested == "auto" and x.device.type == "cpu" else requested


def kept_plan(
    cache: DerivedWeights | None, backend: str, data: tuple, parameters: tuple, options: tuple,
    make: Callable[[], Plan],
) -> Plan | None:  # fmt: skip
    """The cache's plan of a call of this kind, made where there is none or its weights changed.

    ``options`` are the geometry, act and what else is planned by.
    None where none is kept: on CUDA, where a gradient could be needed, and under autocast.
    """
    x, (weight, bias, *norms) = data[0], parameters
    if cache is None or _grad_enabled() or not x.is_cpu or weight.is_inference():
        return None
    if not _exact(options[0]) or type(options[1]) is not str:  # 2.0 would be taken for 2
        return None
    if torch.is_autocast_enabled("cpu") or backend not in ("auto", "native"):
        return None
    sources = [weight, bias]
    eps: list[float | None] = []
    for norm in norms:
        if type(norm) is BatchNormParams:
            sources += norm[:4]
            eps.append(norm.eps)
        elif norm is None:
            eps.append(None)
        else:
            return None
    if (key := PlanTable.key(backend, data, *options, *eps)) is None:
        return None
    planned = cache.plan(key, sources, make)
    # What chooses the others depends on more.
    return planned if planned.backend == "native" else None


def _exact(values: tuple) -> bool:
    """Whether these are ints, and tuples of ints."""
    kinds = [type(part) for v in values for part in (v if type(v) is tuple else (v,))]
    return kinds.count(int) == len(kinds)


def fused(
    plan: Callable[..., Callable], allocate: Callable[[Any, torch.device], Any]
) -> Callable[..., Callable]:
    """What plans a fused implementation: ``plan`` after the casts of autocast, which leave the
    norms' vectors as they are; ``allocate`` alone where there is nothing to compute.
    """

    def build(
        problem: Any, call: Call, parameters: Any, like: tuple, cache: DerivedWeights | None
    ) -> Callable:
        if problem.bytes_written == 0 or call.computes_nothing:
            return lambda x, residual=None, input_gate=None, out=None, output_gate=None: (
                allocate(problem, x.device) if out is None else out
            )
        if (dtype := call.autocast) is None:
            return plan(problem, call, parameters, like, cache)
        weight = source = parameters.weight
        if cache is not None and weight.dtype != dtype:
            weight = cache.get(("cast", dtype), [source], lambda: source.detach().to(dtype))
        parameters = parameters._replace(weight=weight.to(dtype))
        like = tuple([to_dtype(t, dtype) for t in like])
        call = call._replace(x=call.x.to(dtype), autocast=None)
        convolve = plan(problem, call, parameters, like, cache)
        return lambda x, *data: convolve(x.to(dtype), *[to_dtype(t, dtype) for t in data])

    return build


def register(
    library: torch.library.Library, op: str, names: Sequence[str], function: Callable[..., Any],
    fake: Callable[..., Any],
    gradients: Callable[[Sequence[Tensor], dict[str, Any]], dict[str, Tensor | None]],
) -> None:  # fmt: skip
    """The op of the arguments ``names``; ``gradients`` are from these, and for a ReLU "out"."""

    def setup_context(ctx, inputs, output):
        named = dict(zip(names, inputs, strict=True))
        ctx.named = {k: v for k, v in named.items() if not isinstance(v, Tensor)}
        kept = {k: v for k, v in named.items() if isinstance(v, Tensor)}
        if named["act"] != "silu":
            kept.pop("residual", None)
        if named["act"] in ("relu", "relu6"):
            kept["out"] = output if isinstance(output, Tensor) else output[0]
        ctx.kept = list(kept)
        ctx.save_for_backward(*kept.values())
        # PyTorch's wrapper appends an argument of its own.
        ctx.needs = dict(zip(names, ctx.needs_input_grad, strict=False))

    def backward(ctx, *grads):
        named = {**ctx.named, **dict(zip(ctx.kept, ctx.saved_tensors, strict=True))}
        found = gradients(grads, named)
        return tuple(found.get(name) if ctx.needs[name] else None for name in names)

    registration.register(library, op, function, fake, backward, setup_context)
