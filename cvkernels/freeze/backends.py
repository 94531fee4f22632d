"""Which implementation runs a convolution of a frozen model: the one place that decides.

Each is a :class:`Backend`; the first of the list that can run a convolution does, unless a table of
measured choices (:func:`cvkernels.tune`) names another.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cvkernels.backend import lacks_triton
from cvkernels.functional import conv_bn_act
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.conv_bn_act import native, onednn
from cvkernels.ops.conv_bn_act.problem import Problem

if TYPE_CHECKING:
    from cvkernels.freeze.ops.convolution import Conv

# convolve(x, residual, gate, out): the result, in out where that is not None
Convolve = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


class Backend(NamedTuple):
    """One implementation of conv_bn_act.

    ``why_not(problem, device)`` is the reason why it cannot run a convolution, or empty;
    ``automatic`` says whether it is chosen without a table. ``writes``: it writes channel slices of
    a buffer itself; others are copied there. ``prologue``: it takes ``input_affine`` and the gates
    along, which are steps of their own before others.
    """

    name: str
    why_not: Callable[[Problem, torch.device], str]
    automatic: bool
    build: Callable[[Problem, Conv, DerivedWeights], Convolve]
    writes: bool
    prologue: bool


def _native_why_not(problem: Problem, device: torch.device) -> str:
    return native.why_not(problem) if device.type == "cpu" else "it needs CPU tensors"


def _native(
    problem: Problem, conv: Conv, cache: DerivedWeights, tile: int | None = None
) -> Convolve:
    weights = (conv.weight, conv.bias, conv.bn, conv.input_bn)
    convolve = native.prepared(problem, *weights, cache, tile)

    def run(x: Tensor, residual: Tensor | None, gate: Tensor | None, out: Tensor | None) -> Tensor:
        return convolve(x, residual, out, gate)

    return run


def _winograd_why_not(tile: int) -> Callable[[Problem, torch.device], str]:
    def why_not(problem: Problem, device: torch.device) -> str:
        reason = _native_why_not(problem, device)
        tiles = native.tiles(problem)
        return reason or ("" if tile in tiles and len(tiles) > 1 else "there is no such choice")

    return why_not


def _onednn_why_not(problem: Problem, device: torch.device) -> str:
    return onednn.why_not(problem) if device.type == "cpu" else "oneDNN needs CPU tensors"


def _onednn(problem: Problem, conv: Conv, cache: DerivedWeights) -> Convolve:
    convolve = onednn.prepared(problem, conv.weight, conv.bias, conv.bn, cache)

    def run(x: Tensor, residual: Tensor | None, gate: None, out: Tensor | None) -> Tensor:
        y = convolve(x, residual)
        return y if out is None else out.copy_(y)

    return run


def _ops(problem: Problem, conv: Conv, cache: DerivedWeights) -> Convolve:
    call = functools.partial(
        conv_bn_act, weight=conv.weight, bias=conv.bias, bn=conv.bn, stride=problem.stride,
        padding=problem.padding, dilation=problem.dilation, groups=problem.groups, act=problem.act,
        input_bn=conv.input_bn, cache=cache,
    )  # fmt: skip

    def run(x: Tensor, residual: Tensor | None, gate: Tensor | None, out: Tensor | None) -> Tensor:
        return call(x, residual=residual, input_gate=gate, out=out)

    return run


BACKENDS = (
    # First the default algorithm; the rest are chosen only by a table.
    Backend("native", _native_why_not, True, _native, writes=True, prologue=True),
    *(
        Backend(
            f"native F(2x{tile})" if tile else "native direct",
            _winograd_why_not(tile),
            False,
            functools.partial(_native, tile=tile),
            writes=True,
            prologue=True,
        )
        for tile in (0, 2, 4)
    ),
    Backend("onednn", _onednn_why_not, True, _onednn, writes=False, prologue=False),
    # The public op, by its own rule: Triton or cuDNN on CUDA, the reference for what nothing above
    # runs.
    Backend("conv_bn_act", lambda problem, device: "", True, _ops, writes=True, prologue=True),
)


def writes_slices(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the convolutions that are chosen without a table read and write channel slices."""
    if device.type == "cpu":
        return not native.lacks(dtype, groups=1)
    return dtype != torch.float64 and not lacks_triton(device.type)


def without_prologue(problem: Problem) -> Problem:
    """The convolution alone, for a backend before which its prologue is a step of its own."""
    return replace(problem, has_input_bn=False, has_input_gate=False)


def possible(problem: Problem, device: torch.device) -> list[Backend]:
    """The backends that can run the convolution, with its prologue or, if they have none, after."""
    bare = without_prologue(problem)
    backends = [b for b in BACKENDS if not b.why_not(problem if b.prologue else bare, device)]
    last = backends[-1]
    if device.type == "cuda" and lacks_triton("cuda"):
        return [last._replace(prologue=False)]
    # The reference is for what nothing else computes.
    return backends[:-1] or [last]


def choose(problem: Problem, device: torch.device, table: Mapping[str, str]) -> Backend:
    """The backend for a convolution: the table's, or the first that is automatic."""
    backends = possible(problem, device)
    named = table.get(key(problem))
    for backend in backends:
        if backend.name == named:
            return backend
    return next(b for b in backends if b.automatic)


def key(problem: Problem) -> str:
    """What a table of measured choices knows a convolution by."""
    p = problem
    parts = [f"{p.N}x{p.C}x{p.H}x{p.W}", f"{p.K}x{p.R}x{p.S}", str(p.dtype).removeprefix("torch.")]
    parts += [f"s{p.stride[0]},{p.stride[1]}", f"p{p.padding[0]},{p.padding[1]}"]
    parts += [f"d{p.dilation[0]},{p.dilation[1]}", f"g{p.groups}", p.act]
    flags = {"residual": p.has_residual, "norm": p.has_input_bn, "gate": p.has_input_gate}
    return " ".join(parts + [name for name, is_set in flags.items() if is_set])


def read_table(table: Mapping[str, str] | str | Path | None) -> Mapping[str, str]:
    """The choices of a table or of the file that holds it."""
    if table is None:
        return {}
    if isinstance(table, (str, Path)):
        table = json.loads(Path(table).read_text())
    if not isinstance(table, Mapping):
        raise TypeError(
            f"freeze: table must be what cvkernels.tune returned, or its file, got "
            f"{type(table).__name__}"
        )
    return table
