"""What functions, methods and modules of a traced model are among the graph's ops.

Every conversion gives None where the graph has no op that computes exactly the same: then the call
stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.freeze import ops
from cvkernels.freeze.graph import Node, Op
from cvkernels.nn.fused.match import ACTIVATIONS, is_norm_act, relu_, why_not_affine
from cvkernels.ops.common.norm import BATCH_NORMS, BatchNormParams, scale_shift

# What the graph's names of functions are: those of methods, and of functions of torch.
CALLABLES: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", relu_: "relu",
    F.relu6: "relu6", F.silu: "silu", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
    operator.add: "add", operator.iadd: "add", torch.add: "add",
    operator.mul: "mul", operator.imul: "mul", torch.mul: "mul",
    torch.cat: "cat", torch.concat: "cat", torch.flatten: "flatten", torch.mean: "mean",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d", F.max_pool2d: "max_pool2d",
    F.avg_pool2d: "avg_pool2d", F.dropout: "dropout", F.pad: "pad",
}  # fmt: skip
_ACT_MODULES = {**ACTIVATIONS, nn.Sigmoid: "sigmoid"}
# Adds the node of an op on these inputs to the graph, as part of the layer at hand.
Emit = Callable[[Op, list[Node]], Node]


def convert_call(emit: Emit, name: str, args: tuple, kwargs: dict) -> Any:
    """The node that computes this call, or None; a node of the input where it does nothing.

    ``name`` is a method's, or that of a function in :data:`CALLABLES`.
    """
    rule = CALLS.get(name.rstrip("_"))
    return None if rule is None or not args else rule(emit, *args, **kwargs)


def convert_module(emit: Emit, module: nn.Module, x: Any, *rest: Any) -> Any:
    """The node that computes ``module(x)``, or None; x where it does nothing in eval."""
    if rest or not isinstance(x, Node):
        return None
    if is_norm_act(module):
        return _norm(emit, module, x)
    if type(module).__name__ in ("StochasticDepth", "DropPath"):
        return x
    if type(module).__name__ == "Conv2dSame" and isinstance(module, nn.Conv2d):  # timm's
        return _same_conv(emit, module, x)
    rule = MODULES.get(type(module))
    return None if rule is None else rule(emit, module, x)


def _act(act: str, emit: Emit, x: Any, *inplace: Any, **kwargs: Any) -> Node | None:
    return emit(ops.Act(act), [x]) if isinstance(x, Node) and not inplace else None


def _binary(op: type[Op], emit: Emit, a: Any, b: Any = None, **others: Any) -> Node | None:
    plain = isinstance(a, Node) and isinstance(b, Node) and not others
    return emit(op(), [a, b]) if plain else None


def _cat(emit: Emit, parts: Any, dim: int = 0, axis: int | None = None) -> Node | None:
    if dim != 1 or axis is not None or not isinstance(parts, (tuple, list)):
        return None
    if not all(isinstance(part, Node) for part in parts):
        return None
    if len(parts) == 1:
        return parts[0]
    if (affine := _channels_apart(parts)) is not None:
        x, scale, shift = affine
        return emit(ops.Affine(scale, shift), [x])
    return emit(ops.Cat(), parts)


def _channels_apart(parts: list[Node]) -> tuple[Node, Tensor, Tensor] | None:
    """(x, scale, shift) where each part is one channel of the input x, scaled and shifted.

    GoogLeNet's ``transform_input`` concatenates these.
    """
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
    vectors = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (scales, shifts))
    return (picked[0], *vectors)


def _flatten(emit: Emit, x: Any, start_dim: int = 0, end_dim: int = -1) -> Node | None:
    plain = isinstance(x, Node) and (start_dim, end_dim) == (1, -1)
    return emit(ops.Flatten(), [x]) if plain else None


def _view(emit: Emit, x: Any, *sizes: Any) -> Node | None:
    """``x.view(x.size(0), -1)``."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    plain = len(sizes) == 2 and sizes[1] == -1 and _is_batch(sizes[0], x)
    return emit(ops.Flatten(), [x]) if plain else None


def _mean(emit: Emit, x: Any, dim: Any = None, keepdim: bool = False, **o: Any) -> Node | None:
    over = tuple(dim) if isinstance(dim, (tuple, list)) else ()
    if not isinstance(x, Node) or o or over not in ((2, 3), (-2, -1)):
        return None
    mean = emit(ops.Mean(), [x])
    return mean if keepdim else emit(ops.Flatten(), [mean])


def _adaptive_avg_pool2d(emit: Emit, x: Any, output_size: Any) -> Node | None:
    return emit(ops.Mean(), [x]) if output_size in (1, (1, 1), [1, 1]) else None


def _max_pool2d(
    emit: Emit, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Node | None:  # fmt: skip
    window = _window(kernel_size, stride, padding, dilation, ceil_mode)
    return None if return_indices else emit(ops.MaxPool(window), [x])


def _avg_pool2d(
    emit: Emit, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Node:  # fmt: skip
    window = _window(kernel_size, stride, padding, 1, ceil_mode)
    return emit(ops.AvgPool(window, count_include_pad, divisor_override), [x])


def _pad(
    emit: Emit, x: Any, pad: Any, mode: str = "constant", value: float | None = None
) -> Node | None:  # fmt: skip
    """Of the rows and columns of a map by zeros; negative ones would cut it."""
    plain = isinstance(x, Node) and mode == "constant" and not value
    if not plain or len(pad) != 4 or any(type(n) is not int or n < 0 for n in pad):
        return None
    left, right, top, bottom = pad
    return emit(ops.Pad((top, bottom), (left, right)), [x])


def _dropout(
    emit: Emit, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Node | None:
    return None if training else x


def _contiguous(emit: Emit, x: Any, **kwargs: Any) -> Node | None:
    return x if isinstance(x, Node) else None


# What converts the calls of each function and method; takes Emit and the call's arguments.
CALLS: dict[str, Callable[..., Any]] = {
    **{act: partial(_act, act) for act in ("relu", "relu6", "silu", "sigmoid")},
    "add": partial(_binary, ops.Add), "mul": partial(_binary, ops.Mul),
    "cat": _cat, "flatten": _flatten, "view": _view, "reshape": _view, "mean": _mean,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d, "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d, "dropout": _dropout, "contiguous": _contiguous, "pad": _pad,
}  # fmt: skip


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


def _conv(emit: Emit, conv: nn.Conv2d, x: Node) -> Node | None:
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    if conv.padding_mode != "zeros" or isinstance(padding, str):
        return None
    op = ops.Conv(conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
    return emit(op, [x])


def _same_conv(emit: Emit, conv: nn.Conv2d, x: Node) -> Node:
    """A convolution whose padding follows from the size of its map, as in TensorFlow."""
    sides = (conv.kernel_size, conv.stride, conv.dilation)
    padding = (0, 0)
    if tuple(conv.stride) == (1, 1) and all(taps % 2 for taps in conv.kernel_size):
        down, along = (d * (taps // 2) for taps, _, d in zip(*sides, strict=True))
        padding = (down, along)
    elif max(conv.kernel_size) > 1:
        x = emit(ops.SamePad(*map(_pair, sides)), [x])
    op = ops.Conv(conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
    return emit(op, [x])


def _norm(emit: Emit, bn: nn.Module, x: Node) -> Node | None:
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
    node = emit(ops.Affine(scale, shift), [x])
    return node if act == "none" else emit(ops.Act(act), [node])


def _of(rule: Callable[..., Any], names: str = "") -> Callable[..., Any]:
    """The rule of a call, with these attributes of a module as its arguments after x."""
    return lambda emit, m, x: rule(emit, x, *(getattr(m, name) for name in names.split()))


# What converts a module of each kind; takes Emit, the module and its input.
MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    **{kind: _of(CALLS[act]) for kind, act in _ACT_MODULES.items()},
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), lambda emit, m, x: x),
    nn.Conv2d: _conv,
    **dict.fromkeys(BATCH_NORMS, _norm),
    nn.Linear: lambda emit, m, x: emit(ops.Linear(m.weight, m.bias), [x]),
    nn.ZeroPad2d: _of(_pad, "padding"),
    nn.Flatten: _of(_flatten, "start_dim end_dim"),
    nn.AdaptiveAvgPool2d: _of(_adaptive_avg_pool2d, "output_size"),
    nn.MaxPool2d: _of(_max_pool2d, "kernel_size stride padding dilation ceil_mode return_indices"),
    nn.AvgPool2d: _of(
        _avg_pool2d, "kernel_size stride padding ceil_mode count_include_pad divisor_override"
    ),
}
