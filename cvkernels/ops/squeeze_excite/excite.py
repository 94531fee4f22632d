"""excite: the two layers between the squeeze and the gate."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend, Choice
from cvkernels.ops.squeeze_excite import native, tiles
from cvkernels.ops.squeeze_excite.checks import (
    ACTS,
    DTYPES,
    check_act,
    check_layers,
    check_pooled,
    parameter_dtypes,
)
from cvkernels.ops.squeeze_excite.reference import excite_reference
from cvkernels.ops.squeeze_excite.select import (
    IMPLEMENTATIONS,
    Traffic,
    nbytes,
    needs_grad,
    registered_backend,
    run,
    select,
)


def excite(
    pooled: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "relu",
    *,
    sigmoid: bool = False,
    count: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The gate's logits: ``out = act(mean @ weight1.T + bias1) @ weight2.T + bias2``.

    ``mean`` is ``pooled``, or ``pooled / count`` where ``count`` is given.

    Args:
        pooled: Tensor[N, C] of means, float32, float16, bfloat16 or float64; with ``count``, of
            sums over that many pixels, in float32 (or float64, with weights in float64).
        weight1: Tensor[R, C], or the weight [R, C, 1, 1] of a 1x1 convolution; pooled's dtype, or
            float32 beside a half dtype; with ``count`` any of the four. All parameters have one
            dtype.
        bias1: Tensor[R].
        weight2: Tensor[C, R] or [C, R, 1, 1].
        bias2: Tensor[C].
        act: "relu" or "silu".
        sigmoid: returns the multiplier ``sigmoid(out)``, as ``conv_bn_act(input_gate=)`` takes it.
        count: pixels of the map that pooled sums over.
        backend: see :mod:`cvkernels.backend`; the rule is that of :func:`se_scale`. Triton keeps
            the hidden layer on chip: R is at most 512, else "auto" runs the reference.

    Returns:
        Tensor[N, C], contiguous, never a view: dtype of pooled; of weight1, with ``count``. The
        fused backends compute in float32 throughout. NaN and infinity propagate. N = 0 gives an
        empty output.

    Raises:
        ValueError: a shape, device, act or count does not fit.
        TypeError: a dtype is not listed above, or the parameters differ in theirs.
        BackendError: the requested backend cannot run this call.

    Differentiable in pooled and every parameter. Equal inputs give equal bits. Source: Hu et al.
    2018, arXiv:1709.01507, eq. 3.
    """
    layers = (weight1, bias1, weight2, bias2)
    choice = choose(pooled, *layers, act, sigmoid=sigmoid, count=count, backend=backend)

    def fused() -> Tensor:
        if choice.backend == "native":
            return native.excite(pooled, *layers, act, sigmoid, count)
        if needs_grad(pooled, *layers) or torch.compiler.is_compiling():
            name = registered_backend(choice, backend)
            return torch.ops.cvkernels.excite(pooled, *layers, act, sigmoid, count or 0, name)
        return triton_excite(pooled, *layers, act, sigmoid, count)

    def reference() -> Tensor:
        return excite_reference(pooled, *layers, act, sigmoid=sigmoid, count=count)

    def traffic() -> Traffic:
        itemsize = pooled.element_size() if count is None else weight1.element_size()
        return Traffic(1, nbytes(pooled, *layers), pooled.numel() * itemsize)

    return run("excite", choice, fused, reference, traffic)


def choose(
    pooled: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "relu",
    *,
    sigmoid: bool = False,
    count: int | None = None,
    backend: Backend = "auto",
) -> Choice:
    """The backend that :func:`excite` runs for the same arguments, and the rule that chose it."""
    check_pooled("excite", pooled, count)
    check_act("excite", "act", act, ACTS)
    dtypes = parameter_dtypes(pooled.dtype)
    if count is not None:
        dtypes = DTYPES[:3] if pooled.dtype == torch.float32 else (torch.float64,)
    layers = (weight1, bias1, weight2, bias2)
    check_layers("excite", *layers, pooled.shape[1], pooled, dtypes)
    grad = needs_grad(pooled, *layers)
    requested = backends.requested(backend, IMPLEMENTATIONS)
    return select("excite", pooled, grad, requested, triton_limit(weight1))


backends.answers("excite", choose)


def triton_limit(weight1: Tensor) -> str:
    """Why Triton cannot run the layers; empty where it can."""
    R = weight1.shape[0]
    if R <= tiles.LARGEST_R:
        return ""
    return f"Triton keeps the hidden layer on chip, and R = {R} is over {tiles.LARGEST_R}"


def triton_excite(pooled: Tensor, *arguments) -> Tensor:
    if pooled.is_meta:
        weight1, count = arguments[0], arguments[-1]
        return pooled.new_empty(
            pooled.shape, dtype=pooled.dtype if count is None else weight1.dtype
        )
    from cvkernels.ops.squeeze_excite import triton_launch

    return triton_launch.excite(pooled, *arguments)
