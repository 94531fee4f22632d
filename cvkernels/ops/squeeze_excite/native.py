"""The compiled se_scale and its parts: csrc/squeeze_excite/cpu.cpp, on the CPU.

Activations are passed as their number in ``ACTS``, and matrices without the 1x1 of a convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.squeeze_excite.layouts import fits, fitting, is_nhwc, matrices, new_like

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTS = {"none": 0, "relu": 1, "silu": 3}  # as csrc/common/act.h counts them
_LAYERS = "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, int act"

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define("squeeze_native(Tensor x) -> Tensor")
library.define("squeeze_native_out(Tensor x, Tensor(a!) out) -> ()")
library.define(f"excite_native(Tensor pooled, {_LAYERS}, bool sigmoid, int count) -> Tensor")
library.define("se_scale_native(Tensor x, Tensor gate, Tensor? residual, int act) -> Tensor")
library.define(
    f"squeeze_excite_native(Tensor x, {_LAYERS}, Tensor? residual, int out_act) -> Tensor"
)
library.define(
    "se_scale_native_out(Tensor x, Tensor gate, Tensor? residual, int act, Tensor(a!) out) -> ()"
)
library.define(
    f"squeeze_excite_native_out(Tensor x, {_LAYERS}, Tensor? residual, int out_act, "
    f"Tensor(a!) out) -> ()"
)
library.define(
    "se_scale_native_sums(Tensor grad, Tensor x, Tensor? out, Tensor(a!)? masked, "
    "Tensor(b!) sums) -> ()"
)
library.define(
    "se_scale_native_shifted(Tensor x, Tensor scale, Tensor shift, Tensor(a!) out) -> ()"
)
extension.load()

# They check their arguments; the three that "auto" may call at once refuse all that the ops'
# contracts refuse: squeeze, se_scale and squeeze_excite.
squeeze_of = torch.ops.cvkernels.squeeze_native.default
excite_of = torch.ops.cvkernels.excite_native.default
se_scale_of = torch.ops.cvkernels.se_scale_native.default
squeeze_excite_of = torch.ops.cvkernels.squeeze_excite_native.default
se_scale_out = torch.ops.cvkernels.se_scale_native_out.default
squeeze_excite_out = torch.ops.cvkernels.squeeze_excite_native_out.default


def why_not(dtype: torch.dtype, device: str) -> str:
    """Why the compiled ops cannot run on tensors of ``device``; empty where they can."""
    if device != "cpu":
        return f"the native implementation needs CPU tensors, got {device}"
    if dtype not in DTYPES:
        return f"the native implementation computes in float32, float16 and bfloat16, got {dtype}"
    return "" if extension.has("cpu") else extension.status()["cpu"].reason


def squeeze(x: Tensor) -> Tensor:
    return squeeze_of(fitting(x, is_nhwc(x)))


def excite(
    pooled: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    sigmoid: bool,
    count: int | None,
) -> Tensor:
    layers = matrices(weight1, bias1, weight2, bias2)
    return excite_of(pooled.contiguous(), *layers, ACTS[act], sigmoid, count or 0)


def se_scale(
    x: Tensor, gate: Tensor, residual: Tensor | None, act: str, out: Tensor | None = None
) -> Tensor:
    """out is one that x's kernels can write."""
    nhwc = is_nhwc(x)
    residual = None if residual is None else fitting(residual, nhwc)
    out = new_like(x) if out is None else out
    se_scale_out(fitting(x, nhwc), gate.contiguous(), residual, ACTS[act], out)
    return out


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    residual: Tensor | None,
    out_act: str,
    out: Tensor | None = None,
) -> Tensor:
    nhwc = is_nhwc(x)
    layers = matrices(weight1, bias1, weight2, bias2)
    residual = None if residual is None else fitting(residual, nhwc)
    out = new_like(x) if out is None else out
    squeeze_excite_out(fitting(x, nhwc), *layers, ACTS[act], residual, ACTS[out_act], out)
    return out


def has_gradient(x: Tensor, act: str) -> bool:
    """Whether :func:`backward` and :func:`scale_shifted` take maps like x and this activation."""
    return act in ("none", "relu") and is_nhwc(x) and fits(x, True)


def backward(
    grad: Tensor, x: Tensor, gate: Tensor, out: Tensor | None, act: str, input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.gradients.se_scale_backward`, of channels_last maps."""
    grad = fitting(grad, True)
    masks = act == "relu"
    masked = new_like(x) if masks else None
    sums = torch.empty(gate.shape, dtype=torch.float32)
    torch.ops.cvkernels.se_scale_native_sums.default(
        grad, x, fitting(out, True) if masks else None, masked, sums
    )
    s = torch.sigmoid(gate.float())
    dz = masked if masks else grad
    dx = scale_shifted(dz, s, torch.zeros_like(s)) if input_grad else x.new_empty(0)
    return dx, (sums * (s * (1 - s))).to(gate.dtype), masked if masks else x.new_empty(0)


def scale_shifted(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift``, both [N, C] in float32, of a channels_last x."""
    out = new_like(x)
    torch.ops.cvkernels.se_scale_native_shifted.default(
        x, scale.contiguous(), shift.contiguous(), out
    )
    return out


@torch.library.register_fake("cvkernels::se_scale_native_sums", lib=library)
def _(grad, x, out, masked, sums):
    return None


@torch.library.register_fake("cvkernels::se_scale_native_shifted", lib=library)
def _(x, scale, shift, out):
    return None


@torch.library.register_fake("cvkernels::squeeze_native", lib=library)
def _(x):
    return x.new_empty(x.shape[:2])


@torch.library.register_fake("cvkernels::squeeze_native_out", lib=library)
def _(x, out):
    return None


@torch.library.register_fake("cvkernels::excite_native", lib=library)
def _(pooled, weight1, bias1, weight2, bias2, act, sigmoid, count):
    return pooled.new_empty(pooled.shape, dtype=weight1.dtype if count else pooled.dtype)


@torch.library.register_fake("cvkernels::se_scale_native", lib=library)
def _(x, gate, residual, act):
    return new_like(x)


@torch.library.register_fake("cvkernels::squeeze_excite_native", lib=library)
def _(x, weight1, bias1, weight2, bias2, act, residual, out_act):
    return new_like(x)


@torch.library.register_fake("cvkernels::se_scale_native_out", lib=library)
def _(x, gate, residual, act, out):
    return None


@torch.library.register_fake("cvkernels::squeeze_excite_native_out", lib=library)
def _(x, weight1, bias1, weight2, bias2, act, residual, out_act, out):
    return None
