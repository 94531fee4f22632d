"""Where the values of a plan live: one arena, slices of shared buffers, and when each is free.

Intervals are packed greedily, the largest first, each at the lowest place that is free for as long
as it lives (Pisarchyk and Lee 2020, arXiv:2001.03288, greedy by size).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cvkernels.freeze.graph import Like, Node
from cvkernels.freeze.lower import Lowered

ALIGNMENT = 64
# Ops whose result may be a view of an input.
VIEWS = ("flatten", "part", "call")
# Ops that may write their result over their first input, element by element.
IN_PLACE = ("se", "scale")
# Ops whose result a step can put into a slice of a larger buffer.
PLACEABLE = (
    "conv", "conv_pool", "depthwise", "affine", "max_pool", "avg_pool", "se", "scale", "copy",
    "act", "add",
)  # fmt: skip


@dataclass
class Interval:
    """``nbytes`` that are needed from step ``first`` to step ``last``; packed at ``offset``."""

    nbytes: int
    first: int
    last: int
    offset: int = 0


def pack(intervals: Iterable[Interval]) -> int:
    """Give every interval its offset; the bytes of all together."""
    placed: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (-i.nbytes, i.first)):
        size = -(-interval.nbytes // ALIGNMENT) * ALIGNMENT
        others = [o for o in placed if o.first <= interval.last and interval.first <= o.last]
        best, gap_of_best, end = None, 0, 0
        for other in sorted(others, key=lambda o: o.offset):
            gap = other.offset - end
            if gap >= size and (best is None or gap < gap_of_best):
                best, gap_of_best = end, gap
            end = max(end, -(-(other.offset + other.nbytes) // ALIGNMENT) * ALIGNMENT)
        interval.offset = end if best is None else best
        placed.append(interval)
    return max((-(-(i.offset + i.nbytes) // ALIGNMENT) * ALIGNMENT for i in placed), default=0)


class Memory:
    """The storage of every value of ``lowered``; it may insert copies among its steps.

    A value is in the arena (``root`` and ``start``, its first channel in the root's buffer), or a
    tensor that its step makes (absent from ``roots``). Only nodes whose ``parent`` is None have a
    buffer.
    """

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        # A value that lies in another's buffer: that one, and its first channel there.
        self.place: dict[Node, tuple[Node, int]] = {}
        self._concatenate()
        self.index = {step: number for number, step in enumerate(lowered.steps)}
        self.last = self._last_uses()
        self._overwrite()
        self.intervals = self._intervals()
        self.nbytes = pack(self.intervals.values())

    def root(self, step: Node) -> tuple[Node, int]:
        """Whose buffer the value lies in, and its first channel there."""
        start = 0
        while step in self.place:
            step, offset = self.place[step]
            start += offset
        return step, start

    def in_arena(self, step: Node) -> bool:
        return self.root(step)[0] in self.intervals

    def slices(self, step: Node) -> bool:
        """Whether the value is part of another's buffer."""
        return step in self.place

    @property
    def live_bytes(self) -> int:
        """Bytes of all values that the arena holds, each on its own."""
        return sum(
            self.lowered.values[step].nbytes
            for step in self.index
            if self.in_arena(step) and step.op not in ("cat", "part")
        )

    def view(self, arena: Tensor, step: Node) -> Tensor:
        """The value's memory in an arena, a flat tensor of bytes."""
        root, start = self.root(step)
        whole, part = self.lowered.values[root], self.lowered.values[step]
        offset = self.intervals[root].offset
        flat = arena[offset : offset + whole.nbytes].view(whole.dtype)
        if len(whole.shape) != 4:
            return flat.view(whole.shape)
        N, C, H, W = whole.shape
        buffer = flat.view(N, H, W, C).permute(0, 3, 1, 2)
        return buffer[:, start : start + part.shape[1]] if root is not step else buffer

    def _concatenate(self) -> None:
        """Give the parts of each concatenation their channels of its buffer.

        A concatenation of some neighbouring parts of a larger one is a slice of that.
        """
        steps, values = self.lowered.steps, self.lowered.values
        self.place = {
            step: (step.inputs[0], step.attrs["start"]) for step in steps if step.op == "part"
        }
        cats = [step for step in steps if step.op == "cat"]
        cats.sort(key=lambda step: -values[step].shape[1])
        copies: dict[Node, list[Node]] = {}
        whole: list[Node] = []
        for cat in cats:
            if cat not in self.place and (found := _run_of(cat, whole)) is not None:
                larger, skipped = found
                start = sum(values[part].shape[1] for part in larger.inputs[:skipped])
                self.place[cat] = (larger, start)
                continue
            whole.append(cat)
            overlaps = cat not in self.place and self._begins_in_siblings(cat)
            start = values[cat.inputs[0]].shape[1] if overlaps else 0
            for part in cat.inputs[overlaps:]:
                target = part
                placeable = part.op in PLACEABLE or (part.op == "cat" and part not in whole)
                if not placeable or part in self.place:
                    target = Node("copy", [part], cat.layer, backend=self._copies_by(part))
                    values[target] = values[part]
                    copies.setdefault(part, []).append(target)
                self.place[target] = (cat, start)
                start += values[part].shape[1]
        self.lowered.steps = [
            step for one in steps for step in (one, *copies.get(one, ()))
        ]  # fmt: skip

    def _begins_in_siblings(self, cat: Node) -> bool:
        """Let cat's buffer begin where its first part lies in that of merged siblings.

        Then both are slices of a buffer that is no step's value. False where the part is not their
        last, or they lie in another buffer already.
        """
        part = cat.inputs[0]
        if part.op != "part":
            return False
        siblings, start = self.place[part]
        values = self.lowered.values
        total = values[siblings].shape[1]
        if siblings in self.place or start + values[part].shape[1] != total:
            return False
        whole = values[cat]
        N, C, H, W = whole.shape
        buffer = Node("buffer", [], cat.layer)
        values[buffer] = Like((N, start + C, H, W), whole.dtype)
        self.place[siblings] = (buffer, 0)
        self.place[cat] = (buffer, start)
        return True

    def _copies_by(self, part: Node) -> str:
        native = self.lowered.native(self.lowered.values[part].dtype)
        return "native" if native else "cvkernels"

    def _last_uses(self) -> dict[Node, int]:
        """The last step that may read each value."""
        last = dict(self.index)
        for result in self.lowered.results:
            last[result] = len(self.index)
        for step in reversed(self.lowered.steps):
            for source in step.inputs:
                # Whoever reads a view reads what it is a view of.
                until = last[step] if step.op in VIEWS else self.index[step]
                last[source] = max(last[source], until)
        return last

    def _overwrite(self) -> None:
        """Let steps write over their input where nobody else reads it any more."""
        for step in self.lowered.steps:
            if step.op not in IN_PLACE or step in self.place:
                continue
            x = step.inputs[0]
            alone = x not in self.place and x.op not in (*VIEWS, "input", "cat")
            if alone and self.last[x] == self.index[step] and x not in step.inputs[1:]:
                self.place[step] = (x, 0)

    def _intervals(self) -> dict[Node, Interval]:
        intervals: dict[Node, Interval] = {}
        for step in self.lowered.steps:
            root, _ = self.root(step)
            if root.op not in ("cat", "buffer") and not self.lowered.writes(root):
                continue
            first, last = self.index[step], self.last[step]
            if step.op == "sums":
                first = self.index[step.inputs[0]]
            if root in intervals:
                interval = intervals[root]
                interval.first = min(interval.first, first)
                interval.last = max(interval.last, last)
            else:
                intervals[root] = Interval(self.lowered.values[root].nbytes, first, last)
        return intervals


def _run_of(cat: Node, larger: list[Node]) -> tuple[Node, int] | None:
    """A concatenation that has cat's parts in a row, and how many parts are before them."""
    count = len(cat.inputs)
    for other in larger:
        for skipped in range(len(other.inputs) - count + 1):
            if other.inputs[skipped : skipped + count] == cat.inputs:
                return other, skipped
    return None


def new_arena(nbytes: int, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
