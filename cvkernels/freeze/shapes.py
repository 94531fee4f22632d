"""The shape of every value of a graph for one input shape, by formulas: nothing is computed.

Only what the graph does not know, a call of somebody's module or function, is run once on zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from cvkernels.freeze.graph import Graph, Like, Node, fill, like
from cvkernels.ops.common.pool import Window, _count


class ShapeError(ValueError, RuntimeError):
    """The network does not take an input of this shape."""


def infer(graph: Graph, x: Like, device: torch.device) -> dict[Node, Any]:
    """A :class:`Like` for every node that computes a tensor; for the others their value.

    Raises:
        ShapeError: a layer does not take what it would get.
    """
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "input":
            values[node] = x
            continue
        inputs = [values[source] for source in node.inputs]
        if node.op == "call":
            values[node] = like(_dry_run(node, inputs, device))
        else:
            values[node] = Like(
                _RULES[node.op](node, *[v.shape for v in inputs]), _dtype(node, inputs)
            )
    return values


def _dtype(node: Node, inputs: list[Like]) -> torch.dtype:
    return torch.float32 if node.op == "sums" and inputs[0].dtype.itemsize < 4 else inputs[0].dtype


def _dry_run(node: Node, inputs: list, device: torch.device) -> Any:
    zeros = [
        torch.zeros(value.shape, dtype=value.dtype, device=device)
        if isinstance(value, Like)
        else value
        for value in inputs
    ]
    return call(node)(zeros)


def call(node: Node) -> Callable[[list], Any]:
    """A function of the inputs' values that makes the call."""
    kind, target = node.attrs["kind"], node.attrs["target"]
    args, kwargs = node.attrs["args"], node.attrs["kwargs"]
    in_place = node.attrs["in_place"]

    def run(values: list) -> Any:
        if in_place:
            values = [values[0].clone(), *values[1:]]
        actual, named = fill(args, values), fill(kwargs, values)
        if kind == "method":
            return getattr(actual[0], target)(*actual[1:], **named)
        return target(*actual, **named)

    return run


def _conv(node: Node, x: tuple, *others: tuple) -> tuple:
    _check(node, len(x) == 4, "[N, C, H, W]", x)
    K, channels, *kernel = node.attrs["weight"].shape
    _check(node, x[1] == channels * node.attrs["groups"], f"{channels} channels", x)
    geometry = zip(
        x[2:], kernel, *(node.attrs[n] for n in ("stride", "padding", "dilation")), strict=True
    )
    size = tuple((s + 2 * p - d * (k - 1) - 1) // stride + 1 for s, k, stride, p, d in geometry)
    _check(node, min(size) > 0, f"a larger map than {x[2]}x{x[3]} for its kernel", x)
    shape = (x[0], K, *size)
    if (residual := node.role("residual")) is not None:
        _check(node, others[node.inputs.index(residual) - 1] == shape, f"a shortcut {shape}", x)
    return shape


def _pool(node: Node, x: tuple) -> tuple:
    _check(node, len(x) == 4, "[N, C, H, W]", x)
    window = Window(*node.attrs["window"])
    size = tuple(_count(node.op, x[2 + axis], axis, window) for axis in range(2))
    _check(node, min(size) > 0, "a larger map for its window", x)
    return (*x[:2], *size)


def _cat(node: Node, *parts: tuple) -> tuple:
    first = parts[0]
    same = all((p[0], *p[2:]) == (first[0], *first[2:]) for p in parts)
    _check(node, same, "parts of one size", parts)
    return (first[0], sum(part[1] for part in parts), *first[2:])


def _broadcast(node: Node, a: tuple, b: tuple) -> tuple:
    # torch.broadcast_shapes would import the symbolic shapes, which takes half a second.
    sizes = list(itertools.zip_longest(reversed(a), reversed(b), fillvalue=1))
    _check(node, all(m == n or 1 in (m, n) for m, n in sizes), "maps of one shape", (a, b))
    return tuple(n if m == 1 else m for m, n in reversed(sizes))


def _same(node: Node, x: tuple, *others: tuple) -> tuple:
    return x


def _linear(node: Node, x: tuple) -> tuple:
    features = node.attrs["weight"].shape[1]
    _check(node, x[-1] == features, f"{features} features", x)
    return (*x[:-1], node.attrs["weight"].shape[0])


def _check(node: Node, ok: bool, expected: str, got: tuple) -> None:
    if not ok:
        raise ShapeError(
            f"frozen model: layer {node.layer!r} ({node.op}) takes {expected}, got {list(got)}; "
            f"give images of a size that the network takes"
        )


_RULES: dict[str, Callable[..., tuple]] = {
    "conv": _conv,
    "part": lambda node, x: (x[0], node.attrs["channels"], *x[2:]),
    "affine": _same,
    "act": _same,
    "add": _broadcast,
    "mul": _broadcast,
    "cat": _cat,
    "max_pool": _pool,
    "avg_pool": _pool,
    "mean": lambda node, x: (*x[:2], 1, 1),
    "se": _same,
    "sums": lambda node, x: x[:2],
    "excite": _same,
    "scale": _same,
    "copy": _same,
    "linear": _linear,
    "flatten": lambda node, x: (x[0], math.prod(x[1:])),
}
