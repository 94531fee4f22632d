"""How a block runs a few of its submodules as one op, and when it must call them instead.

A block names the modules it would like to run together: ``self.fused(x, self.conv1, self.bn1,
self.relu)``. Where they are exactly what the op computes and nobody watches them, the op runs on
their parameters; otherwise the modules are called one by one, which is the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module

from cvkernels import record
from cvkernels.functional import (
    BatchNormParams,
    DerivedWeights,
    conv_bn_act,
    depthwise_conv_bn_act,
    max_pool,
)
from cvkernels.nn.recall import Recall
from cvkernels.ops.conv_bn_act.op import fuses_prologue
from cvkernels.ops.conv_bn_act.prepared import Run, prepared
from cvkernels.ops.depthwise_conv_bn_act.op import runs_fused


def relu_(x: Tensor) -> Tensor:
    """The activation of the stock blocks that call a function and have no module for it."""
    return F.relu(x, inplace=True)


ACTIVATIONS: dict[type[nn.Module] | Callable[[Tensor], Tensor], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    relu_: "relu",
}


class _Derived(NamedTuple):
    """What a block keeps beside one of its convolutions."""

    weights: DerivedWeights
    recall: Recall


class FusedModule(nn.Module):
    """Base of the blocks: keeps the weights that backends derive from the block's convolutions.

    They are no part of the block: not in ``state_dict``, never pickled or copied, and dropped by
    ``train()``, ``load_state_dict``, ``.to()`` and the like. Writing a parameter through ``.data``
    while in eval is the one change that goes unseen; ``block.train().eval()`` drops them.
    """

    def fused(
        self,
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module | None = None,
        act: nn.Module | Callable[[Tensor], Tensor] | None = None,
        residual: Tensor | None = None,
        input_bn: tuple[nn.Module, nn.Module | None] | None = None,
        input_gate: Tensor | None = None,
    ) -> Tensor:
        """``act(bn(conv(u)) + residual)``, as one op where the modules allow it.

        ``u`` is x, or ``relu(norm(x))`` for ``input_bn=(norm, relu)``, times ``input_gate[N, C]``.
        They are computed before the rest where no kernel has them as a prologue, so that the rest
        is fused all the same; x may then be overwritten by ``x * input_gate``. ``act`` is a module,
        or :func:`relu_`. A norm may be timm's BatchNormAct2d, whose activation is inside it; there
        ``act`` and ``relu`` are None.
        """
        if input_bn is not None and (reason := why_not_input_bn(x, *input_bn)):
            x = _run_group(input_bn[0], reason, None, lambda u=x: _normalised(u, *input_bn))
            input_bn = None
        if input_gate is not None and input_bn is None and not fuses_prologue(x):
            x, input_gate = _gated(x, input_gate), None
        plain = input_bn is None and input_gate is None
        derived = self._derived_from(conv)
        recall = None
        if derived is not None and plain and type(x) is Tensor and x.is_cpu:
            recall = derived.recall
            if (run := recall.get(x, conv, bn, act, residual)) is not None:
                return run(x, residual)
        inner_act, clash = fused_act(bn, act, residual)

        def as_modules() -> Tensor:
            u = x if input_bn is None else _normalised(x, *input_bn)
            y = conv(u if input_gate is None else _gated(u, input_gate))
            if bn is not None:
                y = bn(y)
            if residual is not None:
                y += residual
            return y if act is None else act(y)

        def operands() -> tuple:
            """What the op and :func:`prepared` take."""
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            scale = None if bn is None else _affine(bn)
            return (x, conv.weight, conv.bias, scale), geometry, act_name(inner_act)

        def as_op() -> Tensor:
            tensors, (stride, padding, dilation, groups), name = operands()
            options = {"stride": stride, "padding": padding, "dilation": dilation, "act": name}
            options["cache"] = None if derived is None else derived.weights
            if residual is None and plain and runs_depthwise(x, conv):
                return depthwise_conv_bn_act(*tensors, **options)
            return conv_bn_act(
                *tensors,
                **options,
                groups=groups,
                residual=residual,
                input_bn=None if input_bn is None else _affine(input_bn[0]),
                input_gate=input_gate,
            )

        reason = clash or why_not_conv_bn_act(x, conv, bn, inner_act)
        y = _run_group(conv, reason, as_op, as_modules)
        if recall is not None and not reason:

            def prepare() -> Run | None:
                if runs_depthwise(x, conv):
                    return None
                tensors, geometry, name = operands()
                return prepared(*tensors, geometry, name, residual, derived.weights)

            recall.keep(x, conv, bn, act, residual, prepare)
        return y

    def squeezed(
        self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """``act(bn(conv(x)))`` and its sums over H and W, as one op.

        For modules that :func:`why_not_conv_bn_act` and :func:`runs_depthwise` let pass.
        """
        derived = self._derived_from(conv)

        def as_op() -> tuple[Tensor, Tensor]:
            return depthwise_conv_bn_act(
                x, conv.weight, conv.bias, _affine(bn), stride=conv.stride, padding=conv.padding,
                dilation=conv.dilation, act=act_name(act), squeeze=True,
                cache=None if derived is None else derived.weights,
            )  # fmt: skip

        if (recorder := record.active()) is None:
            return as_op()
        with recorder.group(conv, ""):
            y, sums = as_op()
        recorder.observe(conv, y)
        return y, sums

    def pooled(self, x: Tensor, pool: nn.Module) -> Tensor:
        """``pool(x)``, without indices where it is exactly a max pool and nobody watches it."""

        def as_op() -> Tensor:
            return max_pool(
                x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
            )

        return _run_group(pool, why_not_max_pool(x, pool), as_op, lambda: pool(x))

    def _derived_from(self, conv: nn.Conv2d) -> _Derived | None:
        if torch.compiler.is_compiling():
            return None
        all_derived = self.__dict__.setdefault("_derived", {})
        derived = all_derived.get(id(conv))
        if derived is None:
            derived = all_derived[id(conv)] = _Derived(DerivedWeights(), Recall())
        return derived

    def drop_derived_weights(self) -> None:
        """Forget folded and prepacked weights; the next fused call derives them again."""
        self.__dict__.pop("_derived", None)

    def train(self, mode: bool = True):
        self.drop_derived_weights()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True):
        self.drop_derived_weights()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.drop_derived_weights()
        super()._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_derived", None)
        return replica

    def __prepare_scriptable__(self):
        raise NotImplementedError(
            "torch.jit.script cannot compile cvkernels' blocks (and PyTorch deprecates it); use "
            "torch.export or torch.jit.trace, which run the stock forward"
        )

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_derived", None)
        return state


def _kind(act: nn.Module | Callable) -> type[nn.Module] | Callable:
    """What ``ACTIVATIONS`` knows act by."""
    return type(act) if isinstance(act, nn.Module) else act


def act_name(act: nn.Module | Callable | None) -> str:
    """What the ops call act."""
    return "none" if act is None else ACTIVATIONS[_kind(act)]


def runs_depthwise(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether conv is depthwise and has kernels of its own for x; else conv_bn_act takes it."""
    if conv.groups == 1 or not conv.groups == conv.in_channels == conv.out_channels:
        return False
    return runs_fused(x, conv.kernel_size, conv.stride, conv.dilation)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    """x times gate[N, C], in place where no gradient needs x."""
    gate = gate[:, :, None, None].to(x.dtype)
    return x * gate if torch.is_grad_enabled() else x.mul_(gate)


def _normalised(x: Tensor, norm: nn.Module, relu: nn.Module | None) -> Tensor:
    return norm(x) if relu is None else relu(norm(x))


def _affine(bn: nn.Module) -> BatchNormParams:
    """The scale and shift of a norm that :func:`_why_not_affine` has nothing against."""
    return BatchNormParams(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)


def fused_act(
    bn: nn.Module | None, act: nn.Module | Callable | None = None, residual: Tensor | None = None
) -> tuple[nn.Module | Callable | None, str]:
    """The activation behind bn, which may carry it inside, and why its place forbids fusing."""
    if type(bn) is nn.BatchNorm2d or not _is_norm_act(bn) or type(bn.act) is nn.Identity:
        return act, ""
    if act is not None:
        return act, "an activation follows a norm that has one inside"
    return bn.act, "" if residual is None else "the activation stands before the shortcut"


def _is_norm_act(bn: nn.Module | None) -> bool:
    kind = type(bn)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__ == "timm.layers.norm_act"


def _run_group(
    leader: nn.Module,
    reason: str,
    as_op: Callable[[], Tensor] | None,
    as_modules: Callable[[], Tensor],
) -> Tensor:
    """Run a group of modules as one op, or one by one for ``reason``; seen under ``leader``."""
    run = as_modules if reason else as_op
    if (recorder := record.active()) is None:
        return run()
    with recorder.group(leader, reason):
        y = run()
    recorder.observe(leader, y)
    return y


def why_not_conv_bn_act(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, act: nn.Module | Callable | None
) -> str:
    """Why the modules have to be called one by one; empty where conv_bn_act computes the same."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not exactly nn.Conv2d"
    if bn is not None and (reason := _why_not_affine(bn)):
        return reason
    if act is not None and _kind(act) not in ACTIVATIONS:
        return f"{type(act).__name__} is not one of the fused activations"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} is not fused"
    return why_not_called(x, conv, bn, act if isinstance(act, nn.Module) else None)


def why_not_input_bn(x: Tensor, norm: nn.Module, relu: nn.Module | None) -> str:
    """Why norm and relu have to be called first; empty where they are the op's prologue."""
    if reason := _why_not_affine(norm):
        return reason
    if relu is None and _is_norm_act(norm):
        relu = norm.act
    if type(relu) is not nn.ReLU:
        return f"{type(relu).__name__} is not exactly nn.ReLU"
    if reason := why_not_called(x, norm, relu):
        return reason
    return "" if fuses_prologue(x) else "no backend here normalises a convolution's input"


def _why_not_affine(bn: nn.Module) -> str:
    """Why bn is no scale and shift per channel; empty where it is, but for its activation."""
    if type(bn) is not nn.BatchNorm2d:
        if not _is_norm_act(bn):
            return f"{type(bn).__name__} is not exactly nn.BatchNorm2d"
        if type(bn.drop) is not nn.Identity or _has_hooks(bn.drop) or _has_hooks(bn.act):
            return "BatchNormAct2d drops something, or a part of it has a hook"
    if bn.training or bn.running_mean is None:
        return "batch norm normalises with batch statistics"
    return ""


def why_not_max_pool(x: Tensor, pool: nn.Module) -> str:
    """Why the pool has to be called as a module; empty where max_pool computes the same."""
    if type(pool) is not nn.MaxPool2d:
        return f"{type(pool).__name__} is not exactly nn.MaxPool2d"
    reason = why_not_called(x, pool)
    if not reason and (pool.return_indices or x.dim() != 4):
        reason = "max_pool takes [N, C, H, W] and returns no indices"
    return reason


def why_not_called(x: Tensor, *modules: nn.Module | None) -> str:
    """Why the modules' own ``__call__`` must happen: somebody watches it, or it is being traced."""
    if isinstance(x, fx.Proxy):
        return "torch.fx is tracing"
    if not _is_plain(x):
        return f"the input is a {type(x).__name__}"
    for module in modules:
        if module is None:
            continue
        if _has_hooks(module):
            return f"{type(module).__name__} has a hook"
        for parameter in module._parameters.values():
            if parameter is not None and not _is_plain(parameter):
                return f"a parameter is a {type(parameter).__name__}"
    if _has_global_hooks():
        return "a global module hook is registered"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "torch.export is tracing"
        return "inductor fuses it" if x.device.type == "cpu" else ""
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "a torch.func transform is active"
    return ""


def _is_plain(tensor: Tensor) -> bool:
    """No subclass with a meaning of its own (DTensor, a quantised tensor, ...)."""
    return type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _has_global_hooks() -> bool:
    """Hooks on every module's call, but for those that a running ``explain`` registers."""
    hooks = (
        *torch_module._global_backward_hooks.values(),
        *torch_module._global_backward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
    )
    if not hooks:
        return False
    recorder = record.active()
    return recorder is None or not all(recorder.owns(hook) for hook in hooks)
