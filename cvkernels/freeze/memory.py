"""Where the values of a plan live: one arena, slices of shared buffers, and when each is free.

Intervals are packed greedily, the largest first, each at the lowest place that is free for as long
as it lives (Pisarchyk and Lee 2020, arXiv:2001.03288, greedy by size).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cvkernels.freeze.graph import Step
from cvkernels.freeze.lower import Lowered
from cvkernels.freeze.ops import Buffer, Cat, Copy, Input, Part, Sums

ALIGNMENT = 64


@dataclass
class Interval:
    """``nbytes`` that are needed from step ``first`` to step ``last``; packed at ``offset``."""

    nbytes: int
    first: int
    last: int
    offset: int = 0


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def pack(intervals: Iterable[Interval]) -> int:
    """Give every interval its offset; the bytes of all together."""
    placed: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (-i.nbytes, i.first)):
        size = _aligned(interval.nbytes)
        others = [o for o in placed if o.first <= interval.last and interval.first <= o.last]
        best, gap_of_best, end = None, 0, 0
        for other in sorted(others, key=lambda o: o.offset):
            gap = other.offset - end
            if gap >= size and (best is None or gap < gap_of_best):
                best, gap_of_best = end, gap
            end = max(end, _aligned(other.offset + other.nbytes))
        interval.offset = end if best is None else best
        placed.append(interval)
    return max((_aligned(i.offset + i.nbytes) for i in placed), default=0)


class Memory:
    """The storage of every value of ``lowered``.

    ``steps`` are those of ``lowered`` and the copies that concatenations need, ``index`` has their
    numbers. A value is in the arena, in its own buffer or in that of its :meth:`root`, or it is a
    tensor that its step makes.
    """

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        # A value that lies in another's buffer: that one, and its first channel there.
        self.place: dict[Step, tuple[Step, int]] = {}
        self.steps = self._concatenate()
        self.index = {step: number for number, step in enumerate(self.steps)}
        self.last = self._last_uses()
        self._overwrite()
        self.intervals = self._intervals()
        self.nbytes = pack(self.intervals.values())

    def root(self, step: Step) -> tuple[Step, int]:
        """Whose buffer the value lies in, and its first channel there."""
        start = 0
        while step in self.place:
            step, offset = self.place[step]
            start += offset
        return step, start

    def in_arena(self, step: Step) -> bool:
        return self.root(step)[0] in self.intervals

    def slices(self, step: Step) -> bool:
        """Whether the value is part of another's buffer."""
        return step in self.place

    @property
    def live_bytes(self) -> int:
        """Bytes of all values that the arena holds, each on its own."""
        return sum(
            step.nbytes
            for step in self.steps
            if self.in_arena(step) and not isinstance(step.op, (Cat, Part))
        )

    def view(self, arena: Tensor, step: Step) -> Tensor:
        """The value's memory in an arena, a flat tensor of bytes."""
        root, start = self.root(step)
        whole, part = root.value, step.value
        offset = self.intervals[root].offset
        flat = arena[offset : offset + whole.nbytes].view(whole.dtype)
        if len(whole.shape) != 4:
            return flat.view(whole.shape)
        N, C, H, W = whole.shape
        buffer = flat.view(N, H, W, C).permute(0, 3, 1, 2)
        return buffer[:, start : start + part.shape[1]] if root is not step else buffer

    def _concatenate(self) -> list[Step]:
        """The steps, with copies; the parts of each concatenation get channels of its buffer.

        A concatenation of some neighbouring parts of a larger one is a slice of that.
        """
        steps = self.lowered.steps
        self.place = {
            step: (step.inputs[0], step.op.start) for step in steps if isinstance(step.op, Part)
        }
        cats = [step for step in steps if isinstance(step.op, Cat)]
        cats.sort(key=lambda step: -_channels(step))
        copies: dict[Step, list[Step]] = {}
        whole: list[Step] = []
        for cat in cats:
            if cat not in self.place and (found := _run_of(cat, whole)) is not None:
                larger, skipped = found
                start = sum(map(_channels, larger.inputs[:skipped]))
                self.place[cat] = (larger, start)
                continue
            whole.append(cat)
            overlaps = cat not in self.place and self._begins_in_siblings(cat)
            start = _channels(cat.inputs[0]) if overlaps else 0
            for part in cat.inputs[overlaps:]:
                target = part
                placeable = part.op.placeable or (isinstance(part.op, Cat) and part not in whole)
                if not placeable or part in self.place:
                    backend = self.lowered.backend(Copy(), part.value.dtype)
                    target = Step(Copy(), [part], cat.layer, backend, part.value)
                    copies.setdefault(part, []).append(target)
                self.place[target] = (cat, start)
                start += _channels(part)
        return [step for one in steps for step in (one, *copies.get(one, ()))]

    def _begins_in_siblings(self, cat: Step) -> bool:
        """Let cat's buffer begin where its first part lies in that of merged siblings.

        Then both are slices of a buffer that is no step's value. False where the part is not their
        last, or they lie in another buffer already.
        """
        part = cat.inputs[0]
        if not isinstance(part.op, Part):
            return False
        siblings, start = self.place[part]
        if siblings in self.place or start + _channels(part) != _channels(siblings):
            return False
        N, C, H, W = cat.value.shape
        value = cat.value._replace(shape=(N, start + C, H, W))
        buffer = Step(Buffer(), [], cat.layer, value=value)
        self.place[siblings] = (buffer, 0)
        self.place[cat] = (buffer, start)
        return True

    def _last_uses(self) -> dict[Step, int]:
        """The last step that may read each value."""
        last = dict(self.index)
        for result in self.lowered.results:
            last[result] = len(self.index)
        for step in reversed(self.steps):
            for source in step.inputs:
                # Reading a view keeps its base alive.
                until = last[step] if step.op.views else self.index[step]
                last[source] = max(last[source], until)
        return last

    def _overwrite(self) -> None:
        """Let steps write over an input that no later step reads."""
        for step in self.steps:
            if not step.op.in_place or step in self.place:
                continue
            x = step.inputs[0]
            alone = x not in self.place and not x.op.views and not isinstance(x.op, (Input, Cat))
            if alone and self.last[x] == self.index[step] and x not in step.inputs[1:]:
                self.place[step] = (x, 0)

    def _intervals(self) -> dict[Step, Interval]:
        intervals: dict[Step, Interval] = {}
        for step in self.steps:
            root, _ = self.root(step)
            if not root.op.writes:
                continue
            computed = step.inputs[0] if isinstance(step.op, Sums) else step
            first, last = self.index[computed], self.last[step]
            interval = intervals.setdefault(root, Interval(root.nbytes, first, last))
            interval.first = min(interval.first, first)
            interval.last = max(interval.last, last)
        return intervals


def _channels(step: Step) -> int:
    return step.value.shape[1]


def _run_of(cat: Step, larger: list[Step]) -> tuple[Step, int] | None:
    """A concatenation that has cat's parts in a row, and how many parts are before them."""
    count = len(cat.inputs)
    for other in larger:
        for skipped in range(len(other.inputs) - count + 1):
            if other.inputs[skipped : skipped + count] == cat.inputs:
                return other, skipped
    return None


def new_arena(nbytes: int, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
