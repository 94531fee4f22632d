"""Whether two tensors share memory: the question every op that writes in place asks first."""

from __future__ import annotations

from torch import Tensor


def one_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def same_view(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same elements in the same order, given that they share storage."""
    return (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share an element; exact for channel slices of one NHWC buffer."""
    if not one_storage(a, b) or 0 in (a.numel(), b.numel()):
        return False
    (first_a, last_a), (first_b, last_b) = (_bytes(t) for t in (a, b))
    if last_a <= first_b or last_b <= first_a:
        return False
    pixel = a.stride(3) if a.dim() == 4 else 0
    sliced = (
        a.dim() == b.dim() == 4
        and a.dtype == b.dtype
        and (a.shape[0], *a.shape[2:]) == (b.shape[0], *b.shape[2:])
        and (a.stride(0), *a.stride()[2:]) == (b.stride(0), *b.stride()[2:])
        and a.stride(1) == b.stride(1) == 1
        and pixel > 0
        and all(t.stride(d) % pixel == 0 for t in (a, b) for d in (0, 2))
    )
    if not sliced:
        return True
    starts = [t.storage_offset() % pixel for t in (a, b)]
    stops = [start + t.shape[1] for start, t in zip(starts, (a, b), strict=True)]
    if max(stops) > pixel:
        return True
    return bool(starts[0] < stops[1] and starts[1] < stops[0])


def _bytes(t: Tensor) -> tuple[int, int]:
    """Where in its storage the tensor's first element begins, and the last that it reaches ends."""
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    first, itemsize = int(t.storage_offset()), t.element_size()
    return first * itemsize, (first + span + 1) * itemsize
