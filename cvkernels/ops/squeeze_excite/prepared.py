"""Plans of the block's native ops, as blocks call them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels.ops.common.layout import is_nhwc
from cvkernels.ops.squeeze_excite.excite import plan as plan_excite
from cvkernels.ops.squeeze_excite.op import plan
from cvkernels.ops.squeeze_excite.scale import plan as plan_scale

Run = Callable[..., Tensor]


def prepared(x, weight1, bias1, weight2, bias2, act, residual, out_act) -> Run | None:
    layers = (weight1, bias1, weight2, bias2)
    planned = plan(x, *layers, act, residual, out_act, once=True)
    if planned.backend != "native":
        return None

    def run(x, residual=None, out=None):
        y = planned.run(x, residual)
        return y if out is None else out.copy_(y)

    return run


def prepared_gate(x, sums, weight1, bias1, weight2, bias2, act):
    layers = (weight1, bias1, weight2, bias2)
    if not (is_nhwc(x) and x.is_contiguous(memory_format=torch.channels_last)):
        return None
    excite = plan_excite(sums, *layers, act, count=x.shape[2] * x.shape[3], once=True)
    if excite.backend != "native":
        return None
    scale = plan_scale(x, excite.run(sums), out=x, once=True)
    return lambda x, sums: scale.run(x, excite.run(sums), None, x)
