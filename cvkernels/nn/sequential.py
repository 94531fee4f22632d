"""FusedSequential: nn.Sequential, with what its children compute together run as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cvkernels.nn.fused.caller_layout import in_layout_of_input, like_input
from cvkernels.nn.fused.match import ACTIVATIONS, pooled_shape, why_not_max_pool
from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.fused.watched import why_not_called
from cvkernels.ops.common.layout import gives_channels_last

ACTIVATION_MODULES = tuple(kind for kind in ACTIVATIONS if isinstance(kind, type))


class ConcatBuffer(NamedTuple):
    """Room for a block's output, which begins with the ``channels`` channels of its input.

    Once the input is in :attr:`input`, :meth:`fill` computes the rest.
    """

    tensor: Tensor
    channels: int
    append: Callable[[Tensor], Tensor]

    @property
    def input(self) -> Tensor:
        return self.tensor[:, : self.channels]

    def fill(self) -> Tensor:
        return self.append(self.tensor)


class ConcatBlock(FusedModule):
    """A block whose output begins with its input, in one buffer where nothing watches it.

    What computes the input can write it there, so that nothing is copied.
    """

    def concat_buffer(self, x: Tensor, shape: Sequence[int]) -> ConcatBuffer | None:
        """Room for the output on an input of ``shape``, x's dtype and device; None to call it."""
        raise NotImplementedError

    def drops(self) -> bool:
        """Whether dropout is active in the block."""
        return False

    def with_consumer(self, x: Tensor, layers: list[nn.Module]) -> Tensor | None:
        """``layers.pop(0)(self(x))``, where that uses what this block knows of its output."""
        return None


class FusedSequential(nn.Sequential, FusedModule):
    """nn.Sequential that fuses its neighbours; names, order, slicing and iteration are the same.

    A convolution runs with the norm and activation that follow it and, where a kernel can, with the
    norm and ReLU before it; a max pool runs without indices, and like another FusedSequential
    writes into the buffer of a ConcatBlock behind it. All other children are called.
    """

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, list(self))

    def output_shape(self, x: Tensor) -> Sequence[int] | None:
        """The shape of this module's output, where :meth:`write` can compute it."""
        return None

    def write(self, x: Tensor, out: Tensor) -> Tensor:
        """This module's output, written into ``out``."""
        raise NotImplementedError

    def run(self, x: Tensor, layers: list[nn.Module]) -> Tensor:
        """What ``layers``, children of this module, compute one behind the other."""
        planar = type(x) is Tensor and not gives_channels_last(x)
        while layers:
            first, before = layers.pop(0), x
            if (y := self._with_next(x, first, layers)) is not None:
                x = y
            elif isinstance(first, _BatchNorm) and _next_are(layers, nn.ReLU, nn.Conv2d):
                relu, conv = layers.pop(0), layers.pop(0)
                x = self.fused(x, conv, *_norm_and_act(layers), input_bn=(first, relu))
            elif isinstance(first, _BatchNorm) and _next_are(layers, nn.Conv2d):
                conv = layers.pop(0)
                x = self.fused(x, conv, *_norm_and_act(layers), input_bn=(first, None))
            elif isinstance(first, nn.Conv2d):
                x = self.fused(x, first, *_norm_and_act(layers))
            elif isinstance(first, nn.MaxPool2d):
                x = self.pooled(x, first)
            elif planar and isinstance(first, ConcatBlock) and first.drops():
                x = first(x.contiguous())  # stock's layout, by which dropout draws its numbers
            else:
                x = first(x)
            x = like_input(before, x)
        return x

    def _with_next(self, x: Tensor, first: nn.Module, layers: list[nn.Module]) -> Tensor | None:
        """``layers.pop(0)(first(x))`` where the one uses memory or statistics of the other."""
        if isinstance(first, ConcatBlock):
            if (y := first.with_consumer(x, layers)) is not None:
                return y
        if not _next_are(layers, ConcatBlock):
            return None
        if (y := self._appended(x, first, layers[0])) is not None:
            layers.pop(0)
        return y

    def _appended(self, x: Tensor, producer: nn.Module, block: ConcatBlock) -> Tensor | None:
        """``block(producer(x))`` without a copy between the two, where both can."""
        pools = isinstance(producer, nn.MaxPool2d)
        if pools:
            shape = None if why_not_max_pool(x, producer) else pooled_shape(x, producer)
        elif isinstance(producer, FusedSequential) and not why_not_called(x, producer):
            shape = producer.output_shape(x)
        else:
            shape = None
        if shape is None or (buffer := block.concat_buffer(x, shape)) is None:
            return None
        self.pooled(x, producer, buffer.input) if pools else producer.write(x, buffer.input)
        return buffer.fill()


def _norm_and_act(layers: list[nn.Module]) -> tuple[nn.Module | None, nn.Module | None]:
    """Take the norm and the activation that layers begin with, where they do."""
    norm = layers.pop(0) if _next_are(layers, _BatchNorm) else None
    act = layers.pop(0) if _next_are(layers, ACTIVATION_MODULES) else None
    return norm, act


def _next_are(layers: list[nn.Module], *kinds: type | tuple[type, ...]) -> bool:
    return len(layers) >= len(kinds) and all(map(isinstance, layers, kinds))
