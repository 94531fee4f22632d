"""What a block remembers of a fused call, so that checking it again costs a few microseconds.

A batch of one spends as long in Python as in a small convolution: the checks of modules, parameters
and arguments, all of which came out the same a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from cvkernels import backend, record

# Per block or convolution, as many as a convolution keeps folded weights for.
CAPACITY = 4
# What modules compute by, but for their tensors and children.
OPTIONS: dict[type[nn.Module], Callable[[dict], Any]] = {
    nn.Conv2d: itemgetter("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: itemgetter("training", "eps"),
    nn.AdaptiveAvgPool2d: itemgetter("output_size"),
    nn.Identity: itemgetter("training"),
    **dict.fromkeys((nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Sequential), itemgetter("training")),
}
# In other modules every option counts: these by value, all others by identity.
BY_VALUE = (bool, int, float, str, tuple, type(None))


class Recall:
    """The fused calls of a few modules on CPU, by the shape and dtype of their data.

    A call comes back while nothing that the checks looked at has changed: the modules and their
    classes, options, hooks and modes, the parameters' memory and versions, and what surrounds it
    (autograd, autocast, tracing, ``explain``, a requested backend). ``parts`` are modules, each
    with all that is below it, functions, and None where there is none.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple, Any] = {}
        self._stamp: tuple | None = None
        # Keeps the parameters' memory alive: no other tensor can come to its address.
        self._held: list[Tensor] = []

    def get(self, x: Tensor, parts: tuple, residual: Tensor | None = None) -> Any:
        """What runs this call, if it is remembered and still the same."""
        # Read before the calls: another thread's keep() clears them before it writes a new one.
        stamp = self._stamp
        run = self._calls.get(_data(x, residual))
        if run is None or _watched(x) or stamp != stamp_of(*parts):
            return None
        return run

    def keep(
        self, x: Tensor, parts: tuple, residual: Tensor | None, prepare: Callable[[], Any]
    ) -> None:
        """Remember a call that was checked and ran; ``prepare`` gives what runs it, or None."""
        if _watched(x) or (stamp := stamp_of(*parts)) is None:
            return
        if stamp != self._stamp:
            self._calls.clear()
            self._stamp = stamp
            modules = [part for part in parts if isinstance(part, nn.Module)]
            self._held = [
                t.detach() for module in modules for t in (*module.parameters(), *module.buffers())
            ]
        data = _data(x, residual)
        if data not in self._calls:
            if len(self._calls) >= CAPACITY:
                self._calls.pop(next(iter(self._calls)))
            plain = residual is None or type(residual) is Tensor
            self._calls[data] = prepare() if plain else None


def stamp_of(*parts: nn.Module | Callable | None) -> tuple | None:
    """What changes when the parts do, or modules or tensors below them; None where it is unknown.

    What counts is each module's class, hooks and options, and each tensor's memory and version. A
    hook on a module, or a tensor without a version, makes it unknown.
    """
    stamp: list[object] = [torch._C._get_mkldnn_enabled()]
    waiting = list(parts)
    while waiting:
        current = waiting.pop()
        if not isinstance(current, nn.Module):
            stamp.append(current)
            continue
        attributes, kind = current.__dict__, type(current)
        if (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
        ):
            return None
        stamp.append((kind, OPTIONS.get(kind, _public)(attributes)))
        for tensors in (attributes["_parameters"], attributes["_buffers"]):
            for tensor in tensors.values():
                if tensor is None:
                    stamp.append(None)
                elif tensor.is_inference():
                    return None
                else:
                    stamp.append((id(tensor), tensor.data_ptr(), tensor._version))
        if attributes["_modules"]:
            waiting += attributes["_modules"].values()
    return tuple(stamp)


def _public(attributes: dict) -> tuple:
    """Every option of a module that is not in OPTIONS."""
    return tuple(
        value if type(value) in BY_VALUE else id(value)
        for name, value in attributes.items()
        if name[0] != "_"
    )


def _data(x: Tensor, residual: Tensor | None) -> tuple:
    """What distinguishes calls of the same modules."""
    if residual is None:
        return type(x), x.device, x.dtype, x.shape
    kinds = (type(residual), residual.device, residual.dtype, residual.shape)
    return type(x), x.device, x.dtype, x.shape, kinds


def _watched(x: Tensor) -> bool:
    """Whether somebody needs to see the call, or it is not to run as it did."""
    return bool(
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or record.active() is not None
        or backend.requested("auto", backend.NAMES) != "auto"
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )
