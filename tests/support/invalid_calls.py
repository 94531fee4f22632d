"""Random calls with one argument spoiled, so that the op's docstring does not allow them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from cvkernels import functional
from cvkernels.functional import BatchNormParams
from tests.support.random_calls import CALLS, Draw

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_FLOATS = (torch.int64, torch.uint8, torch.bool, torch.complex64)
NO_TENSORS = (3, 0.5, "x", (1.0, 2.0), numpy.ones(3, dtype=numpy.float32), object())
TOO_LARGE = 1 << 70
# By argument, the dimensions whose length other arguments determine.
LENGTHS = {
    "conv_bn_act": {"x": (1,), "weight": (1,)},
    "depthwise_conv_bn_act": {"x": (1,), "weight": (0, 1)},
    "excite": {"pooled": (1,), "weight1": (1,), "weight2": (1,)},
    "squeeze_excite": {"x": (1,), "weight1": (1,), "weight2": (0, 1)},
    "se_scale": {"x": (0, 1), "gate": (0, 1)},
    "dense_concat": {"buffer": (0, 2, 3), "src": (0, 2, 3)},
}
MAPS = ("residual", "out")
VECTORS = ("weight", "bias", "bias1", "bias2", "mean", "var")
GATES = ("input_gate", "output_gate")
NO_PAIRS = (2.5, 1.0, "1", "same", (1, 2, 3), (), (1, 2.0), (1, None), {1, 2}, TOO_LARGE,
            (1, TOO_LARGE), -1, (1, -1), -TOO_LARGE)  # fmt: skip
NO_INTEGERS = (2.5, 1.0, "1", (1, 1), [1], TOO_LARGE, -TOO_LARGE)
OPTIONS: dict[str, tuple] = {
    "stride": (*NO_PAIRS, 0, (1, 0)), "padding": (*NO_PAIRS, None), "dilation": (*NO_PAIRS, 0),
    "kernel_size": (*NO_PAIRS, 0, (0, 1), None, 1 << 40), "groups": (*NO_INTEGERS, 0, -1, 1 << 40),
    "start": (*NO_INTEGERS, -1, 1 << 40, None), "count": (*NO_INTEGERS, 0, -1),
    "divisor_override": (*NO_INTEGERS, 0), "act": ("gelu", "ReLU", "", None, 3, ["relu"]),
    "out_act": ("relu6", None, ["relu"]), "eps": ("1e-5", None, [1e-5]),
    "backend": ("magic", None, 3, ["auto"]),
}  # fmt: skip


@dataclass(frozen=True)
class InvalidCall:
    """``op(**arguments)``, which has a spoiled argument, or vector of a norm; ``valid`` is the call
    before."""

    op: str
    valid: dict[str, Any]
    arguments: dict[str, Any]
    spoiled: str
    how: str


Spoil = tuple[str, Any]  # how, and by what


def no_tensor(draw: Draw, t: Tensor) -> Spoil:
    return "no tensor", draw(st.sampled_from(NO_TENSORS))


def other_dtype(draw: Draw, t: Tensor) -> Spoil:
    return "dtype", t.detach().to(draw(st.sampled_from(NO_FLOATS)))


def other_rank(draw: Draw, t: Tensor) -> Spoil:
    return "rank", draw(st.sampled_from((t[None], t[..., None], t.sum())))


def other_device(draw: Draw, t: Tensor) -> Spoil:
    return "device", t.to("meta")


def other_layout(draw: Draw, t: Tensor) -> Spoil:
    return "layout", draw(st.sampled_from((t.to_sparse(), torch._neg_view(t))))


def longer(t: Tensor, dim: int) -> Tensor:
    return t.new_ones(*t.shape[:dim], t.shape[dim] + 1, *t.shape[dim + 1 :])


def spoiled_tensor(draw: Draw, op: str, name: str, t: Tensor, arguments: dict) -> Spoil:
    """Another value for a tensor argument, or for a vector of a norm."""
    tensors = [v for v in arguments.values() if isinstance(v, (Tensor, BatchNormParams))]
    ways: list[Callable[..., Spoil]] = [no_tensor, other_dtype, other_rank, other_layout]
    if len(tensors) > 1:
        ways.append(other_device)
    part = name.partition(".")[2] or name
    lengths = LENGTHS.get(op, {}).get(name, ())
    if part in MAPS:
        lengths = range(4)
    elif part in GATES:
        lengths = (0, 1)
    elif t.dim() == 1 and part in VECTORS:
        lengths = (0,)
    if lengths:
        ways.append(lambda *_: ("length", longer(t, draw(st.sampled_from(lengths)))))
    if len(tensors) > 1 and "." not in name and part in ("residual", "out", "src", "buffer"):
        others = [dtype for dtype in FLOATS if dtype != t.dtype]
        ways.append(lambda *_: ("dtype", t.to(draw(st.sampled_from(others)))))
    return draw(st.sampled_from(ways))(draw, t)


def spoiled_norm(draw: Draw, op: str, name: str, bn: BatchNormParams, arguments: dict):
    """The name of what is spoiled, and how."""
    whole = {
        "a tuple": tuple(bn), "a module": nn.BatchNorm2d(3), "a number": 1.0,
        "no vector": BatchNormParams(), "no var": bn._replace(mean=torch.ones(1), var=None),
        "eps": bn._replace(eps=draw(st.sampled_from(("1e-5", None, [1e-5])))),
    }  # fmt: skip
    vectors = [part for part in bn._fields[:4] if getattr(bn, part) is not None]
    how = draw(st.sampled_from((*whole, *vectors)))
    if how in whole:
        return name, how, whole[how]
    spoiled = f"{name}.{how}"
    way, value = spoiled_tensor(draw, op, spoiled, getattr(bn, how), arguments)
    return spoiled, way, bn._replace(**{how: value})


def spoiled_out(draw: Draw, op: str, name: str, out: Tensor, arguments: dict):
    """What is written overlaps itself or an argument, or needs a gradient."""
    sides = [dim for dim in (0, 2, 3) if out.shape[dim] > 1]
    read = [(key, part, t) for key, part, t in vectors_and_maps(arguments)
            if t is not out and t.dtype == out.dtype and t.numel()]  # fmt: skip
    ways = ["needs a gradient"]
    if out.numel() > 1:
        ways += ["overlaps itself"] * bool(sides) + ["overlaps"] * bool(read)
    how = draw(st.sampled_from(ways))
    if how == "needs a gradient":
        return name, how, {name: out.detach().clone().requires_grad_()}
    if how == "overlaps itself":
        dim, strides = draw(st.sampled_from(sides)), list(out.stride())
        strides[dim] = draw(st.sampled_from((0, 1) if out.shape[1] > 1 == out.stride(1) else (0,)))
        memory = torch.zeros(1 << 16, dtype=out.dtype)
        return name, how, {name: memory.as_strided(out.shape, strides)}
    key, part, t = draw(st.sampled_from(read))
    memory = torch.zeros(8 * (out.numel() + t.numel()), dtype=out.dtype)
    nhwc = torch.channels_last if out.stride(1) == 1 else torch.contiguous_format
    dense = torch.empty(out.shape, memory_format=nhwc).stride()
    start = draw(st.integers(1, out.numel() - 1))
    if op == "dense_concat":
        start = arguments["start"] * dense[1]
    over = memory.as_strided(t.shape, torch.empty(t.shape).stride(), start)
    value = over if part is None else arguments[key]._replace(**{part: over})
    return name, how, {name: memory.as_strided(out.shape, dense), key: value}


def vectors_and_maps(arguments: dict) -> list[tuple[str, str | None, Tensor]]:
    """Each tensor with its argument's name, and with its own in a norm."""
    found: list[tuple[str, str | None, Tensor]] = []
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            found.append((key, None, value))
        elif isinstance(value, BatchNormParams):
            vectors = zip(value._fields[:4], value[:4], strict=True)
            found += [(key, part, t) for part, t in vectors if t is not None]
    return found


@st.composite
def invalid_call(draw: Draw, op: str) -> InvalidCall:
    call = draw(CALLS[op])
    signature = inspect.signature(getattr(functional, op))
    given = signature.bind(*call.arguments, **call.options)
    given.apply_defaults()
    valid = dict(given.arguments)
    name = draw(st.sampled_from([
        name for name, value in valid.items()
        if isinstance(value, (Tensor, BatchNormParams)) or name in OPTIONS
    ]))  # fmt: skip
    value, required = valid[name], "bias" not in name
    required &= signature.parameters[name].default is inspect.Parameter.empty

    def spoiled(changes: dict, how: str, part: str = name) -> InvalidCall:
        return InvalidCall(op, valid, valid | changes, part, how)

    if name in OPTIONS:
        changed = draw(st.sampled_from(OPTIONS[name]))
        return spoiled({name: changed}, f"{name}={changed!r}")
    if isinstance(value, BatchNormParams):
        part, how, changed = spoiled_norm(draw, op, name, value, valid)
        return spoiled({name: changed}, how, part)
    if name in ("out", "buffer") and draw(st.booleans()):
        part, how, changes = spoiled_out(draw, op, name, value, valid)
        return spoiled(changes, how, part)
    if required and draw(st.integers(0, 7)) == 0:
        return spoiled({name: None}, "None")
    how, changed = spoiled_tensor(draw, op, name, value, valid)
    return spoiled({name: changed}, how)
