"""Merging projections: where two 1x1 convolutions are added, one step sums both, on a GPU.

The first block of a ResNet stage ends so::

    y - conv3 ------ + - relu          y - conv3 + projection of x - relu
    x - downsample - +            ->   x ---------'

The map between the two is neither written nor read then.
"""

from __future__ import annotations

from dataclasses import replace

from cvkernels.freeze.graph import Graph, Node
from cvkernels.freeze.ops import Conv


def merge_projections(graph: Graph) -> None:
    """Merge what can be merged; the weights are folded already, and the graph's own."""
    uses = graph.uses()
    for node in graph.nodes:
        if not isinstance(node.op, Conv) or not _is_matrix(node.op):
            continue
        if node.op.roles != ("x", "residual") or node.op.projection is not None:
            continue
        other = node.inputs[1]
        if uses[other] == 1 and isinstance(other.op, Conv) and _is_projection(other.op):
            _merge(node, other)
    graph.prune()


def _is_matrix(conv: Conv) -> bool:
    plain = tuple(conv.weight.shape[2:]) == (1, 1) and tuple(conv.padding) == (0, 0)
    return plain and conv.groups == 1 and conv.input_affine is None and conv.scale is None


def _is_projection(conv: Conv) -> bool:
    return _is_matrix(conv) and conv.roles == ("x",) and conv.act == "none"


def _merge(node: Node, other: Node) -> None:
    conv, projection = node.op, other.op
    assert isinstance(conv, Conv) and isinstance(projection, Conv)
    bias = conv.bias
    if bias is None or projection.bias is None:
        bias = projection.bias if bias is None else bias
    else:
        bias = (bias.float() + projection.bias.float()).to(bias.dtype)
    stride = tuple(projection.stride)
    node.op = replace(
        conv, bias=bias, projection=projection.weight, projection_stride=(stride[0], stride[1])
    )
    node.inputs[1] = other.inputs[0]
