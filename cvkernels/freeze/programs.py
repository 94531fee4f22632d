"""Native steps that follow one another as one call: recorded once in an arena, then repeated.

A small map spends longer in Python and in PyTorch's dispatcher than in its kernel, above all where
what they touch has left the caches since the last call. In an arena the addresses of all values
stay the same, so the checked work of a step can be kept and done again: what a CUDA graph is on a
GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable

import torch

from cvkernels.freeze.graph import Run, Step
from cvkernels.freeze.memory import Memory


class Env(list):
    """The values of a call before it, and for each segment of its plan what was recorded there.

    On CUDA ``done`` is when the call that had it last was.
    """

    def __init__(self, values: Iterable) -> None:
        super().__init__(values)
        self.programs: dict[Segment, Callable[[], None]] = {}
        self.done: torch.cuda.Event | None = None


class Segment:
    """Steps of a plan as one function of ``env``, which is to record all that they do."""

    def __init__(self, steps: list[Run]) -> None:
        self.steps = steps

    def __call__(self, env: Env) -> None:
        program = env.programs.get(self)
        if program is None:
            record = importlib.import_module("cvkernels._C").record
            program = env.programs[self] = record(lambda: self._run(env))
        program()

    def _run(self, env: Env) -> None:
        for step in self.steps:
            step(env)


def recordable(memory: Memory, native: Collection[Step]) -> set[Step]:
    """Those steps of ``native``, which record all their work, that can be repeated.

    Their inputs and results lie at the same addresses in every call with an arena. The gates of
    squeeze-and-excitation have none in it: their tensors, once recorded, are kept.
    """
    viewed = {source for step in memory.steps if step.op.views for source in step.inputs}
    returned = viewed.union(memory.lowered.results)
    steps: set[Step] = set()
    for step in memory.steps:
        kept = step.op.kept and step not in returned and step not in memory.place
        sources = all(memory.in_arena(source) or source in steps for source in step.inputs)
        if step in native and (kept or memory.in_arena(step)) and sources:
            steps.add(step)
    return steps
