"""A plan of depthwise_conv_bn_act's native op, as blocks call it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.autograd import needs_grad
from cvkernels.ops.depthwise_conv_bn_act.op import IMPLEMENTATIONS, plan

Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def prepared(x, weight, bias, bn, geometry, act, squeeze, cache) -> Run | None:
    if needs_grad(x, weight, bias, bn) or backends.requested("auto", IMPLEMENTATIONS) != "auto":
        return None
    stride, padding, dilation = geometry
    planned = plan(
        x, weight, bias, bn, stride=stride, padding=padding, dilation=dilation, act=act,
        squeeze=squeeze, cache=cache, once=True,
    )  # fmt: skip
    return planned.run if planned.backend == "native" and x.numel() else None
