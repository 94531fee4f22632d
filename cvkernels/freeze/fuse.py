"""Fusing: neighbouring nodes that one step computes become one node.

The weights are then those of the frozen model alone: folded in float64 and cast to its dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels.freeze.graph import Graph, Like, Node
from cvkernels.ops.common.activation import ACTIVATIONS
from cvkernels.ops.common.norm import BatchNormParams, fold

SE_ACTS = ("relu", "silu")


def fuse(graph: Graph, values: dict[Node, Like]) -> None:
    """Fuse the graph's nodes; ``values`` are theirs for the example's shape."""
    _Fuser(graph, values).run()


class _Fuser:
    """One pass in the order of the nodes: each looks back at what computes its inputs."""

    def __init__(self, graph: Graph, values: dict[Node, Like]) -> None:
        self.graph = graph
        self.values = values
        self.uses: Counter[Node] = graph.uses()
        self.before: dict[Node, list[Node]] = {}
        self.rules: dict[str, Callable[[Node], None]] = {
            "affine": self._affine,
            "act": self._act,
            "add": self._add,
            "mul": self._mul,
            "conv": self._conv,
            "avg_pool": self._avg_pool,
            "mean": self._mean,
        }

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op in self.rules:
                self.rules[node.op](node)
        nodes = []
        for node in self.graph.nodes:
            nodes += [*self.before.get(node, ()), node]
        self.graph.nodes = nodes
        self.graph.prune()

    def _only(self, node: Node, op: str) -> bool:
        """Whether node is such an op, and read once."""
        return node.op == op and self.uses[node] == 1

    def _absorb(self, node: Node, source: Node, **changes) -> None:
        """node computes what source does, changed; nobody reads source any more."""
        self.uses[source] = 0
        node.become(source, **changes)

    def _affine(self, node: Node) -> None:
        conv = node.inputs[0]
        if self._only(conv, "conv") and conv.attrs["scale"] is None and _is_plain(conv):
            self._absorb(node, conv, scale=node.attrs["scale"], shift=node.attrs["shift"])

    def _act(self, node: Node) -> None:
        source, act = node.inputs[0], node.attrs["act"]
        if self._only(source, "affine") and act == "relu" and not source.attrs["relu"]:
            self._absorb(node, source, relu=True)
        elif self._only(source, "conv") and source.attrs["act"] == "none" and act in ACTIVATIONS:
            self._absorb(node, source, act=act)
        elif self._only(source, "se") and source.attrs["out_act"] == "none" and act in SE_ACTS:
            if "residual" in source.attrs["roles"]:
                self._absorb(node, source, out_act=act)

    def _add(self, node: Node) -> None:
        """The operand that is computed last takes the other along as its shortcut."""
        order = {n: place for place, n in enumerate(self.graph.nodes)}
        operands = sorted(node.inputs, key=order.__getitem__, reverse=True)
        if operands[0] is operands[1]:
            return
        if (
            len({(self.values[operand].shape, self.values[operand].dtype) for operand in operands})
            > 1
        ):
            return
        for host, other in (operands, operands[::-1]):
            if host.op not in ("conv", "se") or self.uses[host] != 1 or not _is_plain(host):
                continue
            if host.op == "conv" and is_depthwise(host):
                continue
            self._absorb(node, host, roles=(*host.attrs["roles"], "residual"))
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
            node.op, node.inputs, node.layer = "se", [x], fc1.layer.rpartition(".")[0]
            node.attrs = {
                "roles": ("x",), "act": fc1.attrs["act"], "out_act": "none",
                "weight1": fc1.attrs["weight"], "bias1": fc1.attrs["bias"],
                "weight2": fc2.attrs["weight"], "bias2": fc2.attrs["bias"],
            }  # fmt: skip
            return

    def _excitation(self, x: Node, gate: Node) -> tuple[Node, Node] | None:
        """The two layers between the mean of x and its gate."""
        if not self._only(gate, "act") or gate.attrs["act"] != "sigmoid":
            return None
        fc2 = gate.inputs[0]
        if not self._only(fc2, "conv") or fc2.attrs["act"] != "none" or not _is_matrix(fc2):
            return None
        fc1 = fc2.inputs[0]
        if not self._only(fc1, "conv") or fc1.attrs["act"] not in SE_ACTS or not _is_matrix(fc1):
            return None
        mean = fc1.inputs[0]
        if not self._only(mean, "mean") or mean.attrs["input_affine"] is not None:
            return None
        return (fc1, fc2) if mean.inputs == [x] else None

    def _conv(self, node: Node) -> None:
        """What a 1x1 convolution can do to its input: a norm with ReLU, or the gates of SE."""
        if (
            not _is_1x1(node)
            or node.attrs["input_affine"] is not None
            or "gate" in node.attrs["roles"]
        ):
            return
        source = node.inputs[0]
        if self._only(source, "affine") and source.attrs["relu"]:
            node.attrs["input_affine"] = (source.attrs["scale"], source.attrs["shift"])
            node.inputs[0] = source.inputs[0]
            self.uses[source] = 0
            return
        if not self._only(source, "se") or source.attrs["roles"] != ("x",):
            return
        depthwise = source.inputs[0]
        if not self._only(depthwise, "conv") or not is_depthwise(depthwise):
            return
        depthwise.attrs["squeeze"] = True
        sums = Node("sums", [depthwise], source.layer)
        names = ("weight1", "bias1", "weight2", "bias2", "act")
        excite = Node("excite", [sums], source.layer, **{n: source.attrs[n] for n in names})
        # Where conv is absorbed later, what absorbs it comes after these all the same.
        self.before.setdefault(source, []).extend([sums, excite])
        node.inputs[0] = depthwise
        node.inputs.append(excite)
        node.attrs["roles"] = (*node.attrs["roles"], "gate")
        self.uses[depthwise] = 2
        self.uses[sums] = self.uses[excite] = 1
        self.uses[source] = 0

    def _avg_pool(self, node: Node) -> None:
        """A mean commutes with a 1x1 convolution: pool first, over fewer pixels comes the other."""
        source = node.inputs[0]
        window, divisor = node.attrs["window"], node.attrs["divisor"]
        swaps = self._only(source, "conv") and _is_1x1(source) and _is_plain(source)
        if swaps and source.attrs["roles"] == ("x",) and window[2] == (0, 0) and divisor is None:
            pool = Node("avg_pool", source.inputs, node.layer, **node.attrs)
            pool.attrs["input_affine"] = source.attrs["input_affine"]
            self._absorb(node, source, input_affine=None)
            node.inputs = [pool]
            self.before[node] = [pool]
            self.uses[pool] = 1
        else:
            self._mean(node)

    def _mean(self, node: Node) -> None:
        source = node.inputs[0]
        if self._only(source, "affine") and source.attrs["relu"]:
            node.attrs["input_affine"] = (source.attrs["scale"], source.attrs["shift"])
            node.inputs = list(source.inputs)
            self.uses[source] = 0


def _is_plain(node: Node) -> bool:
    """Whether nothing follows the convolution or squeeze-and-excitation yet."""
    act = node.attrs["out_act" if node.op == "se" else "act"]
    return act == "none" and "residual" not in node.attrs["roles"]


def _is_1x1(conv: Node) -> bool:
    a = conv.attrs
    return (
        tuple(a["weight"].shape[2:]) == tuple(a["stride"]) == (1, 1)
        and tuple(a["padding"]) == (0, 0)
        and a["groups"] == 1
    )


def _is_matrix(conv: Node) -> bool:
    return (
        _is_1x1(conv)
        and conv.attrs["scale"] is None
        and conv.attrs["roles"] == ("x",)
        and conv.attrs["input_affine"] is None
    )


def is_depthwise(conv: Node) -> bool:
    channels = conv.attrs["weight"].shape[0]
    return conv.attrs["weight"].shape[1] == 1 and 1 < channels == conv.attrs["groups"]


def own_weights(graph: Graph, dtype: torch.dtype, device: torch.device) -> None:
    """Give every node tensors of its own in ``dtype``; norms are folded into convolutions.

    A depthwise convolution keeps its norm, which its kernel applies for nothing.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def cast(tensor: Tensor | None, kind: torch.dtype = dtype) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().to(device, kind, copy=True).contiguous()

    for node in graph.nodes:
        attrs = node.attrs
        if node.op == "conv" and not is_depthwise(node):
            bn = None if attrs["scale"] is None else BatchNormParams(attrs["scale"], attrs["shift"])
            if bn is None:
                weight, bias = cast(attrs["weight"]), cast(attrs["bias"])
            else:
                weight, bias = fold(attrs["weight"], attrs["bias"], bn, dtype)
            attrs.update(weight=weight.contiguous(), bias=bias, scale=None, shift=None)
        elif node.op in ("affine", "conv"):
            for name in ("scale", "shift"):
                attrs[name] = cast(attrs[name], wide)
            if node.op == "conv":
                attrs.update(weight=cast(attrs["weight"]), bias=cast(attrs["bias"]))
        for name in ("weight", "bias", "weight1", "bias1", "weight2", "bias2"):
            if name in attrs and node.op != "conv":
                attrs[name] = cast(attrs[name])
        if attrs.get("input_affine") is not None:
            attrs["input_affine"] = tuple(cast(vector, wide) for vector in attrs["input_affine"])
        if node.op == "call":
            _cast_module(attrs, dtype)


def _cast_module(attrs: dict, dtype: torch.dtype) -> None:
    target = attrs["target"]
    if isinstance(target, torch.nn.Module):
        attrs["target"] = target.to(dtype)
