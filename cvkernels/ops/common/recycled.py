"""Results of planned CPU calls: large ones in memory of others that are gone."""

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

    Of large ones the memory goes to the next such tensor when they are gone. The process keeps
    256 MB of it, or as much as is in use; the rest is the system's again.
    """
    large = out.is_cpu and out.nbytes >= BYTES
    fresh = _recycled if large else torch.empty_like
    return functools.partial(fresh, native.template(out))
