"""A checked conv_bn_act call as a function of its data, for who calls it again and again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.batch_norm import BatchNormParams
from cvkernels.ops.conv_bn_act import onednn
from cvkernels.ops.conv_bn_act.checks import problem_of
from cvkernels.ops.conv_bn_act.op import IMPLEMENTATIONS, needs_grad, select
from cvkernels.ops.derived_weights import DerivedWeights

Run = Callable[[Tensor, Tensor | None], Tensor]


def prepared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormParams | None,
    geometry: tuple,
    act: str,
    residual: Tensor | None,
    cache: DerivedWeights,
) -> Run | None:
    """What runs this call on another x and residual of the same shapes and dtypes, unchecked.

    It holds the folded weights, so it is right while the parameters stay as they are. None where
    "auto" runs something else than oneDNN, autograd has to see the call, or x is an image, whose
    values are looked at.
    """
    tensors = (x, weight, bias, bn, residual, None, None)
    if not x.is_cpu or x.shape[1] <= 4 or needs_grad(tensors):
        return None
    if backends.requested("auto", IMPLEMENTATIONS) != "auto":
        return None
    problem = problem_of(x, weight, bias, bn, *geometry, act, residual, None, None, None, None)
    if not problem.bytes_written or select(problem, x, False, "auto").backend != "onednn":
        return None
    return onednn.prepared(problem, weight, bias, bn, cache)
