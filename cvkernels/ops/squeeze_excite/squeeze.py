"""squeeze: the mean of each channel over a map."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend, Choice
from cvkernels.ops.common.native import REFUSED, at_once
from cvkernels.ops.squeeze_excite import native, tiles
from cvkernels.ops.squeeze_excite.checks import check_map
from cvkernels.ops.squeeze_excite.layouts import fits, is_nhwc
from cvkernels.ops.squeeze_excite.reference import squeeze_reference
from cvkernels.ops.squeeze_excite.select import (
    IMPLEMENTATIONS,
    Traffic,
    nbytes,
    needs_grad,
    registered_backend,
    run,
    select,
)


def squeeze(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The mean of each channel: ``out[n, c] = mean over h, w of x[n, c, h, w]``.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; contiguous, channels_last and
            channel slices of a channels_last buffer are fast, other strides are copied first.
        backend: see :mod:`cvkernels.backend`; the rule is that of :func:`se_scale`.

    Returns:
        Tensor[N, C], dtype of x, contiguous; never a view of x. Sums are in float32 (float64 for
        float64), so that no sum overflows a half dtype. NaN and infinity propagate. N = 0 gives an
        empty output.

    Raises:
        ValueError: x is not 4-dimensional, or has no channels or no pixels.
        TypeError: dtype not listed above.
        BackendError: the requested backend cannot run this call.

    Differentiable in x. Equal inputs give equal bits. Source: Hu et al. 2018, arXiv:1709.01507,
    eq. 2.
    """
    if at_once(backend, x):
        try:
            return native.squeeze_of(x)
        except REFUSED:
            pass
    choice = choose(x, backend=backend)

    def fused() -> Tensor:
        if choice.backend == "native":
            return native.squeeze(x)
        if needs_grad(x) or torch.compiler.is_compiling():
            name = registered_backend(choice, backend)
            return torch.ops.cvkernels.squeeze(x, name)
        return triton_squeeze(x)

    def traffic() -> Traffic:
        copied = 0 if fits(x, is_nhwc(x)) else 1
        launches = 1 if choice.backend == "native" or tiles.parts_of(x) == 1 else 2
        moved = nbytes(x) * copied
        means = x.shape[0] * x.shape[1] * x.element_size()
        return Traffic(launches + copied, nbytes(x) + moved, means + moved)

    return run("squeeze", choice, fused, lambda: squeeze_reference(x), traffic)


def choose(x: Tensor, *, backend: Backend = "auto") -> Choice:
    """The backend that :func:`squeeze` runs for the same arguments, and the rule that chose it."""
    check_map("squeeze", x)
    return select("squeeze", x, needs_grad(x), backends.requested(backend, IMPLEMENTATIONS))


backends.answers("squeeze", choose)


def triton_squeeze(x: Tensor) -> Tensor:
    if x.is_meta:
        return x.new_empty(x.shape[:2])
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.squeeze_excite import triton_launch

    return triton_launch.squeeze(x)
