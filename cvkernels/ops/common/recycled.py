"""Large maps on the CPU in memory that freed ones lay in.

When one is freed, its memory is kept for the next, up to 256 MB in all, or up to the bytes in use
where those are more; above that it goes back to the operating system.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common import layout, native
from cvkernels.ops.common.layout import is_nhwc, new_channels_last

BYTES = 1 << 22  # from which fresh memory costs more than its reuse
MAPPED = 1 << 25  # from which malloc never has memory that is not fresh

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define("recycled(Tensor like) -> Tensor")
extension.load()

_recycled = torch.ops.cvkernels.recycled.default


@torch.library.register_fake("cvkernels::recycled", lib=library)
def _(like: Tensor) -> Tensor:
    return torch.empty_like(like)


def maker(out: Tensor) -> Callable[[], Tensor]:
    """What makes uninitialised tensors with out's sizes, strides and dtype. It does not keep out.

    Large ones lie in memory that freed ones lay in.
    """
    large = out.is_cpu and out.nbytes >= BYTES
    fresh = _recycled if large else torch.empty_like
    return functools.partial(fresh, native.template(out))


def empty(
    shape: Sequence[int], dtype: torch.dtype, form: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """``torch.empty`` on the CPU, for eager calls alone: a large one as :func:`maker` makes it."""
    return _maker(tuple(shape), dtype, form)()


def new_map(
    like: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """An :func:`empty` channels_last tensor on like's device; like its shape and dtype, too."""
    shape, dtype = like.shape if shape is None else shape, dtype or like.dtype
    if not like.is_cpu or type(like) is not Tensor or not extension.has("cpu"):
        return new_channels_last(like, shape, dtype)
    return empty(shape, dtype, torch.channels_last)


def new_like(x: Tensor) -> Tensor:
    """:func:`.layout.new_like`, for eager calls alone."""
    return new_map(x) if is_nhwc(x) else layout.new_like(x)


@functools.lru_cache(maxsize=1024)
def _maker(
    shape: tuple[int, ...], dtype: torch.dtype, form: torch.memory_format
) -> Callable[[], Tensor]:
    return maker(torch.empty(shape, dtype=dtype, device="cpu", memory_format=form))
