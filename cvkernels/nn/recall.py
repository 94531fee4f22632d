"""What a block remembers of a fused call, so that checking it again costs a few microseconds.

A batch of one spends as long in Python as in a small convolution: the checks of modules, parameters
and arguments, all of which came out the same a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from cvkernels import backend, record
from cvkernels.ops.conv_bn_act.prepared import Run

# Per convolution, as many as it keeps folded weights for.
CAPACITY = 4


class Recall:
    """The fused calls of one convolution on CPU, by the shape and dtype of their data.

    A call comes back while nothing that the checks looked at has changed: the modules and their
    classes, options, hooks and modes, the parameters' memory and versions, and what surrounds it
    (autograd, autocast, tracing, ``explain``, a requested backend).
    """

    def __init__(self) -> None:
        self._calls: dict[tuple, Run | None] = {}
        self._stamp: tuple | None = None
        # Keeps the parameters' memory alive: no other tensor can come to its address.
        self._held: list[Tensor] = []

    def get(
        self, x: Tensor, conv: nn.Module, bn: nn.Module | None, act: object, residual: Tensor | None
    ) -> Run | None:
        """What runs this call, if it is remembered and still the same."""
        # Read before the calls: another thread's keep() clears them before it writes a new one.
        stamp = self._stamp
        run = self._calls.get(_data(x, residual))
        if run is None or _watched(x) or stamp != _stamp(conv, bn, act):
            return None
        return run

    def keep(
        self,
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module | None,
        act: object,
        residual: Tensor | None,
        prepare: Callable[[], Run | None],
    ) -> None:
        """Remember a call that was checked and ran; ``prepare`` gives what runs it, or None."""
        if _watched(x) or (stamp := _stamp(conv, bn, act)) is None:
            return
        if stamp != self._stamp:
            self._calls.clear()
            self._stamp = stamp
            self._held = [t.detach() for t in _tensors(conv, bn)]
        data = _data(x, residual)
        if data not in self._calls:
            if len(self._calls) >= CAPACITY:
                self._calls.pop(next(iter(self._calls)))
            plain = residual is None or type(residual) is Tensor
            self._calls[data] = prepare() if plain else None


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
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or torch._C._get_tracing_state() is not None
    )


def _stamp(conv: nn.Module, bn: nn.Module | None, act: object) -> tuple | None:
    """What changes when the modules do; None where one is watched, or cannot be told by."""
    kinds = (type(conv), type(bn), type(act) if isinstance(act, nn.Module) else act)
    if bn is not None and kinds[1] is not nn.BatchNorm2d:
        return None
    for module in (conv, bn, act):
        if isinstance(module, nn.Module) and _has_hooks(module.__dict__):
            return None
    options = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if bn is not None:
        options += (bn.training, bn.eps)
    identities = []
    for tensor in _tensors(conv, bn):
        if tensor.is_inference():
            return None
        identities.append((id(tensor), tensor.data_ptr(), tensor._version))
    return kinds, options, torch._C._get_mkldnn_enabled(), identities


def _tensors(conv: nn.Module, bn: nn.Module | None) -> list[Tensor]:
    """What the folded weights come from."""
    parameters = conv._parameters
    tensors = [parameters["weight"], parameters["bias"]]
    if bn is not None:
        parameters, buffers = bn._parameters, bn._buffers
        tensors += parameters["weight"], parameters["bias"]
        tensors += buffers["running_mean"], buffers["running_var"]
    return [tensor for tensor in tensors if tensor is not None]


def _has_hooks(attributes: dict) -> bool:
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    )
