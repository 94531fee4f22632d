"""The graph that ``freeze`` works on: a dozen ops on values, in the order in which they run.

A node is one op and the value that it computes. Its tensors and options are in ``attrs``::

    op         inputs                              attrs
    input
    conv       x, by ``roles`` residual and gate   weight, bias, scale, shift, stride, padding,
                                                   dilation, groups, act, input_affine, squeeze
    affine     x                                   scale, shift, relu
    act        x                                   act
    add, mul   a, b
    cat        parts, along the channels
    part       x, of which it is some channels     start, channels
    max_pool   x                                   window
    avg_pool   x                                   window, count_include_pad, divisor, input_affine
    mean       x, over its pixels: [N, C, 1, 1]    input_affine
    se         x, by ``roles`` residual            weight1, bias1, weight2, bias2, act, out_act
    sums       a conv with squeeze: its output's
               sums over pixels
    excite     sums                                weight1, bias1, weight2, bias2, act
    linear     x[N, C]                             weight, bias
    flatten    x: [N, C * H * W]
    call       those that args, kwargs refer to    kind, target, args, kwargs, in_place
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class Ref:
    """Stands for a value among the arguments of a call, or in the model's output."""

    index: int


class Node:
    """One op, and the value that it computes; ``layer`` is the module that it came from."""

    __slots__ = ("op", "inputs", "attrs", "layer")

    def __init__(self, op: str, inputs: Iterable[Node], layer: str = "", **attrs: Any) -> None:
        self.op = op
        self.inputs = list(inputs)
        self.layer = layer
        self.attrs = attrs

    def role(self, name: str) -> Node | None:
        """The input that plays this role, where there is one."""
        roles = self.attrs.get("roles", ("x",))
        return self.inputs[roles.index(name)] if name in roles else None

    def become(self, other: Node, **changes: Any) -> None:
        """Compute what other does, with ``changes`` to its attributes, at this node's place."""
        self.op, self.layer = other.op, other.layer
        self.inputs = list(other.inputs)
        self.attrs = {**other.attrs, **changes}

    def __repr__(self) -> str:
        return f"<{self.op} {self.layer}>"


class Graph:
    """Nodes in order, the first of them the input, and the structure of the output.

    ``output`` is what the model returns, with :class:`Ref` to an entry of ``results`` for each
    tensor.
    """

    def __init__(self, nodes: list[Node], results: list[Node], output: Any) -> None:
        self.nodes = nodes
        self.results = results
        self.output = output

    def uses(self) -> Counter[Node]:
        """How often each node's value is read."""
        uses = Counter(self.results)
        for node in self.nodes:
            uses.update(node.inputs)
        return uses

    def prune(self) -> None:
        """Drop what no result needs; the input stays."""
        needed = set(self.results) | {self.nodes[0]}
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.inputs)
        self.nodes = [node for node in self.nodes if node in needed]


def fill(structure: Any, values: list) -> Any:
    """The structure with each :class:`Ref` replaced by the value that it stands for."""
    return map_aggregate(
        structure, lambda leaf: values[leaf.index] if isinstance(leaf, Ref) else leaf
    )


class Like(NamedTuple):
    """What is known of a tensor before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def like(value: Any) -> Any:
    """A tensor's :class:`Like`; any other value as it is."""
    return Like(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
