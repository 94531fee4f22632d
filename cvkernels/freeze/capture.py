"""A model's computation as a graph: traced by torch.fx, its nodes put into the graph's own ops.

Modules are traced down to those of torch.nn. One that torch.fx cannot see through, that has hooks,
or that the graph has no op for stays a call; its copy runs as it is.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from cvkernels.freeze.convert import CALLABLES, convert_call, convert_module
from cvkernels.freeze.graph import Graph, Node, Op, Ref
from cvkernels.freeze.ops import Call, Input
from cvkernels.nn.fused.watched import has_hooks
from cvkernels.tables import first_line

# What torch.fx would trace into, and the graph knows as one op or as none.
WHOLE = {
    ("timm.layers.norm_act", "BatchNormAct2d"),
    ("timm.layers.drop", "DropPath"),
    ("timm.models._efficientnet_blocks", "DropPath"),
    ("torchvision.ops.stochastic_depth", "StochasticDepth"),
    ("cvkernels.nn.stochastic_depth", "StochasticDepth"),
    ("cvkernels.nn.stochastic_depth", "DropPath"),
}


class CaptureError(ValueError):
    """The model's control flow depends on its input, so that no one graph stands for it."""


class _Tracer(fx.Tracer):
    """Traces into modules; a child that cannot be traced is a call of its own."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(), param_shapes_constant=False)
        self.opaque: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = (type(m).__module__, type(m).__name__)
        return kind in WHOLE or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        nodes = list(self.graph.nodes)
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        # Whatever a module does with a stand-in that is no tensor: the module itself still works.
        except Exception as error:  # noqa: BLE001
            self.module_stack.clear()
            self.module_stack.update(stack)
            for node in reversed(list(self.graph.nodes)[len(nodes) :]):
                self.graph.erase_node(node)
            name = self.path_of_module(m)
            self.opaque[name] = f"torch.fx cannot trace it: {first_line(error)}"
            return self.create_proxy("call_module", name, args, kwargs)


def capture(model: nn.Module) -> Graph:
    """The graph of ``model(x)`` in eval; the model is read and not changed.

    Raises:
        CaptureError: the top-level forward decides by the data, or takes several tensors.
    """
    tracer = _Tracer()
    kind = type(model).__name__
    try:
        traced = tracer.trace(model, _defaults(model))
    # A forward may do anything with a proxy; all of it means the same.
    except Exception as error:  # noqa: BLE001
        raise CaptureError(
            f"freeze: {kind}.forward cannot be captured: {first_line(error)}. Its control flow "
            f"depends on the input's values, or it is no function of one tensor; move that into a "
            f"child module, which freeze calls as it is, or freeze the part of the model around it"
        ) from error
    return _Reader(model, tracer).read(traced)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The default of every parameter of forward but the first."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


class _Reader:
    """Puts the nodes of torch.fx into a graph's."""

    def __init__(self, model: nn.Module, tracer: _Tracer) -> None:
        self.model = model
        self.tracer = tracer
        self.nodes: list[Node] = []
        # What each node of torch.fx stands for: a Node, a value, or a structure of them.
        self.values: dict[fx.Node, Any] = {}
        self.copies: dict[int, nn.Module] = {}

    def read(self, traced: fx.Graph) -> Graph:
        for node in traced.nodes:
            if node.op == "output":
                break
            self.values[node] = self._value_of(node)
        results: list[Node] = []

        def refer(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return refer(self.values[value])
            if isinstance(value, Node):
                if value not in results:
                    results.append(value)
                return Ref(results.index(value))
            return _mapped(refer, value)

        graph = Graph(self.nodes, results, refer(node.args[0]))
        graph.prune()
        return graph

    def emit(self, op: Op, inputs: list[Node], layer: str = "") -> Node:
        self.nodes.append(Node(op, inputs, layer))
        return self.nodes[-1]

    def _value_of(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if not self.nodes:
                return self.emit(Input(), [])
            return node.args[0] if node.args else None
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(self.model)
            return value.detach().clone() if isinstance(value, Tensor) else value
        args, kwargs = (map_aggregate(part, self._resolve) for part in (node.args, node.kwargs))
        layer = self._layer(node)
        if node.op == "call_module":
            return self._module(node, layer, args, kwargs)
        if hasattr(node.target, "_fields") and not kwargs:
            return node.target(*args)  # a named tuple, which torch.fx makes a call of
        is_method = node.op == "call_method"
        name = node.target if is_method else CALLABLES.get(node.target, "")
        in_place = _writes_in_place(node, kwargs)
        value = convert_call(partial(self.emit, layer=layer), name, args, kwargs)
        if value is None:
            kind = "method" if is_method else "function"
            value = self._call(kind, node.target, layer, args, kwargs, in_place)
        if in_place:
            self._rename(node, value)
        return value

    def _resolve(self, leaf: Any) -> Any:
        return self.values[leaf] if isinstance(leaf, fx.Node) else leaf

    def _rename(self, node: fx.Node, value: Any) -> None:
        """After an in-place op, readers of its argument read its result."""
        written = self.values[node.args[0]]
        for other, current in self.values.items():
            if current is written:
                self.values[other] = value

    def _layer(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return node.target
        stack = node.meta.get("nn_module_stack") or {}
        names = [path for path, _ in stack.values()]
        return names[-1] if names else ""

    def _module(self, node: fx.Node, layer: str, args: tuple, kwargs: dict) -> Any:
        module = self.model.get_submodule(layer)
        value = None
        if layer not in self.tracer.opaque and not has_hooks(module) and not kwargs:
            value = convert_module(partial(self.emit, layer=layer), module, *args)
        in_place = bool(getattr(module, "inplace", False)) and type(module) is not nn.Dropout
        if value is None:
            # The model may train on: the frozen one keeps the module as it is now.
            if id(module) not in self.copies:
                self.copies[id(module)] = copy.deepcopy(module)
            twin = self.copies[id(module)]
            value = self._call("module", twin, layer, args, kwargs, in_place)
        if in_place:
            self._rename(node, value)
        return value

    def _call(
        self, kind: str, target: Any, layer: str, args: tuple, kwargs: dict, in_place: bool
    ) -> Any:
        inputs: list[Node] = []

        def refer(leaf: Any) -> Any:
            if not isinstance(leaf, Node):
                return leaf
            if leaf not in inputs:
                inputs.append(leaf)
            return Ref(inputs.index(leaf))

        args, kwargs = (_plain(map_aggregate(part, refer)) for part in (args, kwargs))
        if not inputs:
            # Nothing in it depends on the input: it is a constant.
            with torch.no_grad():
                return Call(kind, target, args, kwargs, False).function()([])
        return self.emit(Call(kind, target, args, kwargs, in_place), inputs, layer)


def _writes_in_place(node: fx.Node, kwargs: dict) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    name = getattr(node.target, "__name__", "")
    module = getattr(node.target, "__module__", "")
    if module == "_operator":
        return name in ("iadd", "imul", "isub", "itruediv")
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def _plain(value: Any) -> Any:
    """torch.fx's immutable lists and dicts as Python's own."""
    return _mapped(_plain, value)


def _mapped(function: Callable, value: Any) -> Any:
    """value with function applied to its parts, where it is a plain container."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return (tuple if isinstance(value, tuple) else list)(map(function, value))
    if isinstance(value, dict):
        return {key: function(part) for key, part in value.items()}
    return value
