"""The classifier as a convolution, on a CPU: a linear layer on means is a 1x1 convolution of them.

    mean - flatten - linear   ->   mean - conv 1x1 - flatten

It is recorded with the steps before it then, and reads its weights, which for one image is most of
its work, by the kernels of the convolutions.
"""

from __future__ import annotations

from cvkernels.freeze.graph import Graph, Node
from cvkernels.freeze.ops import Conv, Flatten, Linear, Mean


def convolve_classifier(graph: Graph) -> None:
    """Change every linear layer that only means reach."""
    uses = graph.uses()
    for node in graph.nodes:
        if not isinstance(node.op, Linear):
            continue
        flatten = node.inputs[0]
        if not isinstance(flatten.op, Flatten) or uses[flatten] != 1:
            continue
        if isinstance(flatten.inputs[0].op, Mean):
            _convolve(node, flatten)


def _convolve(node: Node, flatten: Node) -> None:
    """The two nodes change places: what was the flattening convolves."""
    linear = node.op
    assert isinstance(linear, Linear)
    weight = linear.weight[:, :, None, None]
    flatten.op, node.op = Conv(weight, linear.bias, (1, 1), (0, 0), (1, 1), 1), flatten.op
    flatten.layer, node.layer = node.layer, flatten.layer
