"""What functions, methods and modules of a traced model are among the graph's ops.

Every conversion gives None where the graph has no op that computes exactly the same: then the call
stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.freeze import ops
from cvkernels.freeze.graph import Node, Op
from cvkernels.nn.fused.match import ACTIVATIONS, is_norm_act, relu_, why_not_affine
from cvkernels.ops.common.norm import BatchNormParams, scale_shift

# What the graph's names of functions are: those of methods, and of functions of torch.
CALLABLES: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", relu_: "relu",
    F.relu6: "relu6", F.silu: "silu", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
    operator.add: "add", operator.iadd: "add", torch.add: "add",
    operator.mul: "mul", operator.imul: "mul", torch.mul: "mul",
    torch.cat: "cat", torch.concat: "cat", torch.flatten: "flatten", torch.mean: "mean",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d", F.max_pool2d: "max_pool2d",
    F.avg_pool2d: "avg_pool2d", F.dropout: "dropout",
}  # fmt: skip
_ACTS = ("relu", "relu6", "silu", "sigmoid")
_ACT_MODULES = {**ACTIVATIONS, nn.Sigmoid: "sigmoid"}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)
# Modules that call a function with these of their attributes.
_FUNCTIONS = {
    nn.Flatten: ("flatten", "start_dim end_dim"),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", "output_size"),
    nn.MaxPool2d: ("max_pool2d", "kernel_size stride padding dilation ceil_mode return_indices"),
    nn.AvgPool2d: (
        "avg_pool2d", "kernel_size stride padding ceil_mode count_include_pad divisor_override"
    ),
}  # fmt: skip


class Converter:
    """Emits a graph's nodes for functions and methods."""

    def __init__(self, emit: Callable[..., Node]) -> None:
        self.emit = emit

    def convert(self, name: str, layer: str, args: tuple, kwargs: dict) -> Any:
        """The node that computes this call, or None; a node of the input where it does nothing."""
        if not args:
            return None
        name = name.rstrip("_")
        if name in _ACTS:
            plain = isinstance(args[0], Node) and len(args) == 1
            return self.emit(ops.Act(name), [args[0]], layer) if plain else None
        rule = getattr(self, f"_{name}", None)
        return None if rule is None else rule(layer, *args, **kwargs)

    def _add(
        self, layer: str, a: Any, b: Any = None, *, op: type[Op] = ops.Add, **others: Any
    ) -> Node | None:
        if not isinstance(a, Node) or not isinstance(b, Node) or others:
            return None
        return self.emit(op(), [a, b], layer)

    def _mul(self, layer: str, a: Any, b: Any = None, **others: Any) -> Node | None:
        return self._add(layer, a, b, op=ops.Mul, **others)

    def _cat(self, layer: str, parts: Any, dim: int = 0, axis: int | None = None) -> Any:
        if dim != 1 or axis is not None or not all(isinstance(part, Node) for part in parts):
            return None
        if len(parts) == 1:
            return parts[0]
        if (affine := self._channels_apart(parts)) is not None:
            x, scale, shift = affine
            return self.emit(ops.Affine(scale, shift), [x], layer)
        return self.emit(ops.Cat(), parts, layer)

    def _channels_apart(self, parts: list[Node]) -> tuple[Node, Tensor, Tensor] | None:
        """GoogLeNet's transform_input: each channel alone, scaled and shifted, and all again."""
        scales, shifts = [], []
        for channel, part in enumerate(parts):
            shifted = _operand(part, "add", operator.add)
            scaled = shifted and _operand(shifted[0], "mul", operator.mul)
            added = scaled and _operand(scaled[0], "unsqueeze", torch.unsqueeze)
            picked = added and _operand(added[0], "", operator.getitem)
            if not picked or added[1] != 1 or picked[1] != (slice(None), channel):
                return None
            if not isinstance(picked[0].op, ops.Input) or picked[0] is not _root(parts[0]):
                return None
            scales.append(scaled[1])
            shifts.append(shifted[1])
        vectors = (torch.tensor(values, dtype=torch.float64) for values in (scales, shifts))
        return (picked[0], *vectors)

    def _flatten(self, layer: str, x: Any, start_dim: int = 0, end_dim: int = -1) -> Node | None:
        if isinstance(x, Node) and (start_dim, end_dim) == (1, -1):
            return self.emit(ops.Flatten(), [x], layer)
        return None

    def _view(self, layer: str, x: Any, *sizes: Any) -> Node | None:
        """``x.view(x.size(0), -1)``."""
        sizes = (
            tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        )
        if len(sizes) == 2 and sizes[1] == -1 and _is_batch(sizes[0], x):
            return self.emit(ops.Flatten(), [x], layer)
        return None

    _reshape = _view

    def _mean(self, layer: str, x: Any, dim: Any = None, keepdim: bool = False, **o) -> Node | None:
        if not isinstance(x, Node) or o or tuple(dim or ()) not in ((2, 3), (-2, -1)):
            return None
        mean = self.emit(ops.Mean(), [x], layer)
        return mean if keepdim else self.emit(ops.Flatten(), [mean], layer)

    def _adaptive_avg_pool2d(self, layer: str, x: Any, output_size: Any) -> Node | None:
        if output_size in (1, (1, 1), [1, 1]):
            return self.emit(ops.Mean(), [x], layer)
        return None

    def _max_pool2d(
        self, layer: str, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
        dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
    ) -> Node | None:  # fmt: skip
        if return_indices:
            return None
        window = _window(kernel_size, stride, padding, dilation, ceil_mode)
        return self.emit(ops.MaxPool(window), [x], layer)

    def _avg_pool2d(
        self, layer: str, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Node:  # fmt: skip
        window = _window(kernel_size, stride, padding, 1, ceil_mode)
        return self.emit(ops.AvgPool(window, count_include_pad, divisor_override), [x], layer)

    def _dropout(
        self, layer: str, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Node | None:
        return None if training else x

    def _contiguous(self, layer: str, x: Any, **kwargs: Any) -> Any:
        return x if isinstance(x, Node) else None


def _operand(node: Any, method: str, function: Callable) -> tuple | None:
    """(x, y) of a call of ``function(x, y)`` or ``x.method(y)`` on one value and one constant."""
    if not isinstance(node, Node) or not isinstance(node.op, ops.Call) or len(node.inputs) != 1:
        return None
    if node.op.target not in (method, function) or len(node.op.args) != 2:
        return None
    return (node.inputs[0], node.op.args[1])


def _root(node: Node) -> Node:
    while node.inputs:
        node = node.inputs[0]
    return node


def _is_batch(size: Any, x: Any) -> bool:
    """Whether size is ``x.size(0)`` or ``x.shape[0]``."""
    if not isinstance(x, Node) or not isinstance(size, Node) or not isinstance(size.op, ops.Call):
        return False
    (source, *_), target, args = size.inputs, size.op.target, size.op.args
    if target == "size" and args[1:] == (0,):
        return source is x
    if target is not operator.getitem or args[1] != 0 or not isinstance(source.op, ops.Call):
        return False
    whole = (source.op.target, source.op.args[1:]) in ((getattr, ("shape",)), ("size", ()))
    return whole and source.inputs[0] is x


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    return (value[0], value[-1])


def _window(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> tuple:
    """The options in the order of :class:`cvkernels.ops.common.pool.Window`."""
    kernel_size = _pair(kernel_size)
    stride = kernel_size if stride is None or stride == [] else _pair(stride)
    return (kernel_size, stride, _pair(padding), _pair(dilation), bool(ceil))


def convert_module(converter: Converter, module: nn.Module, layer: str, x: Any, *rest: Any) -> Any:
    """The node that computes ``module(x)``, or None."""
    if rest or not isinstance(x, Node):
        return None
    kind, emit = type(module), converter.emit
    if kind is nn.Conv2d:
        return _conv(converter, module, layer, x)
    if kind is nn.BatchNorm2d or is_norm_act(module):
        return _norm(converter, module, layer, x)
    if kind in _ACT_MODULES:
        return emit(ops.Act(_ACT_MODULES[kind]), [x], layer)
    if kind in _IDENTITIES or kind.__name__ in ("StochasticDepth", "DropPath"):
        return x
    if kind is nn.Linear:
        return emit(ops.Linear(module.weight, module.bias), [x], layer)
    if kind in _FUNCTIONS:
        name, attributes = _FUNCTIONS[kind]
        options = [getattr(module, attribute) for attribute in attributes.split()]
        return converter.convert(name, layer, (x, *options), {})
    return None


def _conv(converter: Converter, conv: nn.Conv2d, layer: str, x: Node) -> Node | None:
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    if conv.padding_mode != "zeros" or isinstance(padding, str):
        return None
    op = ops.Conv(conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
    return converter.emit(op, [x], layer)


def _norm(converter: Converter, bn: nn.Module, layer: str, x: Node) -> Node | None:
    if why_not_affine(bn):
        return None
    act = "none"
    if is_norm_act(bn) and type(bn.act) is not nn.Identity:
        if type(bn.act) not in _ACT_MODULES:
            return None
        act = _ACT_MODULES[type(bn.act)]
    params = BatchNormParams(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    with torch.no_grad():
        scale, shift = scale_shift(None, params, bn.running_mean, torch.float64)
    node = converter.emit(ops.Affine(scale, shift), [x], layer)
    return node if act == "none" else converter.emit(ops.Act(act), [node], layer)
