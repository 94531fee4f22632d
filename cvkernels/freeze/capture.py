"""A model's computation as a graph: traced by torch.fx, its nodes put into the graph's own ops.

Modules are traced down to those of torch.nn. One that torch.fx cannot see through, that has hooks,
or that the graph has no op for stays a call; its copy runs as it is.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, jit, nn
from torch.fx.node import map_aggregate

from cvkernels.freeze import aliasing
from cvkernels.freeze.aliasing import AsWritten, Region, Span, is_size
from cvkernels.freeze.convert import CALLABLES, convert_call, convert_module
from cvkernels.freeze.graph import Graph, Node, Op, Ref, mapped
from cvkernels.freeze.lock import ForkSafeLock
from cvkernels.freeze.ops import Call, Input
from cvkernels.memory_use import out_of_memory
from cvkernels.nn.fused.watched import has_hooks, why_altered, why_replaced
from cvkernels.tables import first_line

# torch.fx replaces nn.Module's methods while it traces. Two traces that overlap in time would each
# put back what they found.
_one_trace = ForkSafeLock()

# What torch.fx would trace into, and the graph knows as one op or as none.
WHOLE = {
    ("timm.layers.norm_act", "BatchNormAct2d"),
    ("timm.layers.conv2d_same", "Conv2dSame"),
    ("timm.layers.drop", "DropPath"),
    ("timm.models._efficientnet_blocks", "DropPath"),
    ("torchvision.ops.stochastic_depth", "StochasticDepth"),
    ("cvkernels.nn.stochastic_depth", "StochasticDepth"),
    ("cvkernels.nn.stochastic_depth", "DropPath"),
}

# What takes sizes of the map as arguments.
SIZED = ("view", "reshape")


class CaptureError(ValueError):
    """No one graph stands for the model; the message names the module, why, and the way out."""


class _Tracer(fx.Tracer):
    """Traces into modules; a child that cannot be traced is a call of its own.

    What other threads do meanwhile, with the same modules or others, comes here as well, and is
    none of the trace.
    """

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(), param_shapes_constant=False)
        self.thread = threading.get_ident()
        self.opaque: dict[str, str] = {}
        # The innermost modules that drew random numbers while they were traced.
        self.draws: list[str] = []

    # A buffer that forward writes is the model's own.
    proxy_buffer_attributes = True

    def create_args_for_root(self, root_fn: Callable, is_module: bool, *rest: Any) -> tuple:
        """One stand-in for an image, where forward takes any number of them."""
        code = inspect.unwrap(root_fn).__code__
        if code.co_argcount == 1 and code.co_flags & inspect.CO_VARARGS:
            return super().create_args_for_root(lambda m, x: root_fn(m, x), is_module, *rest)
        return super().create_args_for_root(root_fn, is_module, *rest)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return aliasing.Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = (type(m).__module__, type(m).__name__)
        return kind in WHOLE or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        # torch.fx records an attribute where it is first read, and that must not be taken back.
        map_aggregate((args, kwargs), lambda leaf: getattr(leaf, "node", None))
        nodes = list(self.graph.nodes)
        stack = self.module_stack.copy()
        drawn, draws = torch.get_rng_state(), len(self.draws)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if len(self.draws) == draws and not torch.equal(torch.get_rng_state(), drawn):
                self.draws.append(self.path_of_module(m))
            return result
        # Whatever a module does with a stand-in that is no tensor: the module itself still works.
        except Exception as error:  # noqa: BLE001
            torch.set_rng_state(drawn)
            del self.draws[draws:]
            self.module_stack.clear()
            self.module_stack.update(stack)
            for node in reversed(list(self.graph.nodes)[len(nodes) :]):
                self.graph.erase_node(node)
            name = self.path_of_module(m)
            self.opaque[name] = f"torch.fx cannot trace it: {first_line(error)}"
            return self.create_proxy("call_module", name, args, kwargs)


def capture(model: nn.Module, dtype: torch.dtype | None = None) -> Graph:
    """The graph of ``model(x)`` in eval; the model is read and not changed.

    Parameters and buffers that the forward itself uses are converted to ``dtype``, as ``model.to``
    would.

    Raises:
        CaptureError: the model is scripted, or its own forward decides by the data or takes several
            tensors; a module writes parameters or buffers, draws random numbers that do not depend
            on its input, or has to be called as it is and cannot be copied.
    """
    if isinstance(model, jit.ScriptModule):
        raise CaptureError(
            f"freeze: the model is a {type(model).__name__}: it is scripted, and TorchScript "
            f"cannot be traced; freeze the model before scripting it, or wrap it in a module, "
            f"which calls it as it is"
        )
    if extra := [name for name, p in _options(model) if p.default is p.empty]:
        raise CaptureError(
            f"freeze: {_named(model)} takes {', '.join(extra)} besides the images, and a frozen "
            f"model takes one tensor; wrap the model in a module that takes one"
        )
    with _one_trace, _unchanged(model):
        drawn = torch.get_rng_state()
        tracer, replaced = _Tracer(), why_replaced()
        traced = _traced(model, tracer)
        _refuse_draws(model, drawn, *tracer.draws[:1])
        return _Reader(model, tracer, dtype, replaced).read(traced)


def _traced(model: nn.Module, tracer: _Tracer) -> fx.Graph:
    defaults = {name: p.default for name, p in _options(model)}
    try:
        return tracer.trace(model, defaults)
    # A forward may do anything with a proxy; all of it means the same.
    except Exception as error:  # noqa: BLE001
        called = "; ".join(f"{name!r}, {why}" for name, why in tracer.opaque.items())
        raise CaptureError(
            f"freeze: {_named(model)} cannot be captured: {first_line(error)}. Its control flow "
            f"depends on the input's values, or on what a child returns that freeze calls as it is "
            f"({called or 'none here'}); move that into a child module, which is called as it is, "
            f"or freeze the part of the model around it"
        ) from error


def _refuse_draws(model: nn.Module, drawn: Tensor, path: str = "") -> None:
    """Refuse random numbers that were drawn since the generator had the state ``drawn``."""
    if torch.equal(torch.get_rng_state(), drawn):
        return
    torch.set_rng_state(drawn)
    raise CaptureError(
        f"freeze: {_named(model, path)} draws random numbers whatever its input, which would be "
        f"the same in each call of a frozen model; give them a size of the input's, as in "
        f"torch.rand_like(x), or freeze the part of the model around it"
    )


def _named(model: nn.Module, path: str = "") -> str:
    """How an error names the forward of the module at that path."""
    forward = f"{type(model.get_submodule(path)).__name__}.forward"
    return f"{forward} at {path!r}" if path else forward


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Take back what tracing sets on the modules: stand-ins of tensors, and constants."""
    dicts = []
    for module in model.modules():
        if isinstance(module, jit.ScriptModule):
            continue  # is not traced into
        tables = (module._parameters, module._buffers, module._modules)
        dicts += [module.__dict__, *tables]
    before = [dict(attributes) for attributes in dicts]
    try:
        yield
    finally:
        for now, then in zip(dicts, before, strict=True):
            # One by one: another thread may call the modules, and finds each attribute.
            for key in now.keys() - then.keys():
                now.pop(key, None)
            if any(now.get(key) is not then[key] for key in then):
                now.update(then)
            if [key for key in list(now) if key in then] != list(then):  # one had been deleted
                now.clear()
                now.update(then)


def _options(model: nn.Module) -> list[tuple[str, inspect.Parameter]]:
    """The parameters that forward names, but for the first."""
    parameters = list(inspect.signature(model.forward).parameters.items())[1:]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [(name, p) for name, p in parameters if p.kind not in several]


class _Reader:
    """Puts the nodes of torch.fx into a graph's."""

    def __init__(
        self, model: nn.Module, tracer: _Tracer, dtype: torch.dtype | None, replaced: str
    ) -> None:
        self.model = model
        self.tracer = tracer
        self.dtype = dtype
        # Which code of PyTorch's is not its own: then every call stays as it is.
        self.replaced = replaced
        self.nodes: list[Node] = []
        # What each node of torch.fx stands for: a Node, a value, or a structure of them.
        self.values: dict[fx.Node, Any] = {}
        self.copies: dict[int, nn.Module] = {}
        self.modules = aliasing.Modules(model.get_submodule, tracer.opaque)

    def read(self, traced: fx.Graph) -> Graph:
        spans = aliasing.spans_of(traced, self.modules)
        span_of = {node: span for span in spans for node in span.nodes}
        for node in traced.nodes:
            if node.op == "output":
                break
            if (span := span_of.get(node)) is None:
                self.values[node] = self._value_of(node)
            elif node is span.nodes[-1]:
                self._region(span)
        results: list[Node] = []

        def refer(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return mapped(refer, self.values[leaf])
            if isinstance(leaf, Node):
                if leaf not in results:
                    results.append(leaf)
                return Ref(results.index(leaf))
            return leaf

        graph = Graph(self.nodes, results, mapped(refer, node.args[0]))
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
            return self._constant(value) if isinstance(value, Tensor) else value
        args, kwargs = (mapped(self._resolve, part) for part in (node.args, node.kwargs))
        layer = self._layer(node)
        if node.op == "call_module":
            return self._module(node, layer, args, kwargs)
        if hasattr(node.target, "_fields") and not kwargs:
            return node.target(*args)  # a named tuple, which torch.fx makes a call of
        is_method = node.op == "call_method"
        name = node.target if is_method else CALLABLES.get(node.target, "")
        in_place = self._writes(node)
        # A size is no value of the graph's, and a window that depends on one no option of its ops.
        sized = is_size(node) or (name not in SIZED and any(map(is_size, self._rest(node))))
        value = None
        if not sized and not self.replaced:
            value = convert_call(partial(self.emit, layer=layer), name, args, kwargs)
        if value is None:
            kind = "method" if is_method else "function"
            value = self._call(kind, node.target, layer, args, kwargs, in_place)
        if in_place and aliasing.returns_what_it_writes(node, self.modules):
            self._rename(node, value)
        return value

    def _constant(self, value: Tensor) -> Tensor:
        floats = self.dtype is not None and value.is_floating_point()
        return value.detach().clone().to(self.dtype if floats else value.dtype)

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
        plain = layer not in self.tracer.opaque and not self.replaced and not why_altered(module)
        if plain and not kwargs:
            value = convert_module(partial(self.emit, layer=layer), module, *args)
        in_place = self._writes(node)
        if value is None:
            value = self._call("module", self._twin(module), layer, args, kwargs, in_place)
        if in_place and aliasing.returns_what_it_writes(node, self.modules):
            self._rename(node, value)
        return value

    def _twin(self, module: nn.Module) -> nn.Module:
        """A copy: the model may train on, and the frozen one keeps the module as it is now."""
        if id(module) not in self.copies:
            try:
                self.copies[id(module)] = copy.deepcopy(module)
            # Whatever a module holds, and does in its own __deepcopy__.
            except Exception as error:  # noqa: BLE001
                if out_of_memory(error):
                    raise
                path = next(path for path, m in self.model.named_modules() if m is module)
                why = self.tracer.opaque.get(path, "freeze has no op for it")
                raise CaptureError(
                    f"freeze: {_named(self.model, path)} is called as it is ({why}), and cannot be "
                    f"copied for that: {first_line(error)}; give the module a __deepcopy__, or "
                    f"freeze the part of the model around it"
                ) from error
        return self.copies[id(module)]

    def _writes(self, node: fx.Node) -> bool:
        """Whether a call writes, or may write, its first argument in place.

        Raises:
            CaptureError: it writes a parameter or buffer, which would change the model.
        """
        written = aliasing.writes(node, self.modules)
        for target in written:
            if target.op == "get_attr":
                where = _named(self.model, self._layer(node))
                raise CaptureError(
                    f"freeze: {where} writes {target.target!r} in place, and a frozen model has no "
                    f"state; compute a new value in place of it, or freeze the part around it"
                )
        return bool(written)

    def _region(self, span: Span) -> None:
        """Emit one call of what has to run as it is written, and the parts of its result."""
        for node in span.nodes:
            self._writes(node)
        sources = [s for node in span.nodes for s in node.all_input_nodes]
        sources = [s for s in dict.fromkeys(sources) if s not in span.nodes]
        places = {node: place for place, node in enumerate([*sources, *span.nodes])}
        inputs = tuple(self.values[source] for source in sources)
        copied = [places[source] for source in sources if source in span.written]
        results = [places[node] for node in span.results]
        calls = [self._as_written(node, places) for node in span.nodes]
        layer = self._layer(span.nodes[-1])
        region = Region(calls, copied, results, any(map(aliasing.expands, span.nodes)))
        values = self._call("function", region, layer, inputs, {}, False)
        for number, node in enumerate(span.results):
            args = (values, number)
            self.values[node] = self._call("function", operator.getitem, layer, args, {}, False)

    def _as_written(self, node: fx.Node, places: dict[fx.Node, int]) -> AsWritten:
        def refer(leaf: Any) -> Any:
            return Ref(places[leaf]) if isinstance(leaf, fx.Node) else leaf

        args, kwargs = (mapped(refer, part) for part in (node.args, node.kwargs))
        target = node.target
        if node.op == "call_module":
            target = self._twin(self.model.get_submodule(target))
        written = [places[source] for source in aliasing.writes(node, self.modules)]
        return AsWritten(node.op == "call_method", target, args, kwargs, written)

    @staticmethod
    def _rest(node: fx.Node) -> list[fx.Node]:
        """What a call refers to beside its first argument."""
        first = node.args[0] if node.args else None
        return [source for source in node.all_input_nodes if source is not first]

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

        args, kwargs = (mapped(refer, part) for part in (args, kwargs))
        # Maps are channels_last here, where stock's may be contiguous.
        target = "reshape" if target == "view" else target
        if not inputs:
            # Nothing in it depends on the input: it is a constant.
            drawn = torch.get_rng_state()
            with torch.no_grad():
                value = Call(kind, target, args, kwargs, False).function()([])
            _refuse_draws(self.model, drawn, layer)
            return value
        return self.emit(Call(kind, target, args, kwargs, in_place), inputs, layer)
