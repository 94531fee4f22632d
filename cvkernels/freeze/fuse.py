"""Fusing: neighbouring nodes that one step computes become one node.

The weights are then those of the frozen model alone: folded in float64 and cast to its dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cvkernels.freeze import ops
from cvkernels.freeze.graph import Graph, Node, Op, TensorSpec
from cvkernels.ops.common.activation import ACTIVATIONS
from cvkernels.ops.common.norm import fold

SE_ACTS = ("relu", "silu")


def fuse(graph: Graph, values: dict[Node, TensorSpec]) -> None:
    """Fuse the graph's nodes; ``values`` are theirs for the example's shape."""
    _Fuser(graph, values).run()


class _Fuser:
    """One pass in the order of the nodes: each looks back at what computes its inputs."""

    def __init__(self, graph: Graph, values: dict[Node, TensorSpec]) -> None:
        self.graph = graph
        self.values = values
        self.uses: Counter[Node] = graph.uses()
        self.before: dict[Node, list[Node]] = {}
        self.rules: dict[type[Op], Callable[[Node], None]] = {
            ops.Affine: self._affine,
            ops.Act: self._act,
            ops.Add: self._add,
            ops.Mul: self._mul,
            ops.Conv: self._conv,
            ops.AvgPool: self._avg_pool,
            ops.Mean: self._take_affine,
        }

    def run(self) -> None:
        for node in self.graph.nodes:
            if (rule := self.rules.get(type(node.op))) is not None:
                rule(node)
        nodes = []
        for node in self.graph.nodes:
            nodes += [*self.before.get(node, ()), node]
        self.graph.nodes = nodes
        self.graph.prune()

    def _only(self, node: Node, kind: type[Op]) -> bool:
        """Whether node is such an op, and read once."""
        return isinstance(node.op, kind) and self.uses[node] == 1

    def _absorb(self, node: Node, source: Node, **changes: Any) -> None:
        """node computes what source does, changed; source has no reader any more."""
        self.uses[source] = 0
        node.become(source, **changes)

    def _affine(self, node: Node) -> None:
        conv = node.inputs[0]
        if self._only(conv, ops.Conv) and conv.op.scale is None and conv.op.is_plain:
            self._absorb(node, conv, scale=node.op.scale, shift=node.op.shift)

    def _act(self, node: Node) -> None:
        source, act = node.inputs[0], node.op.act
        before = source.op
        if self._only(source, ops.Affine) and act == "relu" and not before.relu:
            self._absorb(node, source, relu=True)
        elif self._only(source, ops.Conv) and before.act == "none" and act in ACTIVATIONS:
            self._absorb(node, source, act=act)
        elif self._only(source, ops.SqueezeExcite) and act in SE_ACTS:
            if before.out_act == "none" and "residual" in before.roles:
                self._absorb(node, source, out_act=act)

    def _add(self, node: Node) -> None:
        """The operand that is computed last takes the other along as its shortcut."""
        order = {n: place for place, n in enumerate(self.graph.nodes)}
        operands = sorted(node.inputs, key=order.__getitem__, reverse=True)
        same = self.values[operands[0]] == self.values[operands[1]]
        if operands[0] is operands[1] or not same:
            return
        for host, other in (operands, operands[::-1]):
            op = host.op
            if not isinstance(op, (ops.Conv, ops.SqueezeExcite)) or self.uses[host] != 1:
                continue
            if op.is_plain and not (isinstance(op, ops.Conv) and op.is_depthwise):
                self._absorb(node, host, roles=(*op.roles, "residual"))
                node.inputs.append(other)
                return

    def _mul(self, node: Node) -> None:
        """Squeeze-and-excitation: a map times the gates that its own mean gives."""
        for x, gate in (node.inputs, node.inputs[::-1]):
            if (parts := self._excitation(x, gate)) is None:
                continue
            fc1, fc2 = parts
            for part in (gate, fc2, fc1, fc1.inputs[0]):
                self.uses[part] = 0
            self.uses[x] -= 1
            node.inputs, node.layer = [x], fc1.layer.rpartition(".")[0]
            layers = (fc1.op.weight, fc1.op.bias, fc2.op.weight, fc2.op.bias)
            node.op = ops.SqueezeExcite(*layers, fc1.op.act)
            return

    def _excitation(self, x: Node, gate: Node) -> tuple[Node, Node] | None:
        """The two layers between the mean of x and its gate."""
        if not self._only(gate, ops.Act) or gate.op.act != "sigmoid":
            return None
        fc2 = gate.inputs[0]
        if not self._is_layer(fc2, ("none",)) or not self._is_layer(fc2.inputs[0], SE_ACTS):
            return None
        fc1 = fc2.inputs[0]
        mean = fc1.inputs[0]
        plain = self._only(mean, ops.Mean) and mean.op.input_affine is None
        return (fc1, fc2) if plain and mean.inputs == [x] else None

    def _is_layer(self, node: Node, acts: tuple[str, ...]) -> bool:
        """Whether node is a matrix and a bias with such an activation, and read once."""
        return self._only(node, ops.Conv) and node.op.act in acts and _is_matrix(node.op)

    def _conv(self, node: Node) -> None:
        """What a 1x1 convolution can do to its input: a norm with ReLU, or the gates of SE."""
        conv, source = node.op, node.inputs[0]
        if not conv.is_1x1 or conv.input_affine is not None or "gate" in conv.roles:
            return
        if self._take_affine(node) or not self._only(source, ops.SqueezeExcite):
            return
        se, depthwise = source.op, source.inputs[0]
        if se.roles != ("x",) or not self._only(depthwise, ops.Conv):
            return
        if not depthwise.op.is_depthwise:
            return
        depthwise.change(squeeze=True)
        sums = Node(ops.Sums(), [depthwise], source.layer)
        layers = (se.weight1, se.bias1, se.weight2, se.bias2)
        excite = Node(ops.Excite(*layers, se.act), [sums], source.layer)
        # Where conv is absorbed later, what absorbs it comes after these all the same.
        self.before.setdefault(source, []).extend([sums, excite])
        node.inputs = [depthwise, *node.inputs[1:], excite]
        node.change(roles=(*conv.roles, "gate"))
        self.uses[depthwise] = 2
        self.uses[sums] = self.uses[excite] = 1
        self.uses[source] = 0

    def _take_affine(self, node: Node) -> bool:
        """Let node apply the norm with ReLU before it, where there is one."""
        source = node.inputs[0]
        if not self._only(source, ops.Affine) or not source.op.relu:
            return False
        node.change(input_affine=(source.op.scale, source.op.shift))
        node.inputs[0] = source.inputs[0]
        self.uses[source] = 0
        return True

    def _avg_pool(self, node: Node) -> None:
        """A mean commutes with a 1x1 convolution: pool first, over fewer pixels comes the other."""
        source, pool = node.inputs[0], node.op
        conv = source.op
        swaps = self._only(source, ops.Conv) and conv.is_1x1 and conv.is_plain
        padding = pool.window[2]
        if swaps and conv.roles == ("x",) and padding == (0, 0) and pool.divisor is None:
            first = replace(pool, input_affine=conv.input_affine)
            before = Node(first, source.inputs, node.layer)
            self._absorb(node, source, input_affine=None)
            node.inputs = [before]
            self.before[node] = [before]
            self.uses[before] = 1
        else:
            self._take_affine(node)


def _is_matrix(conv: ops.Conv) -> bool:
    """Whether the convolution is a matrix and a bias, with nothing before and after."""
    plain = conv.scale is None and conv.roles == ("x",) and conv.input_affine is None
    return plain and conv.is_1x1


def own_weights(graph: Graph, dtype: torch.dtype, device: torch.device) -> None:
    """Give every node tensors of its own in ``dtype``; norms are folded into convolutions.

    A depthwise convolution keeps its norm, which its kernel applies for nothing. Vectors that stay
    are at least float32.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def cast(name: str, value: Any) -> Any:
        if name == "input_affine" and value is not None:
            return tuple(cast("scale", vector) for vector in value)
        if not isinstance(value, Tensor):
            return value
        kind = wide if name in ("scale", "shift") else dtype
        return value.detach().to(device, kind, copy=True).contiguous()

    for node in graph.nodes:
        op = node.op
        if isinstance(op, ops.Conv) and op.scale is not None and not op.is_depthwise:
            weight, bias = fold(op.weight, op.bias, op.bn, dtype)
            op = replace(op, weight=weight, bias=bias, scale=None, shift=None)
        node.op = replace(op, **{name: cast(name, value) for name, value in vars(op).items()})
