"""The graph that ``freeze`` works on: ops on values, in the order in which they run.

A :class:`Node` is one op and the value that it computes. What an op is (its tensors and options,
shapes, memory, cost, kernels) is its class under :mod:`cvkernels.freeze.ops`, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.common.work import GPU, Work, streaming

if TYPE_CHECKING:
    from cvkernels.freeze.lower import Lowered
    from cvkernels.freeze.steps import Site

# Runs one step of a plan on ``env``, the values of one call.
Run = Callable[[list], None]


class ShapeError(ValueError, RuntimeError):
    """The network does not take an input of this shape."""


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def empty(self, device: torch.device) -> Tensor:
        """A tensor like it, a map channels_last."""
        layout = torch.channels_last if len(self.shape) == 4 else torch.contiguous_format
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=layout)


def promoted(spec: TensorSpec, inputs: list[TensorSpec]) -> TensorSpec:
    """spec with the dtype that PyTorch computes in with such inputs."""
    dtypes = [x.dtype for x in inputs]
    return spec._replace(dtype=functools.reduce(torch.promote_types, dtypes))


def spec_of(value: Any) -> Any:
    """A tensor's :class:`TensorSpec`; any other value as it is."""
    return TensorSpec(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


class Op:
    """What a node computes; a subclass is a frozen dataclass of its tensors and options.

    The class variables, which a subclass gives in its first line, and the methods below are all
    that the other modules ask of an op.
    """

    name: ClassVar[str]
    # What each input is to the op.
    roles: ClassVar[tuple[str, ...]] = ("x",)
    # Its step runs plans of the public ops.
    runs_plans: ClassVar[bool] = False
    # Its step writes the value into memory that it is given: the arena.
    writes: ClassVar[bool] = False
    # It may write the value over its first input, element by element.
    in_place: ClassVar[bool] = False
    # Its step can put the value into a slice of a larger buffer, by a copy if need be.
    placeable: ClassVar[bool] = False
    # The value may be a view of an input.
    views: ClassVar[bool] = False
    # The tensor that its step allocates is kept once the step is recorded.
    kept: ClassVar[bool] = False
    # What runs in its step reports to ``explain`` itself.
    reports: ClassVar[bool] = False

    def __init_subclass__(cls, **facts: Any) -> None:
        for fact, value in facts.items():
            setattr(cls, fact, value)
        dataclass(frozen=True, eq=False)(cls)

    @property
    def may_raise(self) -> bool:
        """Whether it runs even if nothing reads its value."""
        return False

    def infer(self, node: Node, inputs: list, device: torch.device) -> Any:
        """The :class:`TensorSpec` of the value, or a value that is no tensor."""
        return TensorSpec(self.shape(node, *[spec.shape for spec in inputs]), inputs[0].dtype)

    def shape(self, node: Node, x: tuple, *others: tuple) -> tuple:
        """The value's shape from those of the inputs."""
        return x

    def lower(self, node: Node, lowered: Lowered) -> Step:
        """Emit the steps that compute the node; the one that has its value."""
        return lowered.emit(self, node)

    def traffic(self, step: Step) -> Traffic:
        """What a step without plans costs: every input, parameter and output once."""
        parameters = sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))
        return Traffic(1, parameters + sum(x.nbytes for x in step.inputs), step.nbytes)

    def work(self, step: Step, gpu: GPU) -> tuple[Work, ...]:
        """What the launches of a step without plans do on ``gpu``."""
        return streaming(self.traffic(step))

    def build(self, site: Site) -> Run | None:
        """The step's function; None where there is nothing to do."""
        return None


@dataclass(eq=False, repr=False)
class Node:
    """One op, and the value that it computes; ``layer`` is the module that it came from, ``note``
    what there is to say of the choice of the op."""

    op: Op
    inputs: list[Node]
    layer: str = ""
    note: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        self.inputs = list(self.inputs)

    def role(self, name: str) -> Node | None:
        """The input that plays this role, where there is one."""
        roles = self.op.roles
        return self.inputs[roles.index(name)] if name in roles else None

    def change(self, **changes: Any) -> None:
        """Change some of the op's tensors and options."""
        self.op = replace(self.op, **changes)

    def become(self, other: Node, **changes: Any) -> None:
        """Compute what other does, with ``changes`` to its op, at this node's place."""
        self.op, self.inputs, self.layer = other.op, list(other.inputs), other.layer
        self.change(**changes)

    def check(self, ok: bool, expected: str, got: tuple) -> None:
        if not ok:
            raise ShapeError(
                f"frozen model: layer {self.layer!r} ({self.op.name}) takes {expected}, got "
                f"{list(got)}; give images of a size that the network takes"
            )

    def __repr__(self) -> str:
        return f"<{self.op.name} {self.layer}>"


@dataclass(eq=False, repr=False)
class Step(Node):
    """A node of a plan: ``backend`` runs it, ``value`` is what it computes.

    ``source`` is the graph's node whose weights it has, for what is derived from them.
    """

    backend: str = ""
    value: Any = None
    source: Node | None = None

    @property
    def nbytes(self) -> int:
        return self.value.nbytes if isinstance(self.value, TensorSpec) else 0

    @property
    def reports(self) -> bool:
        """Whether ``explain`` hears of it without the plan: of a public op, or of aten's."""
        return self.op.reports or self.backend in ("cvkernels", "conv_bn_act")


@dataclass(frozen=True)
class Ref:
    """Stands for a value among the arguments of a call, or in the model's output."""

    index: int


@dataclass(eq=False, repr=False)
class Graph:
    """Nodes in order, the first of them the input, and the structure of the output.

    ``output`` is what the model returns, with :class:`Ref` to an entry of ``results`` for each
    tensor.
    """

    nodes: list[Node]
    results: list[Node]
    output: Any

    def uses(self) -> Counter[Node]:
        """How often each node's value is read."""
        uses = Counter(self.results)
        for node in self.nodes:
            uses.update(node.inputs)
        return uses

    def prune(self) -> None:
        """Drop what no result needs; the input stays, and what may raise."""
        needed = {node for node in self.nodes if node.op.may_raise}
        needed |= set(self.results) | {self.nodes[0]}
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.inputs)
        self.nodes = [node for node in self.nodes if node in needed]

    def infer(self, x: TensorSpec, device: torch.device) -> dict[Node, Any]:
        """The :class:`TensorSpec` of every node's value; of one that is no tensor the value.

        By formulas: only what the graph does not know, a call, is run once, on zeros.

        Raises:
            ShapeError: a layer does not take what it would get.
        """
        image, *others = self.nodes
        values: dict[Node, Any] = {image: image.op.infer(image, [x], device)}
        for node in others:
            inputs = [values[source] for source in node.inputs]
            values[node] = node.op.infer(node, inputs, device)
        return values


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """value with ``change`` of all that is in its containers, which keep their kinds; torch.fx's
    own immutable ones become Python's."""
    if isinstance(value, torch.Size) or dataclasses.is_dataclass(value):
        return change(value)
    if isinstance(value, tuple):
        parts = [mapped(change, part) for part in value]
        if hasattr(value, "_fields"):
            return type(value)(*parts)
        # Such as torch.topk's, a named tuple of C.
        return type(value)(parts) if hasattr(value, "n_sequence_fields") else tuple(parts)
    if isinstance(value, list):
        return [mapped(change, part) for part in value]
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, mapped(change, part)) for key, part in value.items())
    if isinstance(value, slice):
        parts = [mapped(change, part) for part in (value.start, value.stop, value.step)]
        return slice(*parts)
    return change(value)


def fill(structure: Any, values: list) -> Any:
    """The structure with each :class:`Ref` replaced by the value that it stands for."""
    return mapped(lambda leaf: values[leaf.index] if isinstance(leaf, Ref) else leaf, structure)
