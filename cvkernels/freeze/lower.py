"""From a graph to the steps of one input shape: which implementation runs each node.

What a chosen implementation does not take along becomes a step of its own before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from cvkernels import extension
from cvkernels.freeze import backends
from cvkernels.freeze.fuse import is_depthwise
from cvkernels.freeze.graph import Graph, Like, Node
from cvkernels.ops.common.native import DTYPES
from cvkernels.ops.depthwise_conv_bn_act import native as depthwise
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem

# Ops whose native implementation the steps call without the public function around it.
NATIVE = ("affine", "max_pool", "avg_pool", "mean", "se", "excite", "scale", "copy")
# Ops that write into memory that they are given.
WRITES = (
    "conv_pool", "scratch", "depthwise", "affine", "max_pool", "avg_pool", "se", "scale", "copy",
    "sums",
)  # fmt: skip


class Lowered:
    """Steps in order, with the :class:`Like` of each one's value.

    A step is a node whose attrs have ``backend``, the name of what runs it, and for a convolution
    its ``problem`` and ``implementation``; ``source`` is the graph's node.
    """

    def __init__(
        self, graph: Graph, values: dict[Node, Any], device: torch.device, table: Mapping[str, str]
    ) -> None:
        self.device = device
        self.table = table
        self.values: dict[Node, Any] = {}
        self.steps: list[Node] = []
        self.of: dict[Node, Node] = {}
        for node in graph.nodes:
            self._lower(node, values)
        if device.type == "cpu":
            self._pool_by_image(graph)
        self.results = [self.of[node] for node in graph.results]

    def _pool_by_image(self, graph: Graph) -> None:
        """Let a convolution and the max pool behind it run image by image.

        The map between the two is then as large as one image's, and still in the cache.
        """
        uses = graph.uses()
        for node in graph.nodes:
            pool = self.of[node]
            conv = pool.inputs[0] if pool.op == "max_pool" else pool
            if conv.op != "conv" or conv is pool or uses[node.inputs[0]] != 1:
                continue
            images, *size = self.values[conv].shape
            plain = conv.attrs["roles"] == ("x",) and self.writes(conv)
            if images < 2 or not plain or pool.attrs["backend"] != "native":
                continue
            image = Node("scratch", [], conv.layer, backend="native")
            one = replace(conv.attrs["problem"], N=1)
            step = Node("conv_pool", [*conv.inputs, image], conv.layer, **conv.attrs)
            step.attrs.update(roles=("x", "image"), window=pool.attrs["window"], problem=one)
            self.values[image] = Like((1, *size), self.values[conv].dtype)
            self.values[step] = self.values[pool]
            self.steps[self.steps.index(conv)] = image
            self.steps[self.steps.index(pool)] = step
            for reader in self.steps:
                reader.inputs = [step if source is pool else source for source in reader.inputs]
            self.of[node] = step

    def native(self, dtype: torch.dtype) -> bool:
        return self.device.type == "cpu" and dtype in DTYPES["cpu"][:3] and extension.has("cpu")

    def writes(self, step: Node) -> bool:
        """Whether the step writes its value into memory that it is given."""
        if step.op == "conv":
            return step.attrs["implementation"].writes
        if step.op in ("depthwise", "sums"):
            return step.attrs["backend"] == "native"
        if step.op == "mean":
            return step.attrs["input_affine"] is not None
        return step.op in WRITES

    def _emit(self, node: Node, value: Any, inputs: list[Node], **attrs: Any) -> Node:
        step = Node(node.op, inputs, node.layer, **{**node.attrs, **attrs})
        self.steps.append(step)
        self.values[step] = value
        return step

    def _lower(self, node: Node, values: dict[Node, Any]) -> None:
        value, inputs = values[node], [self.of[source] for source in node.inputs]
        if node.op == "conv":
            self.of[node] = self._conv(node, value, inputs)
            return
        backend = "torch"
        if node.op in (*NATIVE, "sums"):
            backend = "native" if self.native(value.dtype) else "cvkernels"
        if node.op == "sums":
            backend = inputs[0].attrs["backend"]
        extra = {"source": node}
        if node.op == "excite":
            x = self.values[inputs[0].inputs[0]]
            extra.update(sigmoid=True, count=x.shape[2] * x.shape[3])
            value = Like(value.shape, x.dtype)
        op = node.op
        if op == "cat" and len(value.shape) != 4:
            op = "concat"
        step = self._emit(node, value, inputs, backend=backend, **extra)
        step.op = op
        self.of[node] = step

    def _conv(self, node: Node, value: Like, inputs: list[Node]) -> Node:
        x = self.values[inputs[0]]
        problem = backends.problem_of(node, x)
        if is_depthwise(node) and (step := self._depthwise(node, value, inputs, x, problem)):
            return step
        chosen = backends.choose(problem, self.device, self.table)
        attrs = node.attrs
        if problem.has_prologue and not chosen.prologue:
            self._prologue(node, x, inputs)
            bare, problem = backends.without_prologue(node, problem)
            attrs = bare.attrs
        return self._emit(
            node, value, inputs, **attrs, problem=problem, source=node, backend=chosen.name,
            implementation=chosen,
        )  # fmt: skip

    def _prologue(self, node: Node, x: Like, inputs: list[Node]) -> None:
        """Emit what the convolution does to its input as steps of their own; changes inputs."""
        backend = "native" if self.native(x.dtype) else "cvkernels"
        if (affine := node.attrs["input_affine"]) is not None:
            step = Node("affine", [], node.layer, scale=affine[0], shift=affine[1], relu=True)
            inputs[0] = self._emit(step, x, inputs[:1], backend=backend)
        if "gate" in node.attrs["roles"]:
            gate = inputs.pop(node.attrs["roles"].index("gate"))
            # The step that multiplies by the gates applies their sigmoid.
            gate.attrs["sigmoid"] = False
            step = Node("scale", [], gate.layer)
            inputs[0] = self._emit(step, x, [inputs[0], gate], backend=backend)

    def _depthwise(
        self, node: Node, value: Like, inputs: list[Node], x: Like, problem: backends.Problem
    ) -> Node | None:
        """The step on the kernels for depthwise convolutions, where they have this one."""
        fields = {**vars(problem), "squeeze": node.attrs["squeeze"]}
        names = DepthwiseProblem.__dataclass_fields__
        problem = DepthwiseProblem(**{n: v for n, v in fields.items() if n in names})
        reason = depthwise.why_not(problem, self.device.type)
        if reason and self.device.type == "cpu" and not node.attrs["squeeze"]:
            return None
        backend = "cvkernels" if reason else "native"
        step = self._emit(node, value, inputs, problem=problem, backend=backend, source=node)
        step.op = "depthwise"
        return step
