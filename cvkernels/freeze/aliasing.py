"""Which values of a traced model share memory, and which of its calls must run as they are written.

torch.fx records calls. One that writes in place changes every value that shares memory with the one
that it writes: what it is a view of, and the views of that. Where none of these is read later, the
call is one that returns its result, and readers of the written value read that. Elsewhere the calls
from the first view to the last write are one :class:`Region`, which runs them as PyTorch would.

Nothing is assumed of a call that is not known: it may return a view of any of its arguments. A
module that is not traced, or has a hook or another ``forward``, may write them, too, and return
something else than what it writes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cvkernels.freeze.graph import fill
from cvkernels.nn.fused.watched import why_altered
from cvkernels.ops.common.aliasing import one_storage
from cvkernels.ops.common.norm import BATCH_NORMS

# Methods, attributes and functions whose result is no tensor of a map's memory: sizes and the like.
_SIZES = frozenset(
    "size shape dim ndim ndimension numel nelement stride dtype device is_cuda __len__".split()
)
_MATHS = frozenset("add sub mul truediv floordiv mod pow neg eq ne lt le gt ge matmul".split())
# Functions and methods whose result is new memory, whatever they are called with.
_NEW = _MATHS | frozenset(
    "div rsub exp log sqrt rsqrt square abs sign reciprocal mean sum prod amax amin max min argmax "
    "argmin var std norm softmax log_softmax sigmoid tanh relu relu6 silu gelu hardswish "
    "hardsigmoid hardtanh elu leaky_relu mish softplus clamp clamp_min clamp_max where mm bmm "
    "addmm linear conv1d conv2d batch_norm layer_norm group_norm max_pool2d avg_pool2d "
    "adaptive_avg_pool2d adaptive_max_pool2d interpolate cat concat concatenate stack clone "
    "zeros_like ones_like full_like".split()
)
_EXPANDING = {"expand", "expand_as", "broadcast_to"}
_NEW_MODULES = (
    nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, *BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.Linear,
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.Mish, nn.Tanh,
    nn.ELU, nn.LeakyReLU, nn.Softmax, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)  # fmt: skip
# torch.nn.functional's dispatchers of pools do not carry their names.
_NAMES = {
    F.max_pool2d: "max_pool2d", F.adaptive_max_pool2d: "adaptive_max_pool2d",
    F.avg_pool2d: "avg_pool2d",
}  # fmt: skip
_IN_PLACE_OPERATORS = {
    f"__i{name}__": getattr(operator, f"i{name}")
    for name in "add sub mul truediv floordiv mod pow matmul and or xor".split()
}


class Proxy(fx.Proxy):
    """A stand-in whose ``+=`` and the like are recorded, which torch.fx takes for ``+``."""

    @property
    def data(self) -> fx.Proxy:
        return fx.proxy.Attribute(self, "data")

    @data.setter
    def data(self, value: Any) -> None:
        raise TypeError("an assignment to .data cannot be recorded")


def _in_place(function: Callable) -> Callable:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name, _function in _IN_PLACE_OPERATORS.items():
    setattr(Proxy, _name, _in_place(_function))


class Region:
    """Calls that run one after the other as they are written, on copies of what they write.

    ``calls`` are functions of a list: the region's inputs and the results so far. ``copied`` are
    the inputs that are written, ``results`` the places in the list of what is returned. What
    ``may_raise``, as PyTorch does where expanded memory is written, runs even if nothing reads it.
    """

    def __init__(
        self, calls: list[AsWritten], copied: list[int], results: list[int], may_raise: bool
    ) -> None:
        self.calls, self.copied, self.results = calls, frozenset(copied), results
        self.may_raise = may_raise

    def __call__(self, *inputs: Any) -> tuple:
        # As stock has its maps: whether a flattened one is a view depends on it.
        values = [
            x.clone(memory_format=torch.contiguous_format)
            if place in self.copied and isinstance(x, Tensor)
            else x
            for place, x in enumerate(inputs)
        ]
        copies: list[tuple[Tensor, Tensor]] = []
        for call in self.calls:
            values.append(call(values))
            viewed = fill(call.args[:1], values)
            if call.views and not one_storage(*viewed, values[-1]):
                copies.append((*viewed, values[-1]))
            for place in call.written if copies else ():
                _spread(values[place], copies)
        return tuple(values[place] for place in self.results)


def _spread(written: Any, copies: list[tuple[Tensor, Tensor]]) -> None:
    """Write to both of a map and the copy that stands for a view of it, where one was written:
    ``view`` is one in stock, and cannot be where the map is laid out otherwise here."""
    changed = [written] if isinstance(written, Tensor) else []
    for tensor in changed:
        for pair in copies:
            for source, other in (pair, pair[::-1]):
                done = any(one_storage(other, t) for t in changed)
                if one_storage(source, tensor) and not done:
                    other.copy_(source.reshape(other.shape))
                    changed.append(other)


class AsWritten:
    """A call of a function, method or module on what its arguments refer to in a list of values.

    ``written`` are the places of what it may write; ``views`` says that its result is a view of its
    first argument in stock, and may be a copy here.
    """

    def __init__(
        self, is_method: bool, target: Any, args: tuple, kwargs: dict, written: list[int]
    ) -> None:
        self.views = target == "view"
        # Maps are channels_last here, where stock's may be contiguous.
        self.is_method, self.target = is_method, "reshape" if self.views else target
        self.args, self.kwargs, self.written = args, kwargs, written

    def __call__(self, values: list) -> Any:
        args, kwargs = fill(self.args, values), fill(self.kwargs, values)
        if self.is_method:
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


class Span(NamedTuple):
    """The calls of a region from the first to the last place in the graph, in order.

    ``groups`` are what may share memory and is written there, ``written`` the values of other calls
    that are, ``results`` the values that are read behind the last place.
    """

    first: int
    last: int
    groups: set[int]
    nodes: list[fx.Node]
    written: set[fx.Node]
    results: list[fx.Node]


class Modules(NamedTuple):
    """The modules that a traced graph calls, by name, and the names of those not traced into."""

    get: Callable[[str], nn.Module]
    opaque: Collection[str]

    def may_write(self, name: str) -> bool:
        """Whether code that nobody has looked at runs there, which may write what it is given."""
        return name in self.opaque or bool(why_altered(self.get(name)))


def spans_of(graph: fx.Graph, modules: Modules) -> list[Span]:
    """The regions of a traced graph, none where every write can be a call that returns a value."""
    memory = _Memory(graph, modules)
    spans: list[Span] = []
    waiting = [{group} for group in memory.unsafe_groups()]
    while waiting:
        span = memory.span(waiting.pop())
        # What it has to do with runs within it, in order: other writes, and overlapping spans.
        meets = [other for other in spans if other.first <= span.last and span.first <= other.last]
        groups = span.groups.union(memory.written_within(span), *[other.groups for other in meets])
        if groups == span.groups:
            spans.append(span)
        else:
            spans = [other for other in spans if other not in meets]
            waiting.append(groups)
    return spans


def writes(node: fx.Node, modules: Modules) -> tuple[fx.Node, ...]:
    """The values that a call writes in place, or may write."""
    if node.op == "call_module" and modules.may_write(node.target):
        sources = node.all_input_nodes
        return tuple(s for s in sources if s.op != "get_attr" and not is_size(s))
    written = (node.kwargs["out"],) if isinstance(node.kwargs.get("out"), fx.Node) else ()
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node) or is_size(target):
        return written
    if node.op == "call_module":
        module = modules.get(node.target)
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
        writes_target = bool(getattr(module, "inplace", False)) and not drops
    elif node.op == "call_method":
        writes_target = node.target.endswith("_") and not node.target.endswith("__")
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        writes_target = (
            node.target in _IN_PLACE_OPERATORS.values()
            or node.target is operator.setitem
            or bool(node.kwargs.get("inplace"))
            or (name.endswith("_") and not name.endswith("__"))
        )
    else:
        writes_target = False
    return (target, *written) if writes_target else written


def returns_what_it_writes(node: fx.Node, modules: Modules) -> bool:
    """Whether the result of a call is its first argument, which it writes, and nothing else is."""
    if node.op == "call_module" and modules.may_write(node.target):
        return False
    return writes(node, modules) == node.args[:1]


def is_size(value: Any) -> bool:
    """Whether a value is made of sizes alone, so that it is no tensor."""
    if not isinstance(value, fx.Node):
        return not isinstance(value, Tensor)
    if value.op == "call_method":
        return value.target in _SIZES or all(map(is_size, value.all_input_nodes))
    if value.op != "call_function":
        return False
    if value.target is getattr:
        return value.args[1] in _SIZES
    if getattr(value.target, "__name__", "") in _SIZES:
        return True
    inputs = value.all_input_nodes
    computes = value.target in (operator.getitem, *_IN_PLACE_OPERATORS.values()) or (
        getattr(value.target, "__module__", "") in ("_operator", "math", "builtins")
    )
    return bool(inputs) and computes and all(map(is_size, inputs))


def expands(node: fx.Node) -> bool:
    """Whether elements of a call's result may share memory."""
    return _called(node) in _EXPANDING


def _called(node: fx.Node) -> str:
    """The name of the method or function that a node calls."""
    return node.target if node.op == "call_method" else getattr(node.target, "__name__", "")


class _Memory:
    """The groups of a graph's values that may share memory, by a number each."""

    def __init__(self, graph: fx.Graph, modules: Modules) -> None:
        self.nodes = list(graph.nodes)
        self.modules = modules
        self.place = {node: place for place, node in enumerate(self.nodes)}
        self.parent = list(range(len(self.nodes)))
        self.new: set[fx.Node] = set()
        self.writes: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in self.nodes:
            self._join(node)
        self.members: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            self.members.setdefault(self.group(node), []).append(node)

    def _join(self, node: fx.Node) -> None:
        written = writes(node, self.modules)
        if written:
            self.writes[node] = written
            shared: Iterable[fx.Node] = written
        elif node.op in ("placeholder", "get_attr", "output") or self._is_new(node):
            self.new.add(node)
            return
        else:
            shared = [source for source in node.all_input_nodes if not is_size(source)]
            if not shared:
                self.new.add(node)
        for source in shared:
            self.parent[self.group(source)] = self.group(node)

    def _is_new(self, node: fx.Node) -> bool:
        if is_size(node):
            return True
        if node.op == "call_module":
            module = self.modules.get(node.target)
            return type(module) in _NEW_MODULES
        if node.op == "call_method":
            return node.target in _NEW
        return _NAMES.get(node.target, getattr(node.target, "__name__", "")) in _NEW

    def group(self, node: fx.Node) -> int:
        place = self.place[node]
        while self.parent[place] != place:
            place = self.parent[place]
        return place

    def last_read(self, node: fx.Node) -> int:
        return max((self.place[user] for user in node.users), default=-1)

    def unsafe_groups(self) -> list[int]:
        """Those in which a write changes a value that is read later, and is not its result; or
        writes what was expanded, which PyTorch refuses where its elements share memory."""
        unsafe = []
        for node, written in self.writes.items():
            group, now = self.group(node), self.place[node]
            changed = earlier = [m for m in self.members[group] if self.place[m] < now]
            if returns := returns_what_it_writes(node, self.modules):
                changed = [m for m in changed if m not in written]
            read_later = any(self.last_read(other) > now for other in changed)
            # A call that runs as it is gets a copy of its first argument.
            writes_more = not returns and written != node.args[:1]
            expanded = any(map(expands, earlier))
            if (read_later or writes_more or expanded) and group not in unsafe:
                unsafe.append(group)
        return unsafe

    def written_within(self, span: Span) -> set[int]:
        """The groups that a call between the span's ends writes, and one of the span's reads."""
        read = {self.group(source) for node in span.nodes for source in node.all_input_nodes}
        places = range(span.first, span.last + 1)
        return read & {self.group(node) for node in self.writes if self.place[node] in places}

    def span(self, groups: set[int]) -> Span:
        """The calls on the groups' memory, from the first that may give a view to the last write,
        and what is computed from it between them."""
        first = min(
            self.place[m] for group in groups for m in self.members[group] if m not in self.new
        )
        last = max(self.place[node] for node in self.writes if self.group(node) in groups)
        inside: set[fx.Node] = set()
        for node in self.nodes[first : last + 1]:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            of_group = node not in self.new and self.group(node) in groups
            reads = any(
                source in inside or self.group(source) in groups for source in node.all_input_nodes
            )
            if of_group or reads:
                inside.add(node)
        nodes = [node for node in self.nodes if node in inside]
        sources = {source for node in nodes for source in node.all_input_nodes}
        written = {s for s in sources - inside if self.group(s) in groups}
        results = [n for n in (*written, *nodes) if self.last_read(n) > last]
        return Span(first, last, groups, nodes, written, results)
