"""Which implementation runs a convolution of a frozen model: the one place that decides.

The first that can run it does, unless a table of measured choices (:func:`cvkernels.tune`) names
another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from cvkernels.backend import gpu, lacks_triton
from cvkernels.ops.common.dispatch import Call, Implementation
from cvkernels.ops.conv_bn_act import cudnn, halo, native, tuning
from cvkernels.ops.conv_bn_act.op import TABLE, halo_by, triton_by
from cvkernels.ops.conv_bn_act.problem import OP, Problem

CUDNN = next(i for i in TABLE.implementations if i.name == "cudnn")
HALO = next(i for i in TABLE.implementations if i.name == "halo")


class Backend(NamedTuple):
    """What runs a convolution: an implementation of conv_bn_act, or the op by its own rule.

    ``writes``: it writes channel slices of a buffer itself; others are copied there. ``prologue``:
    it takes ``input_affine`` and the gates along, which are steps of their own before others.
    """

    name: str
    implementation: Implementation | None
    writes: bool = True
    prologue: bool = True


def is_gpu(device: torch.device) -> bool:
    """Whether plans are for a GPU. The meta device stands for one, see cvkernels.explain."""
    return device.type in ("cuda", "meta")


def writes_slices(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the convolutions that are chosen without a table read and write channel slices."""
    if device.type == "cpu":
        return not native.lacks(dtype, groups=1) and not native.left_to_onednn(dtype)
    return dtype != torch.float64 and is_gpu(device) and not lacks_triton("cuda")


def without_prologue(problem: Problem) -> Problem:
    """The convolution alone, for a backend before which its prologue is a step of its own."""
    return replace(problem, has_input_bn=False, has_input_gate=False)


def possible(problem: Problem, device: torch.device, sliced: bool = False) -> list[Backend]:
    """The backends that can run the convolution, with its prologue or, if they have none, after.

    The first is the one without a table. The reference is for what nothing else computes.
    ``sliced`` is whether the output is to be a slice of a buffer.
    """
    if device.type != "cpu":
        return _on_gpu(problem, device, sliced)
    call = Call(torch.empty(0, device="cpu"), "cpu", "auto", once=True)
    bare = without_prologue(problem)
    backends = []
    for implementation in TABLE.implementations:
        name, fuses = implementation.name, implementation.name != "onednn"
        if implementation.device in ("cpu", None):
            if not implementation.why_not(problem if fuses else bare, call):
                backends.append(Backend(name, implementation, fuses, fuses))
    return backends or [Backend(OP, None)]


def _on_gpu(problem: Problem, device: torch.device, sliced: bool) -> list[Backend]:
    """Triton's tiles, the table's or the rule's first, cuDNN and the halo kernel.

    These come before them where they are preferred, cuDNN if its output need not be copied.
    """
    if not writes_slices(problem.dtype, device):
        prologue = not is_gpu(device) or not lacks_triton("cuda")
        return [Backend(OP, None, prologue=prologue)]
    like = torch.empty(0, dtype=problem.dtype, device=device)
    name, capability = gpu(like)
    chosen = tuning.choose(problem, name, capability)
    tiles = [replace(chosen, backend="triton"), *tuning.measured(problem, capability)]
    backends = [Backend(tile.name, triton_by(tile)) for tile in dict.fromkeys(tiles)]
    if not cudnn.why_not(problem):
        library = Backend("cudnn", CUDNN, writes=False, prologue=False)
        backends.insert(0 if chosen.backend == "cudnn" and not sliced else 1, library)
    if not halo.why_not(problem, like):
        others = halo.tiles(problem, capability)[1:]
        kinds = [("halo", HALO), *((tile.name, halo_by(tile)) for tile in others)]
        at = 0 if chosen.backend == "halo" else len(backends)
        backends[at:at] = [Backend(*kind, prologue=False) for kind in kinds]
    return backends


def choose(
    problem: Problem, device: torch.device, table: Mapping[str, str], sliced: bool = False
) -> Backend:
    """The backend for a convolution: the table's, or the first."""
    backends = possible(problem, device, sliced)
    named = table.get(key(problem))
    return next((b for b in backends if b.name == named), backends[0])


def key(problem: Problem) -> str:
    """What a table of measured choices knows a convolution by."""
    p = problem
    parts = [f"{p.N}x{p.C}x{p.H}x{p.W}", f"{p.K}x{p.R}x{p.S}", str(p.dtype).removeprefix("torch.")]
    parts += [f"s{p.stride[0]},{p.stride[1]}", f"p{p.padding[0]},{p.padding[1]}"]
    parts += [f"d{p.dilation[0]},{p.dilation[1]}", f"g{p.groups}", p.act]
    if p.projection is not None:
        parts += ["projection{} s{},{}".format(p.projection.C, *p.projection.stride)]
    flags = {
        "residual": p.has_residual, "norm": p.has_input_bn, "gate": p.has_input_gate,
        "output gate": p.has_output_gate,
    }  # fmt: skip
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
