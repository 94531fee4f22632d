"""What is measured: an op or network at one shape and dtype, with the variants that compute it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.report import dtype_name
from cvkernels.functional import BatchNormParams


@dataclass(frozen=True, eq=False)
class Case:
    """One op at one shape and dtype on one device.

    ``inputs`` makes args and kwargs; ``reference`` and every variant take them. ``variants`` maps a
    name to a factory, called once per case, before any timing. A name's first word is "eager",
    "compile" or "cvkernels". Without ``bytes`` or ``flops`` the columns that come from them stay
    empty.

    What a factory returns, and the reference, may have ``answers(*args)``: the tensors to check,
    where a call returns others; ``fresh(*args)``: the arguments of one call, where it writes over
    them; and ``saved_bytes(*args)``: what a step keeps for its backward.

    part: "forward"; "backward", of inputs that require gradients, the forward untimed; "host", the
        time that the caller's thread spends in one call, in warm caches; or for a network,
        "inference", "training", or "memory", which is not timed.
    bitwise: the op moves data, and must be equal to the reference.
    rounds: variants quantise numbers, and are held to no rule: how far their answers agree with the
        reference's is measured beside their time.
    network: a whole network: its latency counts, and the time to its first result, from nothing
        compiled; and its memory.
    """

    op: str
    name: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], tuple[tuple, dict]]
    reference: Callable
    variants: Mapping[str, Callable[[], Callable]]
    bytes: int | None = None
    flops: int | None = None
    part: str = "forward"
    bitwise: bool = False
    rounds: bool = False
    network: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-{dtype_name(self.dtype)}-{self.part}"


class Conditions(NamedTuple):
    """What a shape is measured under; ``part`` as of :class:`Case`."""

    batch: int
    dtype: torch.dtype
    device: torch.device
    part: str = "forward"

    def image(self, *shape: int) -> Tensor:
        """A random batch of maps [C, H, W], in channels_last."""
        return image(self.batch, *shape, dtype=self.dtype, device=self.device)

    def leaves(self, *tensors: Tensor | None) -> None:
        """Have backward compute the gradients of these, where it is what is measured."""
        for tensor in tensors:
            if tensor is not None:
                tensor.requires_grad_(self.part == "backward")

    def case(
        self, op: str, name: str, shape: str, *, bytes: int, flops: int | None = None, **others: Any
    ) -> Case:
        """The case of ``op``; for the host's time, bytes and flops do not count."""
        if self.part == "host":
            return Case(op, name, shape, self.dtype, part="host", **others)
        return Case(op, name, shape, self.dtype, bytes=bytes, flops=flops, part=self.part, **others)


class PeerMissing(Exception):
    """A peer that is not installed; the message says which extra has it."""


def grad_mode(case: Case) -> contextlib.AbstractContextManager[None]:
    return torch.set_grad_enabled(case.part in ("backward", "training", "memory"))


def compiled(function: Callable) -> Callable:
    """torch.compile's variant of a peer, static in its shapes as the others are."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def variants_of(stock: Callable, make_ours: Callable[[], Callable]) -> dict[str, Callable]:
    """``stock``, eager and compiled, and what ``make_ours`` makes; see :class:`Case`."""
    return {"eager": lambda: stock, "compile": lambda: compiled(stock), "cvkernels": make_ours}


def cases_of(
    case_of: Callable[[str, Any, Conditions], Case],
    shapes: Mapping[str, Any],
    quick_names: Container[str],
    host: tuple[str, Any],
    backward: Container[str] = (),
) -> Callable[..., list[Case]]:
    """A benchmark's ``cases(device, dtypes, batch, quick)``.

    Forward at each shape and backward at those of ``backward``, with ``quick`` only at those of
    ``quick_names``; then the time that the host spends on a batch of 2 at ``host``'s shape.
    ``case_of(name, shape, conditions)`` makes one.
    """

    def cases(
        device: torch.device, dtypes: Sequence[torch.dtype], batch: int, quick: bool = False
    ) -> list[Case]:
        chosen = {name: shapes[name] for name in shapes if name in quick_names or not quick}
        made = []
        for dtype in dtypes:
            forward = Conditions(batch, dtype, device)
            made += [case_of(*item, forward) for item in chosen.items()]
            grads = forward._replace(part="backward")
            made += [case_of(name, chosen[name], grads) for name in chosen if name in backward]
            made.append(case_of(*host, Conditions(2, dtype, device, "host")))
        return made

    return cases


def network_case(name: str, batch: int, dtype: torch.dtype, part: str, **others: Any) -> Case:
    """The case of a network on images of 224 x 224."""
    shape = f"{batch}x3x224x224"
    return Case(name, f"batch {batch}", shape, dtype, part=part, network=True, **others)


def image(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random Tensor[N, C, H, W] in channels_last."""
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def batch_norm(channels: int, device: torch.device) -> BatchNormParams:
    weight, bias, mean = torch.randn(3, channels, device=device)
    return BatchNormParams(weight, bias, mean, torch.rand(channels, device=device) + 0.5)
