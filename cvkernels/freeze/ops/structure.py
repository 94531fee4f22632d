"""Ops that mostly move no data (input, concatenation, parts, flattening), and calls of code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cvkernels.freeze.aliasing import Region
from cvkernels.freeze.graph import (
    Node,
    Op,
    Run,
    ShapeError,
    Step,
    TensorSpec,
    fill,
    promoted,
    spec_of,
)
from cvkernels.memory_use import out_of_memory
from cvkernels.ops.common.traffic import Traffic
from cvkernels.tables import first_line

if TYPE_CHECKING:
    from cvkernels.freeze.lower import Lowered
    from cvkernels.freeze.steps import Site


class Input(Op, name="input", roles=()):
    """The images that the model is called with, or with ``channels`` in memory of the plan.

    There, zeros are around the images: in channels past theirs, in ``rows`` above and below, and in
    ``columns`` before and after. With ``in_pairs``, two pixels of a row are one of twice the
    channels; an odd last column, which is not the images', is left out.
    """

    channels: int | None = None
    rows: tuple[int, int] = (0, 0)
    columns: tuple[int, int] = (0, 0)
    in_pairs: bool = False

    def shape(self, node: Node, x: tuple) -> tuple:
        if self.channels is None:
            return x
        N, _, H, W = x
        height, width = H + sum(self.rows), W + sum(self.columns)
        if self.in_pairs:
            return (N, 2 * self.channels, height, width // 2)
        return (N, self.channels, height, width)

    def images(self, memory: Tensor, x: tuple) -> Tensor:
        """Where images of shape x are in such memory, which is in channels_last."""
        if self.channels is None:
            return memory
        _, C, H, W = x
        pixels = memory.permute(0, 2, 3, 1)
        if self.in_pairs:
            pixels = pixels.unflatten(3, (2, self.channels)).flatten(2, 3)
        top, left = self.rows[0], self.columns[0]
        return pixels[:, top : top + H, left : left + W, :C].permute(0, 3, 1, 2)


class _Pad(Op, writes=True):
    """x with pixels of ``fill`` around it."""

    def amounts(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows above and below a map of this size, and columns before and after it."""
        raise NotImplementedError

    def shape(self, node: Node, x: tuple) -> tuple:
        node.check(len(x) == 4, "[N, C, H, W]", x)
        rows, columns = self.amounts(*x[2:])
        return (*x[:2], x[2] + sum(rows), x[3] + sum(columns))

    def build(self, site: Site) -> Run:
        (x,), fill = site.inputs, self.fill
        height, width = site.step.inputs[0].value.shape[2:]
        (top, _), (left, _) = self.amounts(height, width)
        below, behind = top + height, left + width
        inside = (..., slice(top, below), slice(left, behind))
        around = [
            (..., slice(None, top), slice(None)),
            (..., slice(below, None), slice(None)),
            (..., slice(top, below), slice(None, left)),
            (..., slice(top, below), slice(behind, None)),
        ]

        def write(env: list, y: Tensor) -> None:
            y[inside].copy_(env[x])
            for border in around:
                y[border].fill_(fill)

        return site.written(write)


class Pad(_Pad, name="pad"):
    """x with ``rows`` of ``fill`` above and below it, and ``columns`` before and after it."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    fill: int = 0

    def amounts(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.rows, self.columns


class SamePad(_Pad, name="pad_same"):
    """x padded as TensorFlow's "SAME" is, for one output of a convolution for each stride begun:
    as much before the map as after it, or one less."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    fill: int = 0

    def amounts(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        def along(size: int, taps: int, stride: int, dilation: int) -> tuple[int, int]:
            reach = ((size - 1) // stride) * stride + dilation * (taps - 1) + 1
            total = max(0, reach - size)
            return total // 2, total - total // 2

        axes = zip((height, width), self.kernel, self.stride, self.dilation, strict=True)
        rows, columns = (along(*axis) for axis in axes)
        return rows, columns


class Cat(Op, name="cat", writes=True):
    """A concatenation along the channels, as a buffer that the parts are written into."""

    def shape(self, node: Node, *parts: tuple) -> tuple:
        first = parts[0]
        same = all((p[0], *p[2:]) == (first[0], *first[2:]) for p in parts)
        node.check(same, "parts of one size", parts)
        return (first[0], sum(part[1] for part in parts), *first[2:])

    def infer(self, node: Node, inputs: list, device: torch.device) -> TensorSpec:
        return promoted(super().infer(node, inputs, device), inputs)

    def lower(self, node: Node, lowered: Lowered) -> Step:
        value = lowered.values[node]
        alike = all(lowered.values[part].dtype == value.dtype for part in node.inputs)
        return lowered.emit(self if len(value.shape) == 4 and alike else Concat(), node)


class Concat(Op, name="concat"):
    """A concatenation of tensors that are not [N, C, H, W]; it copies them."""

    def build(self, site: Site) -> Run:
        parts = site.inputs
        return site.computed(lambda env: torch.cat([env[part] for part in parts], 1))


class Buffer(Op, name="buffer", writes=True):
    """Memory of which several values, which may overlap, are slices; no step computes it."""


class Part(Op, name="part", views=True):
    """The channels of x from ``start`` on, ``channels`` of them."""

    start: int
    channels: int

    def shape(self, node: Node, x: tuple) -> tuple:
        return (x[0], self.channels, *x[2:])

    def traffic(self, step: Step) -> Traffic:
        return Traffic(0, 0, 0)

    def build(self, site: Site) -> Run | None:
        if site.memory.in_arena(site.step):
            return None
        number, (x,) = site.number, site.inputs
        channels = slice(self.start, self.start + self.channels)

        def run(env: list) -> None:
            env[number] = env[x][:, channels]

        return run


class Flatten(Op, name="flatten", views=True):
    """x as [N, C * H * W]."""

    def shape(self, node: Node, x: tuple) -> tuple:
        return (x[0], math.prod(x[1:]))

    def traffic(self, step: Step) -> Traffic:
        moves = math.prod(step.inputs[0].value.shape[2:]) > 1
        return Traffic(int(moves), step.nbytes * moves, step.nbytes * moves)

    def build(self, site: Site) -> Run:
        (x,) = site.inputs
        return site.computed(lambda env: env[x].flatten(1))


class Call(Op, name="call", views=True, reports=True):
    """A call of a function, a method or a module that the graph has no op for.

    ``args`` and ``kwargs`` hold a :class:`cvkernels.freeze.graph.Ref` for each input.
    ``writes_first`` says that the call may write over the first, of which it then gets a copy.
    """

    kind: str
    target: Any
    args: tuple
    kwargs: dict
    writes_first: bool

    @property
    def called(self) -> str:
        """The names of what is called."""
        region = self.target.calls if isinstance(self.target, Region) else [self]
        return ", ".join(
            call.target
            if isinstance(call.target, str)
            else getattr(call.target, "__name__", type(call.target).__name__)
            for call in region
        )

    @property
    def may_raise(self) -> bool:
        return isinstance(self.target, Region) and self.target.may_raise

    def infer(self, node: Node, inputs: list, device: torch.device) -> Any:
        zeros = [
            torch.zeros(value.shape, dtype=value.dtype, device=device)
            if isinstance(value, TensorSpec)
            else value
            for value in inputs
        ]
        try:
            return spec_of(self.function()(zeros))
        # Whatever the code that is called makes of zeros, or of a size that it does not take.
        except Exception as error:  # noqa: BLE001
            if out_of_memory(error):
                raise
            shapes = ", ".join(str(list(z.shape)) for z in zeros if isinstance(z, Tensor))
            raise ShapeError(
                f"frozen model: layer {node.layer!r} calls {self.called}, which is planned by "
                f"running it on zeros of shape {shapes}, and that raises {type(error).__name__}: "
                f"{first_line(error)}; give images of a size that the network takes, or freeze the "
                f"part of the model around the layer"
            ) from error

    def to(self, dtype: torch.dtype) -> None:
        """Convert the modules that are called, in place: they are the graph's own."""
        targets = [self.target]
        if isinstance(self.target, Region):
            targets = [call.target for call in self.target.calls]
        for target in targets:
            if isinstance(target, nn.Module):
                target.to(dtype)

    def function(self) -> Callable[[list], Any]:
        """The call as a function of the list of the inputs' values."""
        is_method, target, copies = self.kind == "method", self.target, self.writes_first
        args, kwargs = self.args, self.kwargs

        def run(values: list) -> Any:
            if copies:
                values = [values[0].clone(), *values[1:]]
            actual, named = fill(args, values), fill(kwargs, values)
            if is_method:
                return getattr(actual[0], target)(*actual[1:], **named)
            return target(*actual, **named)

        return run

    def build(self, site: Site) -> Run:
        inputs, function = site.inputs, self.function()
        return site.computed(lambda env: function([env[source] for source in inputs]))
