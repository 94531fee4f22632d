"""Early gates: squeeze-and-excitation behind a 1x1 convolution, computed from its input.

The mean over the pixels commutes with a 1x1 convolution ``y = W x + b``, so that the first layer on
the mean of y is one on the mean of x::

    W1 mean(y) + b1 = (W1 W) mean(x) + (W1 b + b1)

The gates are known before y is computed then, and the convolution multiplies by them::

    x - conv3 - se + shortcut - relu   ->   x - squeeze - excite ---.
                                            x - conv3 * gates + shortcut - relu

No step reads y again, the widest map of a bottleneck; the mean is of a map with a quarter of its
channels. The matrices are multiplied in float64.
"""

from __future__ import annotations

import torch

from cvkernels.freeze.graph import Graph, Node
from cvkernels.freeze.ops import Conv, Excite, Squeeze, SqueezeExcite
from cvkernels.ops.common.norm import fold


def gate_early(graph: Graph) -> None:
    """Merge what can be merged, before the norms are folded into the weights."""
    uses = graph.uses()
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node.op, SqueezeExcite):
            conv = node.inputs[0]
            if uses[conv] == 1 and isinstance(conv.op, Conv) and _commutes_with_mean(conv.op):
                nodes += _gates(node, conv)
        nodes.append(node)
    graph.nodes = nodes
    graph.prune()


def _commutes_with_mean(conv: Conv) -> bool:
    plain = conv.act == "none" and conv.roles == ("x",) and conv.input_affine is None
    return plain and conv.is_1x1


def _gates(node: Node, conv: Node) -> list[Node]:
    """The steps of the gates, which ``node`` multiplies its convolution by from now on."""
    se, source = node.op, conv.op
    assert isinstance(se, SqueezeExcite) and isinstance(source, Conv)
    with torch.no_grad():
        weight, bias = fold(source.weight, source.bias, source.bn, torch.float64)
        first = se.weight1.flatten(1).double()
        bias1 = first @ bias.double()
        if se.bias1 is not None:
            bias1 += se.bias1.double()
        weight1 = first @ weight.flatten(1)
    squeeze = Node(Squeeze(), conv.inputs, node.layer)
    excite = Node(Excite(weight1, bias1, se.weight2, se.bias2, se.act), [squeeze], node.layer)
    others = node.inputs[1:]
    node.become(conv, act=se.out_act, roles=(*se.roles, "output_gate"))
    node.inputs += [*others, excite]
    return [squeeze, excite]
