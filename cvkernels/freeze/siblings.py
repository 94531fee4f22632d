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

import torch
from torch import Tensor

from cvkernels.freeze.graph import Graph, Node


def merge_siblings(graph: Graph) -> None:
    """Merge what can be merged; the weights are folded already, and the graph's own."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for source in node.inputs:
            readers[source].append(node)
    families: dict[tuple, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "conv" and _is_alone(node) and node not in graph.results:
            a = node.attrs
            geometry = (*a["weight"].shape[2:], *a["stride"], *a["padding"], *a["dilation"])
            families[(node.inputs[0], *geometry, a["act"])].append(node)
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
        if node.op != "part":
            nodes.append(node)
    graph.nodes = nodes


def _is_alone(conv: Node) -> bool:
    """Whether nothing but its input goes into the convolution, and nothing but its value comes."""
    a = conv.attrs
    plain = a["roles"] == ("x",) and a["input_affine"] is None and not a["squeeze"]
    return plain and a["groups"] == 1


def _takes_slices(reader: Node) -> bool:
    return reader.op == "conv" and reader.attrs["groups"] == 1


def _begins_concatenation(conv: Node, readers: dict[Node, list[Node]]) -> bool:
    """Whether conv is the first part of a concatenation, and else read by convolutions alone."""
    cats = [reader for reader in readers[conv] if not _takes_slices(reader)]
    if len(cats) != 1 or cats[0].op != "cat" or cats[0].inputs[0] is not conv:
        return False
    return all(reader.op != "cat" for reader in readers[cats[0]])


def _merge(siblings: list[Node]) -> list[Node]:
    """The convolution that computes all of them, and they themselves, as parts of its value."""
    x, a = siblings[0].inputs[0], siblings[0].attrs
    bias = None
    if any(conv.attrs["bias"] is not None for conv in siblings):
        bias = torch.cat([_bias(conv) for conv in siblings])
    weight = torch.cat([conv.attrs["weight"] for conv in siblings])
    layers = [conv.layer.split(".") for conv in siblings]
    layer = ".".join(os.path.commonprefix(layers)) or siblings[0].layer
    merged = Node("conv", [x], layer, **{**a, "weight": weight, "bias": bias})
    start = 0
    for conv in siblings:
        channels = conv.attrs["weight"].shape[0]
        conv.op, conv.inputs = "part", [merged]
        conv.attrs = {"start": start, "channels": channels}
        start += channels
    return [merged, *siblings]


def _bias(conv: Node) -> Tensor:
    weight, bias = conv.attrs["weight"], conv.attrs["bias"]
    return weight.new_zeros(weight.shape[0]) if bias is None else bias
