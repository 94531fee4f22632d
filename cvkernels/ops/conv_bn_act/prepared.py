"""A plan of conv_bn_act's native and oneDNN backends, as blocks call it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.autograd import needs_grad
from cvkernels.ops.conv_bn_act.op import IMPLEMENTATIONS, ImagePlan, plan

Run = Callable[..., Tensor]


def prepared(x, weight, bias, bn, geometry, act, residual, cache, input_bn=None) -> Run | None:
    tensors = (x, weight, bias, bn, residual, input_bn)
    if not x.is_cpu or needs_grad(*tensors) or not x.numel():
        return None
    if backends.requested("auto", IMPLEMENTATIONS) != "auto":
        return None
    stride, padding, dilation, groups = geometry
    planned = plan(
        x, weight, bias, bn, stride=stride, padding=padding, dilation=dilation, groups=groups,
        act=act, residual=residual, input_bn=input_bn, cache=cache, once=True,
    )  # fmt: skip
    if planned.backend == "reference" or isinstance(planned, ImagePlan):
        return None
    return lambda x, residual=None, out=None: planned.run(x, residual, None, out)
