"""Native steps that follow one another as one call: recorded once in an arena, then repeated.

A small map spends longer in Python and in PyTorch's dispatcher than in its kernel, above all where
what they touch has left the caches since the last call. In an arena the addresses of all values
stay the same, so the checked work of a step can be kept and done again: what a CUDA graph is on a
GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cvkernels import extension
from cvkernels.freeze.graph import Run, Step
from cvkernels.freeze.memory import Memory
from cvkernels.freeze.ops import GRAPH_OPS, PLAN_OPS

RECORDED = frozenset(
    f"cvkernels::{op.kernel}" for op in (*GRAPH_OPS.values(), *PLAN_OPS) if op.kernel
)


class Env(list):
    """The values of a call before it, and for each segment of its plan what was recorded there.

    On CUDA ``done`` is when the call that had it last was.
    """

    def __init__(self, values: Iterable, segments: int) -> None:
        super().__init__(values)
        self.programs: list[Callable[[], None] | None] = [None] * segments
        self.done: torch.cuda.Event | None = None


class Segment:
    """Steps of a plan as one function of ``env``; number ``place`` among its plan's."""

    def __init__(self, steps: list[Run], place: int) -> None:
        self.steps = steps
        self.place = place

    def __call__(self, env: Env) -> None:
        program = env.programs[self.place]
        if program is None:
            program = env.programs[self.place] = self._record(env)
        program()

    def _record(self, env: Env) -> Callable[[], None]:
        """What does the work of the steps in this env's arena."""
        calls = _Calls()

        def run() -> None:
            for step in self.steps:
                step(env)

        def check() -> None:
            with calls:
                run()

        program = importlib.import_module("cvkernels._C").record(check)
        return program if calls.only_recorded and len(program) == calls.count else run


class _Calls(TorchDispatchMode):
    """Counts the ops that record their work, and hears of any other that makes or moves data."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.only_recorded = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in RECORDED:
            self.count += 1
        elif not func.is_view:
            self.only_recorded = False
        return func(*args, **(kwargs or {}))


def recordable(memory: Memory) -> set[Step]:
    """The steps whose inputs and results lie at the same addresses in every call with an arena.

    The gates of squeeze-and-excitation have none in it: their tensors, once recorded, are kept.
    """
    if not extension.has("cpu"):
        return set()
    viewed = {source for step in memory.steps if step.op.views for source in step.inputs}
    returned = viewed.union(memory.lowered.results)
    steps: set[Step] = set()
    for step in memory.steps:
        kept = step.op.kept and step not in returned and step not in memory.place
        sources = all(memory.in_arena(source) or source in steps for source in step.inputs)
        if (kept or memory.in_arena(step)) and sources and step.inputs:
            if step.backend.startswith("native"):
                steps.add(step)
    return steps
