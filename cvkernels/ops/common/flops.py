"""What PyTorch's ``FlopCounterMode`` counts of the ops that it cannot see into.

It counts the products of matrices and convolutions, multiply-adds as two, and takes no note of what
has no formula. A compiled op computes with packed weights: the sizes are those of its maps. Images
that are given a channel of zeros, in int8, count with it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

COUNTER = "torch.utils.flop_counter"  # which takes a tenth of a second to import


def tell() -> bool:
    """Give the counters that are active the formulas; True."""
    if COUNTER in sys.modules:
        for mode in dispatch_modes():
            counter = getattr(mode, "counter", None)
            if isinstance(counter, sys.modules[COUNTER].FlopCounterMode):
                for name, formula in FORMULAS.items():
                    counter.flop_registry.setdefault(getattr(torch.ops.cvkernels, name), formula)
    return True


def _convolution(x: Tensor, weight: Tensor, *others: Any, out_val: object) -> int:
    """Of the ops that are given an output and the kernel's sizes after three or four tensors."""
    _, out, *_ = others
    return 2 * out.numel() * x.shape[1] * math.prod(others[6:8])


def _depthwise(
    x: Tensor, weight: Tensor, affine: Tensor, kernel: int, *others: Any, out_val: object
) -> int:
    """out is dense, with its channels last or second: its number of elements is what counts."""
    out = next(t for t in others if isinstance(t, Tensor))
    return 2 * out.numel() * kernel**2


def _layers(x: Tensor, weight1: Tensor, *others: Any, out_val: object) -> int:
    """Of the two layers of squeeze-and-excitation."""
    return 2 * 2 * x.shape[0] * weight1.shape[0] * x.shape[1]


def _grouped(x: Tensor, weight: Tensor, *others: Any, out_val: Any) -> int:
    """Of the registered convolutions, which have the weight as the caller has it."""
    out = others[-1] if out_val is None else out_val
    out = out[0] if isinstance(out, tuple) else out
    return 2 * out.numel() * math.prod(weight.shape[1:])


FORMULAS: dict[str, Callable[..., int]] = {
    "conv_bn_act": _grouped, "conv_bn_act_out": _grouped, "depthwise_conv_bn_act": _grouped,
    "depthwise_conv_bn_act_squeeze": _grouped, "conv_bn_act_native": _convolution,
    "conv_bn_act_quantised": _convolution, "depthwise_conv_bn_act_native": _depthwise,
    "depthwise_conv_bn_act_quantised": _depthwise, "excite": _layers, "excite_native": _layers,
    "squeeze_excite": _layers, "squeeze_excite_native_out": _layers,
}  # fmt: skip
