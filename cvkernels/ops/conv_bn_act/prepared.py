"""A checked conv_bn_act call as a function of its data, for who calls it again and again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.conv_bn_act import native, onednn
from cvkernels.ops.conv_bn_act.checks import problem_of
from cvkernels.ops.conv_bn_act.op import IMPLEMENTATIONS, needs_grad, select

# (x, residual=None, out=None) -> the output, which is out where that is given.
Run = Callable[..., Tensor]


def prepared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormParams | None,
    geometry: tuple,
    act: str,
    residual: Tensor | None,
    cache: DerivedWeights,
    input_bn: BatchNormParams | None = None,
) -> Run | None:
    """What runs this call on another x and residual of the same shapes and dtypes, unchecked.

    It holds the folded weights, so it is right while the parameters stay as they are. None where
    "auto" runs something else than the native convolution or oneDNN's, autograd has to see the
    call, or x is an image, whose values oneDNN's relu could hide.
    """
    tensors = (x, weight, bias, bn, residual, input_bn, None)
    if not x.is_cpu or needs_grad(tensors):
        return None
    if backends.requested("auto", IMPLEMENTATIONS) != "auto":
        return None
    problem = problem_of(x, weight, bias, bn, *geometry, act, residual, input_bn, None, None, None)
    if not problem.bytes_written:
        return None
    if not native.why_not(problem):
        return native.prepared(problem, weight, bias, bn, input_bn, cache)
    if problem.C <= 4 or select(problem, x, False, "auto").backend != "onednn":
        return None
    convolve = onednn.prepared(problem, weight, bias, bn, cache)

    def run(x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        y = convolve(x, residual)
        return y if out is None else out.copy_(y)

    return run
