"""From a graph to the steps of one input shape: which implementation runs each node.

What a chosen implementation does not take along becomes a step of its own before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cvkernels import extension
from cvkernels.freeze.graph import Graph, Node, Op, Step
from cvkernels.freeze.ops import Cat, Conv, MaxPool, PlannedConv
from cvkernels.ops.common.native import DTYPES


class Lowered:
    """Steps in order; ``of`` has the step of each node's value.

    What depends on several nodes is decided before the first step is made: ``planned`` has what
    runs each convolution; ``logits`` the nodes whose gates get their sigmoid in the step that
    multiplies by them; ``pooled`` the convolutions that run image by image with their max pool.
    """

    def __init__(
        self, graph: Graph, values: dict[Node, Any], device: torch.device, table: Mapping[str, str]
    ) -> None:
        self.device = device
        self.values = values
        joined = {part for node in graph.nodes if isinstance(node.op, Cat) for part in node.inputs}
        self.planned = {
            node: node.op.planned(values[node.inputs[0]], device, table, node in joined)
            for node in graph.nodes
            if isinstance(node.op, Conv)
        }
        self.logits = {
            node.role("gate")
            for node, planned in self.planned.items()
            if isinstance(planned, PlannedConv) and "gate" not in planned.roles
        }
        self.pooled = self._pooled(graph)
        self.steps: list[Step] = []
        self.of: dict[Node, Step] = {}
        for node in graph.nodes:
            self.of[node] = node.op.lower(node, self)
        self.results = [self.of[node] for node in graph.results]

    def _pooled(self, graph: Graph) -> set[Node]:
        uses, pooled = graph.uses(), set()
        for node in graph.nodes:
            if not isinstance(node.op, MaxPool) or uses[conv := node.inputs[0]] != 1:
                continue
            planned = self.planned.get(conv)
            alone = isinstance(planned, PlannedConv) and planned.roles == ("x",) and planned.writes
            native = self.backend(node.op, self.values[node].dtype) == "native"
            if alone and native and self.values[conv].shape[0] > 1:
                pooled.add(conv)
        return pooled

    def inputs(self, node: Node) -> list[Step]:
        return [self.of[source] for source in node.inputs]

    def backend(self, op: Op, dtype: torch.dtype) -> str:
        """What runs an op where nothing else is said."""
        if not op.runs_plans:
            return "torch"
        native = self.device.type == "cpu" and dtype in DTYPES["cpu"][:3] and extension.has("cpu")
        return "native" if native else "cvkernels"

    def emit(
        self,
        op: Op,
        node: Node,
        inputs: list[Step] | None = None,
        value: Any = None,
        backend: str = "",
    ) -> Step:
        """Add a step for ``node``, on its inputs and with its value if not said otherwise."""
        inputs = self.inputs(node) if inputs is None else inputs
        value = self.values[node] if value is None else value
        backend = backend or self.backend(op, getattr(value, "dtype", None))
        self.steps.append(Step(op, inputs, node.layer, backend, value, node))
        return self.steps[-1]
