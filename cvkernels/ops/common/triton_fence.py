"""The fences that Triton before 3.8 may leave out between cp.async and the tensor cores.

On Hopper and Blackwell, wgmma and tcgen05.mma read shared memory through another proxy than the one
that cp.async writes it through; by the PTX memory model a fence has to stand between them. Triton
3.6 emits none in pipelined loops (triton-lang/triton#9610 repairs that), and answers may then be
wrong from one call to the next. :func:`install` puts the fences where newer versions have them.
"""

from __future__ import annotations

import re
from typing import Any

import triton
from triton import knobs

FENCE = "fence.proxy.async.shared::cta;"
_FIXED = (3, 8)
_WAIT = re.compile(r"\bcp\.async\.wait_group\s+\d+;")
_PRODUCT = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\b")
_ENTRY = re.compile(r"\.entry\s+(\w+)")
# Names of the kernels whose code gets fences.
kernels: set[str] = set()


def fenced(ptx: str) -> str:
    """The code with a fence after each wait for a thread's own copies.

    The barrier behind the wait, which is there for the copies of the others, then serves the fences
    as well.
    """
    return _WAIT.sub(rf"\g<0>\n\t{FENCE}", ptx) if _PRODUCT.search(ptx) else ptx


def install() -> None:
    """Let Triton compile the kernels named in :data:`kernels` with fences, from now on."""
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version >= _FIXED or isinstance(knobs.runtime.add_stages_inspection_hook, _Hook):
        return
    knobs.runtime.add_stages_inspection_hook = _Hook(knobs.runtime.add_stages_inspection_hook)


class _Hook:
    """Wraps the stage of the compiler that makes PTX; calls the hook that was there before."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def __call__(self, *arguments: Any) -> Any:
        found = self.other(*arguments) if self.other is not None else None
        if not arguments:  # asked for what the cache's key depends on
            key, digest = found or ("", "")
            return key + FENCE, digest + FENCE
        stages = arguments[1]
        if (make := stages.get("ptx")) is not None:
            stages["ptx"] = lambda source, metadata: _of_ours(make(source, metadata))
        return found


def _of_ours(ptx: str) -> str:
    entry = _ENTRY.search(ptx)
    return fenced(ptx) if entry is not None and entry[1] in kernels else ptx
