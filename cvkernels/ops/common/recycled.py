"""Results of planned CPU calls: large ones in memory that freed ones lay in."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common import native

BYTES = 1 << 22  # from which fresh memory costs more than its reuse

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define("recycled(Tensor like) -> Tensor")
extension.load()

_recycled = torch.ops.cvkernels.recycled.default


@torch.library.register_fake("cvkernels::recycled", lib=library)
def _(like: Tensor) -> Tensor:
    return torch.empty_like(like)


def maker(out: Tensor) -> Callable[[], Tensor]:
    """What makes uninitialised tensors with out's sizes, strides and dtype. It does not keep out.

    When a large one is freed, its memory is kept for the next, up to 256 MB in all, or up to the
    bytes in use where those are more; above that it goes back to the operating system.
    """
    large = out.is_cpu and out.nbytes >= BYTES
    fresh = _recycled if large else torch.empty_like
    return functools.partial(fresh, native.template(out))
