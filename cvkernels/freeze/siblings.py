"""Merging siblings: convolutions of one geometry that read one value become one of more outputs.

An inception module's, for one. The merged convolution reads its input once; the siblings' values
are channels of its result::

    x - conv reduce3 - conv      x - conv +- reduce3 - conv
      - conv reduce5 - conv  ->            +- reduce5 - conv
      - conv branch1 - cat                 +- branch1 - cat

The last of them may be the first part of a concatenation, whose buffer then begins inside of the
merged convolution's (:meth:`cvkernels.freeze.memory.Memory`).
"""

from __future__ import annotations

import os.path
from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from cvkernels.freeze.graph import Graph, Node
from cvkernels.freeze.ops import Cat, Conv, Part


def merge_siblings(graph: Graph) -> None:
    """Merge what can be merged; the weights are folded already, and the graph's own."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for source in node.inputs:
            readers[source].append(node)
    families: dict[tuple, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        op = node.op
        if isinstance(op, Conv) and _is_alone(op) and node not in graph.results:
            geometry = (*op.weight.shape[2:], *op.stride, *op.padding, *op.dilation)
            families[(node.inputs[0], *geometry, op.act)].append(node)
    merged: dict[Node, list[Node]] = {}
    for family in families.values():
        siblings = [conv for conv in family if all(map(_takes_slices, readers[conv]))]
        first = next((conv for conv in family if _begins_concatenation(conv, readers)), None)
        siblings += [first] if first is not None else []
        if len(siblings) > 1:
            earliest = next(conv for conv in family if conv in siblings)
            merged[earliest] = _merge(siblings)
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes += merged.get(node, ())
        if not isinstance(node.op, Part):
            nodes.append(node)
    graph.nodes = nodes


def _is_alone(conv: Conv) -> bool:
    """Whether nothing but its input goes into the convolution, and nothing but its value comes."""
    plain = conv.roles == ("x",) and conv.input_affine is None and not conv.squeeze
    return plain and conv.groups == 1


def _takes_slices(reader: Node) -> bool:
    return isinstance(reader.op, Conv) and reader.op.groups == 1


def _begins_concatenation(conv: Node, readers: dict[Node, list[Node]]) -> bool:
    """Whether conv is the first part of a concatenation, and else read by convolutions alone."""
    cats = [reader for reader in readers[conv] if not _takes_slices(reader)]
    if len(cats) != 1 or not isinstance(cats[0].op, Cat) or cats[0].inputs[0] is not conv:
        return False
    return not any(isinstance(reader.op, Cat) for reader in readers[cats[0]])


def _merge(siblings: list[Node]) -> list[Node]:
    """The convolution that computes all of them, and they themselves, as parts of its value."""
    convs = [node.op for node in siblings]
    bias = None
    if any(conv.bias is not None for conv in convs):
        bias = torch.cat([_bias(conv) for conv in convs])
    weight = torch.cat([conv.weight for conv in convs])
    layers = [node.layer.split(".") for node in siblings]
    layer = ".".join(os.path.commonprefix(layers)) or siblings[0].layer
    merged = Node(replace(convs[0], weight=weight, bias=bias), siblings[0].inputs, layer)
    start = 0
    for node, conv in zip(siblings, convs, strict=True):
        channels = conv.weight.shape[0]
        node.op, node.inputs = Part(start, channels), [merged]
        start += channels
    return [merged, *siblings]


def _bias(conv: Conv) -> Tensor:
    return conv.weight.new_zeros(conv.weight.shape[0]) if conv.bias is None else conv.bias
