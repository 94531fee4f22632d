"""How a block runs a few of its submodules as one op, and when it must call them instead.

A block names the modules it would like to run together: ``self.fused(x, self.conv1, self.bn1,
self.relu)``. Where they are exactly what the op computes and nothing watches them, the op runs on
their parameters; otherwise the modules are called one by one, which is the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvkernels import record
from cvkernels.functional import (
    BatchNormParams,
    DerivedWeights,
    conv_bn_act,
    depthwise_conv_bn_act,
    max_pool,
)
from cvkernels.nn.fused.caller_layout import like_input
from cvkernels.nn.fused.match import (
    act_name,
    fused_act,
    runs_depthwise,
    why_not_input_bn,
    why_not_layer,
    why_not_max_pool,
)
from cvkernels.nn.fused.plan_cache import Part, PlanCache, guard_of
from cvkernels.nn.fused.watched import why_watched
from cvkernels.nn.training.concat_and_pool import max_pool as training_max_pool
from cvkernels.nn.training.conv_bn_act import conv_bn_act as training_conv_bn_act
from cvkernels.nn.training.match import why_not_train_conv_bn_act
from cvkernels.nn.training.recompute import recompute_of


class Step(NamedTuple):
    """One part of what a block computes, chosen for data like some x.

    ``owner`` is the module that ``explain`` and ``verify`` see it under; ``reason`` says why
    modules are called, empty where an op runs. ``lasting``: ``run`` holds for other data of the
    same shape and layout, as long as a guard of the modules does.
    """

    owner: nn.Module
    reason: str
    run: Callable[..., Any]
    lasting: bool = False


def run_step(step: Step, *data: Tensor | None) -> Any:
    """``step.run(*data)``, seen by a running ``explain`` under the step's owner."""
    if (recorder := record.active()) is None:
        return step.run(*data)
    with recorder.group(step.owner, step.reason):
        y = step.run(*data)
    recorder.observe(step.owner, y[0] if isinstance(y, tuple) else y)
    return y


class _Derived(NamedTuple):
    """What a block keeps for one of its modules."""

    weights: DerivedWeights
    plans: PlanCache


class FusedModule(nn.Module):
    """Base of the blocks: keeps the plans of its calls, and weights derived for them.

    They are no part of the block: not in ``state_dict``, never pickled or copied, dropped by
    ``train()``, ``load_state_dict``, ``.to()`` and the like, and verified at every call, see
    :mod:`cvkernels.nn.fused.plan_cache`. On CUDA no derived weights are kept. Writing single
    weights of a filter past the version counter is the one change that goes unseen;
    :func:`cvkernels.refresh` drops what is kept.
    """

    def fused(
        self,
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module | None = None,
        act: nn.Module | Callable[[Tensor], Tensor] | None = None,
        residual: Tensor | None = None,
        input_bn: tuple[nn.Module, nn.Module | None] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``act(bn(conv(u)) + residual)``, as one op where the modules allow it.

        ``u`` is x, or ``relu(norm(x))`` for ``input_bn=(norm, relu)``, which are computed before
        the rest where no kernel has them as a prologue. ``act`` is a module, or :func:`relu_`. A
        norm may be timm's BatchNormAct2d, whose activation is inside it; there ``act`` and ``relu``
        are None. ``out``, a channel slice of a channels_last buffer, is written and returned, where
        no gradient is needed.

        In training batch norm takes the batch's statistics, and autograd keeps the convolution's
        output alone, see :mod:`cvkernels.nn.training`.
        """
        if input_bn is not None:
            norm, relu = input_bn
            reason = why_watched(x) or why_not_input_bn(x, norm, relu, getattr(conv, "groups", 1))
            if reason:
                x = run_step(Step(norm, reason, lambda u: _normalised(u, norm, relu)), x)
                input_bn = None
        trains = bn is not None and bn.training and torch.is_grad_enabled()
        plans = None if trains or input_bn is not None else self.plans_of(x, conv)
        parts = (conv, bn, act)
        if plans is not None and (run := plans.get(x, parts, residual, out)) is not None:
            y = run(x, residual, None, out)
            return y if out is not None else like_input(x, y)
        guard = None if plans is None else guard_of(x, _modules_of(parts))
        step = self.layer_step(
            x, *parts, residual, input_bn=input_bn, out=out, lasting=guard is not None
        )
        y = run_step(step, x, residual, None, out)
        if guard is not None and step.lasting:
            plans.keep(guard, step.run, x, parts, residual, out)
        return y if out is not None else like_input(x, y)

    def layer_step(
        self,
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module | None,
        act: nn.Module | Callable[[Tensor], Tensor] | None,
        residual: Tensor | None = None,
        *,
        input_bn: tuple[nn.Module, nn.Module | None] | None = None,
        input_gate: Tensor | None = None,
        out: Tensor | None = None,
        lasting: bool = False,
    ) -> Step:
        """What computes :meth:`fused` for data like this: ``run(x, residual, input_gate, out)``.

        ``lasting`` asks for a plan that other calls may run. ``input_bn``, and ``input_gate[N, C]``
        which multiplies the input, need :func:`supports_prologue_and_slices`.
        """
        inner_act, clash = fused_act(bn, act, residual)
        plain = input_bn is None and input_gate is None and out is None
        reason = clash or why_watched(x)
        if plain and not reason:
            if not why_not_train_conv_bn_act(x, conv, bn, inner_act, residual):
                return Step(conv, "", _in_training(conv, bn, inner_act))
        if reason := reason or why_not_layer(conv, bn, inner_act):
            return Step(conv, reason, _as_modules(conv, bn, act, input_bn))
        options = {
            "stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation,
            "act": act_name(inner_act), "cache": self._cache_for(x, conv),
        }  # fmt: skip
        tensors = (conv.weight, conv.bias, None if bn is None else affine_of(bn))
        if residual is None and plain and runs_depthwise(x, conv):
            return _depthwise_step(x, conv, tensors, options, lasting)
        options["groups"] = conv.groups
        options["input_bn"] = None if input_bn is None else affine_of(input_bn[0])
        return conv_step(x, conv, tensors, options, (residual, input_gate, out), lasting)

    def squeezed_step(
        self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module, lasting: bool
    ) -> Step:
        """What computes ``act(bn(conv(x)))`` and its sums over H and W, as one op.

        For modules that :func:`why_not_layer` and :func:`runs_depthwise` let pass.
        """
        options = {
            "stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation,
            "act": act_name(act), "squeeze": True, "cache": self._cache_for(x, conv),
        }  # fmt: skip
        tensors = (conv.weight, conv.bias, affine_of(bn))
        if lasting:
            plan = depthwise_conv_bn_act.plan(x, *tensors, **options)
            return Step(conv, "", plan.run, plan.backend != "reference")
        return Step(conv, "", lambda x: depthwise_conv_bn_act(x, *tensors, **options))

    def pooled(self, x: Tensor, pool: nn.Module, out: Tensor | None = None) -> Tensor:
        """``pool(x)``, without indices where it is exactly a max pool and nothing watches it.

        ``out`` is written and returned, where no gradient is needed. In training an x that can be
        computed again is not kept for backward, see :mod:`cvkernels.nn.training`.
        """

        def as_op(x: Tensor) -> Tensor:
            if (recompute := recompute_of(x)) is not None:
                return training_max_pool(x, recompute, pool)
            window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
            return max_pool(x, *window, out=out)

        def as_modules(x: Tensor) -> Tensor:
            y = pool(x)
            return y if out is None else out.copy_(y)

        reason = why_not_max_pool(x, pool)
        y = run_step(Step(pool, reason, as_modules if reason else as_op), x)
        return y if out is not None else like_input(x, y)

    def plans_of(self, x: Tensor, owner: nn.Module) -> PlanCache | None:
        """The plans of the calls that ``owner`` leads; None where none could be for x."""
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return None
        return self._derived_from(owner).plans

    def weights_of(self, owner: nn.Module) -> DerivedWeights:
        """Where weights that are derived from the parameters of ``owner`` are kept."""
        return self._derived_from(owner).weights

    def _cache_for(self, x: Tensor, conv: nn.Module) -> DerivedWeights | None:
        """:meth:`weights_of`; None where nothing is kept of weights for a call on x."""
        return None if torch.compiler.is_compiling() or x.is_cuda else self.weights_of(conv)

    def _derived_from(self, owner: nn.Module) -> _Derived:
        all_derived = self.__dict__.setdefault("_derived", {})
        derived = all_derived.get(id(owner))
        if derived is None:
            derived = all_derived[id(owner)] = _Derived(DerivedWeights(), PlanCache())
        return derived

    def drop_derived_weights(self) -> None:
        """Forget plans and the weights in them; the next fused call makes them again."""
        _forget(self.__dict__)

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
        _forget(replica.__dict__)
        return replica

    def __prepare_scriptable__(self):
        raise NotImplementedError(
            "torch.jit.script cannot compile cvkernels' blocks (and PyTorch deprecates it); use "
            "torch.export or torch.jit.trace, which run the stock forward"
        )

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        _forget(state)
        return state


def _forget(attributes: dict[str, Any]) -> None:
    """Take what a block keeps beside itself out of its attributes."""
    attributes.pop("_derived", None)
    attributes.pop("_seal", None)


def refresh(model: nn.Module) -> nn.Module:
    """Forget what ``model``'s blocks derived from their weights, and return ``model``.

    Needed after one kind of write alone: to single weights of a filter, past the version counter
    (through ``.data`` or a NumPy view, say). All others are seen.
    """
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.drop_derived_weights()
    return model


def _modules_of(parts: tuple[Part, ...]) -> list[nn.Module]:
    return [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]


def _in_training(conv: nn.Module, bn: nn.Module, act: Part) -> Callable[..., Tensor]:
    def run(x: Tensor, residual: Tensor | None = None, *_: None) -> Tensor:
        return training_conv_bn_act(x, conv, bn, act, residual)

    return run


def _as_modules(
    conv: nn.Module,
    bn: nn.Module | None,
    act: nn.Module | Callable[[Tensor], Tensor] | None,
    input_bn: tuple[nn.Module, nn.Module | None] | None,
) -> Callable[..., Tensor]:
    def run(
        x: Tensor,
        residual: Tensor | None = None,
        input_gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        u = x if input_bn is None else _normalised(x, *input_bn)
        y = conv(u if input_gate is None else u * input_gate[:, :, None, None].to(u.dtype))
        if bn is not None:
            y = bn(y)
        if residual is not None:
            y += residual
        y = y if act is None else act(y)
        return y if out is None else out.copy_(y)

    return run


def conv_step(
    x: Tensor, conv: nn.Module, tensors: tuple, options: dict, data: tuple, lasting: bool
) -> Step:
    """conv_bn_act on ``tensors`` (weight, bias, norm), seen under conv: ``run(x, residual,
    input_gate, out)`` for data like x and ``data``, which holds the last three."""
    if lasting:
        residual, input_gate, out = data
        plan = conv_bn_act.plan(
            x, *tensors, **options, residual=residual, input_gate=input_gate, out=out
        )
        # oneDNN's plan of an image looks at its values.
        lasts = plan.backend != "reference" and (plan.backend, x.shape[1] <= 4) != ("onednn", True)
        return Step(conv, "", plan.run, lasts)

    def run(
        x: Tensor,
        residual: Tensor | None = None,
        input_gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return conv_bn_act(
            x, *tensors, **options, residual=residual, input_gate=input_gate, out=out
        )

    return Step(conv, "", run)


def _depthwise_step(
    x: Tensor, conv: nn.Conv2d, tensors: tuple, options: dict, lasting: bool
) -> Step:
    if lasting:
        plan = depthwise_conv_bn_act.plan(x, *tensors, **options)
        convolve = plan.run
        lasts = plan.backend != "reference"
    else:
        lasts = False

        def convolve(x: Tensor) -> tuple[Tensor]:
            return (depthwise_conv_bn_act(x, *tensors, **options),)

    return Step(conv, "", lambda x, *_: convolve(x)[0], lasts)


def _normalised(x: Tensor, norm: nn.Module, relu: nn.Module | None) -> Tensor:
    return norm(x) if relu is None else relu(norm(x))


def affine_of(bn: nn.Module) -> BatchNormParams:
    """The scale and shift of a norm that :func:`why_not_affine` has nothing against."""
    return BatchNormParams(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
