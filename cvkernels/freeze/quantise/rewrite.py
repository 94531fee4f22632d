"""From a graph on numbers to one that computes in bytes where it can.

A value is kept in bytes where a step that reads it takes bytes; what reads or computes numbers
stands between a ``quantise`` and a ``dequantise`` step. Bytes that one buffer holds, those of a
concatenation, or that a pool hands on, stand for numbers in the same way, unless all that reads
them scales each channel for itself, as DenseNet's norms do: then each part has a way of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels.freeze import ops
from cvkernels.freeze.graph import Graph, Node, Op
from cvkernels.freeze.quantise.calibration import Calibration
from cvkernels.ops.common.norm import fold
from cvkernels.ops.quantised import depthwise
from cvkernels.ops.quantised.convolution import QUAD, WEIGHTS
from cvkernels.ops.quantised.quantisation import Quantisation, quantise_weight

# Scale and zero of each channel.
Vectors = tuple[Tensor, Tensor]


def why_not(node: Node) -> str:
    """Why a convolution is not computed in bytes; empty where it is."""
    conv = node.op
    assert isinstance(conv, ops.Conv)
    if conv.is_depthwise:
        if conv.roles != ("x",) or conv.input_affine is not None:
            return "a depthwise convolution in int8 stands alone"
        kernel = (conv.weight.shape[2], conv.weight.shape[3])
        return depthwise.lacks(kernel, tuple(conv.stride), tuple(conv.dilation))
    if conv.groups != 1:
        return f"the convolution in int8 has no groups, got {conv.groups}"
    if conv.squeeze or conv.projection is not None:
        return "the convolution in int8 computes no sums and no projection"
    if conv.weight[0].numel() > WEIGHTS:
        return f"a filter in int8 has at most {WEIGHTS} weights"
    return ""


def quantised(graph: Graph, found: Calibration, floats: Mapping[Node, str]) -> Graph:
    """The graph in bytes, but for its convolutions in ``floats``, which says why not."""
    return _Rewriter(graph, found, floats).run()


class _Rewriter:
    def __init__(self, graph: Graph, found: Calibration, floats: Mapping[Node, str]) -> None:
        self.graph, self.found, self.floats = graph, found, floats
        self.convs = {
            node
            for node in graph.nodes
            if isinstance(node.op, ops.Conv) and node not in floats and not why_not(node)
        }
        self.users: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
        for node in graph.nodes:
            for source in node.inputs:
                self.users[source].append(node)
        self.bytes = self._in_bytes()
        self.apart = self._apart()
        self.pairs = self._pairs()
        self.nodes: list[Node] = []
        self.new: dict[Node, Node] = {}
        self.numbers: dict[Node, Node] = {}
        self.quantised: dict[tuple[Node, int | None], Node] = {}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            self.new[node] = self._rewritten(node)
        results = [self._as_numbers(node) for node in self.graph.results]
        graph = Graph(self.nodes, results, self.graph.output)
        graph.prune()
        return graph

    def _in_bytes(self) -> set[Node]:
        """The nodes whose values are bytes."""
        can: set[Node] = set()
        for node in self.graph.nodes:
            op = node.op
            if node in self.convs:
                can.add(node)
            elif isinstance(op, (ops.MaxPool, ops.Part, ops.Cat, ops.Pad, ops.SamePad)):
                if all(source in can for source in node.inputs):
                    can.add(node)
            elif isinstance(op, ops.AvgPool) and node.inputs[0] in can:
                padded = any(op.window[2]) and op.count_include_pad
                if not padded:
                    can.add(node)
        wanted: set[Node] = set()
        for node in reversed(self.graph.nodes):
            if node in can and any(
                self._reads_bytes(user, node, wanted) for user in self.users[node]
            ):
                wanted.add(node)
        return wanted

    def _reads_bytes(self, user: Node, source: Node, wanted: set[Node]) -> bool:
        if user in self.convs:
            return source in (user.role("x"), user.role("residual"))
        # A mean of whole maps reads numbers where their convolution can write them: they are small.
        scales = isinstance(user.op, ops.Mean) and user.op.input_affine is not None
        return user in wanted or scales or isinstance(user.op, (ops.Squeeze, ops.Sums))

    def _apart(self) -> set[Node]:
        """The concatenations all of whose readers scale each channel for themselves."""
        apart: set[Node] = set()
        for node in reversed(self.graph.nodes):
            if node in self.bytes and isinstance(node.op, ops.Cat):
                readers = self.users[node]
                if node not in self.graph.results and all(
                    user in apart or self._scales(user) for user in readers
                ):
                    apart.add(node)
        return apart

    def _scales(self, user: Node) -> bool:
        if user in self.convs or user in self.bytes:
            return getattr(user.op, "input_affine", None) is not None
        return isinstance(user.op, ops.Mean) and user.op.input_affine is not None

    def _pairs(self) -> dict[Node, Quantisation]:
        """How the bytes of each node stand for numbers; not of concatenations that are apart."""
        parent: dict[Node, Node] = {}

        def root(node: Node) -> Node:
            while node in parent:
                node = parent[node]
            return node

        for node in self.graph.nodes:
            if node not in self.bytes or node in self.apart or node in self.convs:
                continue
            if isinstance(node.op, ops.AvgPool) and node.op.input_affine is not None:
                continue
            for source in node.inputs:
                if (a := root(node)) is not (b := root(source)):
                    parent[a] = b
        ranges: dict[Node, tuple[float, float]] = {}
        for node in self.graph.nodes:
            makes = node in self.convs or isinstance(node.op, ops.AvgPool)
            if node in self.bytes and makes and node in self.found.values:
                low, high = self.found.values[node].range()
                a, b = ranges.get(root(node), (0.0, 0.0))
                ranges[root(node)] = min(a, low), max(b, high)
        pairs = {}
        for node in self.graph.nodes:
            if node in self.bytes and node not in self.apart:
                pairs[node] = Quantisation.of_range(*ranges[root(node)])
        return pairs

    def _vectors(self, node: Node) -> Vectors:
        """How the bytes of each channel of a node stand for numbers."""
        if node in self.apart:
            scales, zeros = zip(*map(self._vectors, node.inputs), strict=True)
            return torch.cat(scales), torch.cat(zeros)
        scale, zero = self.pairs[node] if node in self.bytes else self._pair(node)
        channels = self._channels(node)
        make = {"dtype": torch.float64, "device": "cpu"}
        return torch.full((channels,), scale, **make), torch.full((channels,), float(zero), **make)

    def _pair(self, node: Node) -> Quantisation:
        """How the bytes are to stand for the node's numbers alone."""
        return Quantisation.of_range(*self.found.values[node].range())

    def _channels(self, node: Node) -> int:
        op = node.op
        if isinstance(op, ops.Conv):
            return len(op.weight)
        if isinstance(op, ops.Part):
            return op.channels
        if isinstance(op, ops.Cat):
            return sum(map(self._channels, node.inputs))
        return self._channels(node.inputs[0])

    def _affine(self, node: Node, to: Quantisation | None) -> Tensor:
        """What makes bytes of ``to``, or numbers, of the input's bytes, before a ReLU: [2, C]."""
        scale, shift = (t.double() for t in node.op.input_affine)
        own, zero = self._vectors(node.inputs[0])
        unit = 1.0 if to is None else to.scale
        return torch.stack([scale * own, shift - scale * own * zero]).div_(unit).float()

    def _add(self, op: Op, inputs: list[Node], layer: str, note: str = "") -> Node:
        self.nodes.append(Node(op, inputs, layer, note=note))
        return self.nodes[-1]

    def _as_numbers(self, node: Node) -> Node:
        if node not in self.bytes:
            return self.new[node]
        if node not in self.numbers:
            op = ops.Dequantise(tuple(self.pairs[node]))
            self.numbers[node] = self._add(op, [self.new[node]], node.layer)
        return self.numbers[node]

    def _as_bytes(self, node: Node, channels: int | None = None) -> tuple[Node, Quantisation]:
        if node in self.bytes:
            return self.new[node], self.pairs.get(node, Quantisation(1.0, 0))
        pair = self._pair(node)
        key = (node, channels)
        if key not in self.quantised:
            op = ops.Quantise(tuple(pair), channels)
            self.quantised[key] = self._add(op, [self.new[node]], node.layer)
        return self.quantised[key], pair

    def _rewritten(self, node: Node) -> Node:
        op = node.op
        if node in self.convs:
            rewrite = self._depthwise if op.is_depthwise else self._conv
            return rewrite(node)
        if node in self.bytes:
            inputs = [self.new[source] for source in node.inputs]
            return self._add(self._moved(node), inputs, node.layer)
        reads_bytes = bool(node.inputs) and node.inputs[0] in self.bytes
        if reads_bytes and isinstance(op, (ops.Mean, ops.Squeeze)):
            affine = None
            if getattr(op, "input_affine", None) is not None:
                affine = self._affine(node, None)
            kind = ops.QuantisedMean if isinstance(op, ops.Mean) else ops.QuantisedSqueeze
            pair = self.pairs.get(node.inputs[0], Quantisation(1.0, 0))
            return self._add(kind(tuple(pair), affine), [self.new[node.inputs[0]]], node.layer)
        if isinstance(op, ops.Sums):
            return self._add(op, [self.new[node.inputs[0]]], node.layer)
        inputs = [self._as_numbers(source) for source in node.inputs]
        note = why_not(node) if isinstance(op, ops.Conv) else ""
        return self._add(op, inputs, node.layer, self.floats.get(node, note))

    def _moved(self, node: Node) -> Op:
        """The op on bytes of one that computes nothing but pools."""
        op = node.op
        if isinstance(op, (ops.Pad, ops.SamePad)):
            return replace(op, fill=self.pairs[node].zero)
        if isinstance(op, ops.MaxPool):
            return ops.QuantisedMaxPool(op.window)
        if isinstance(op, ops.AvgPool):
            affine = None if op.input_affine is None else self._affine(node, self.pairs[node])
            return ops.QuantisedAvgPool(op.window, op.count_include_pad, op.divisor, affine)
        return op

    def _weights(self, node: Node) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes of the weight, their scales, and the bias; what quantising the weight moves the
        mean of a channel by is taken from that."""
        op = node.op
        weight, bias = fold(op.weight, op.bias, op.bn, torch.float64)
        weight = weight.detach()
        rounded, scale = quantise_weight(weight)
        lost = weight - rounded.double() * scale.double().view(-1, 1, 1, 1)
        mean = self.found.operand(node).mean
        per_channel = lost.sum((2, 3))
        moved = per_channel.flatten() * mean if op.is_depthwise else per_channel @ mean
        return rounded, scale, (bias + moved).float()

    def _conv(self, node: Node) -> Node:
        op, x = node.op, node.inputs[0]
        rounded, scale, bias = self._weights(node)
        image = x.inputs[0] if isinstance(x.op, (ops.Pad, ops.SamePad)) else x
        fills = isinstance(image.op, ops.Input) and rounded.shape[1] < QUAD
        source, pair = self._as_bytes(x, QUAD if fills else None)
        if fills:
            rounded = F.pad(rounded, (0, 0, 0, 0, 0, QUAD - rounded.shape[1]))
        operand = affine = residual_pair = None
        if op.input_affine is not None or "gate" in op.roles:
            operand = Quantisation.of_range(*self.found.operands[node].range())
        if op.input_affine is not None:
            affine = self._affine(node, operand)
        inputs = [source]
        for role, other in zip(op.roles[1:], node.inputs[1:], strict=True):
            if role == "residual":
                shortcut, residual_pair = self._as_bytes(other)
                inputs.append(shortcut)
            else:
                inputs.append(self._as_numbers(other))
        out = self.pairs[node] if node in self.bytes else None
        new = ops.QuantisedConv(
            rounded, scale, bias, op.stride, op.padding, op.dilation, op.act, tuple(pair),
            _plain(out), op.roles, _plain(operand), _plain(residual_pair), affine,
        )  # fmt: skip
        return self._add(new, inputs, node.layer)

    def _depthwise(self, node: Node) -> Node:
        op = node.op
        rounded, scale, bias = self._weights(node)
        source, pair = self._as_bytes(node.inputs[0])
        out = self.pairs.get(node)
        if out is None:  # nothing reads bytes of it
            self.bytes.add(node)
            out = self.pairs[node] = self._pair(node)
        new = ops.QuantisedDepthwise(
            rounded, scale, bias, op.stride, op.padding, op.act, tuple(pair), tuple(out), op.squeeze
        )
        return self._add(new, [source], node.layer)


def _plain(pair: Quantisation | None) -> tuple[float, int] | None:
    return None if pair is None else tuple(pair)
