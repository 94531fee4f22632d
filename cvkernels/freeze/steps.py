"""Where a step stands in its plan: what an op needs to build the step's function.

The function closes over all that does not change from call to call. It takes ``env``, the list of
the values of one call. Values in the arena are there from the start; a step writes into them, or
puts a tensor of its own into its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvkernels.freeze.graph import Op, Run, Step, TensorSpec
from cvkernels.freeze.memory import Memory
from cvkernels.functional import DerivedWeights
from cvkernels.ops.common.plan import Plan
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.common.work import GPU, Work


class Site:
    """Where one step finds its values in ``env``.

    ``number`` is the index of its value, ``inputs`` has those of its inputs, and ``none`` is that
    of an entry that is always None. ``out`` is the index of the memory that the value is written
    to, or ``none`` where the step allocates it. The ``env`` given here holds the memory of an
    arena; ``caches`` keeps what backends derive from an op's weights. ``plans`` are the plans that
    the step runs in a call, each as often as it runs it.
    """

    def __init__(
        self, memory: Memory, step: Step, caches: dict[Op, DerivedWeights], env: list
    ) -> None:
        self.memory = memory
        self.step = step
        self.plans: list[Plan] = []
        self._caches = caches
        self._env = env
        self.none = len(memory.index)
        self.number = memory.index[step]
        self.inputs = [memory.index[source] for source in step.inputs]
        self.out = self.none
        if memory.in_arena(step):
            self.out = self.number
        elif step in memory.place:  # over its input
            self.out = memory.index[memory.place[step][0]]

    @property
    def cache(self) -> DerivedWeights:
        cache = DerivedWeights(capacity=8, constant=True)
        return self._caches.setdefault(self.step.source.op, cache)

    def like(self, number: int) -> Tensor | None:
        """A tensor like the value of that number in every call."""
        if number == self.none or self._env[number] is not None:
            return self._env[number]
        step = self.memory.steps[number]
        if step in self.memory.place:  # channels of a tensor that its step makes
            whole, start = self.memory.place[step]
            return self.like(self.memory.index[whole])[:, start : start + step.value.shape[1]]
        return step.value.empty(self.memory.lowered.device)

    def plan(self, make: Callable[..., Plan], *like: Any, times: int = 1, **options: Any) -> Any:
        """What ``make``, the plan function of a public op, plans for tensors like these.

        ``times`` is how often the step runs it. Its work stays PyTorch's dispatcher's, where it can
        be recorded and watched.
        """
        backend = "native" if self.step.backend.startswith("native") else "auto"
        plan = make(*like, **options, backend=backend, once=True)
        self.plans += [plan] * times
        return plan if self.step.reports else plan.run

    @property
    def traffic(self) -> Traffic:
        """What the step costs. (A plan that was asked holds no tensor that it was made for.)"""
        if not self.plans:
            return self.step.op.traffic(self.step)
        return Traffic(*map(sum, zip(*(plan.traffic for plan in self.plans), strict=True)))

    def work(self, gpu: GPU) -> tuple[Work, ...]:
        """What the step's launches do on ``gpu``."""
        if not self.plans:
            return self.step.op.work(self.step, gpu)
        return tuple(work for plan in self.plans for work in plan.work(gpu))

    @property
    def backend(self) -> str:
        """What runs the step: of a public op, what its plan chose."""
        if self.step.backend != "cvkernels":
            return self.step.backend
        return " + ".join(dict.fromkeys(plan.backend for plan in self.plans)) or "cvkernels"

    @property
    def recordable(self) -> bool:
        """Whether compiled ops that record their work, and no copies, are all that runs."""
        every = [plan.backend.startswith("native") for plan in self.plans]
        return bool(every) and all(every) and self.traffic.kernels == len(every)

    def role(self, name: str) -> int:
        source = self.step.role(name)
        return self.none if source is None else self.memory.index[source]

    def reader(self, kind: type[Op]) -> int:
        """The value of the step of that op that reads this one's."""
        for other, number in self.memory.index.items():
            if isinstance(other.op, kind) and other.inputs[0] is self.step:
                return number
        return self.none

    def written(self, write: Callable[[list, Tensor], object]) -> Run:
        """A step that writes its value into memory that is there."""
        number, out = self.number, self.out

        def run(env: list) -> None:
            y = env[out]
            write(env, y)
            env[number] = y

        return run

    def computed(self, compute: Callable[[list], Tensor]) -> Run:
        """A step whose value is a tensor of its own, copied where it has a place."""
        number, value, placed = self.number, self.step.value, self.out != self.none
        is_map = isinstance(value, TensorSpec) and len(value.shape) == 4

        def run(env: list) -> None:
            y = compute(env)
            if placed:
                env[number].copy_(y)
            else:
                env[number] = y.contiguous(memory_format=torch.channels_last) if is_map else y

        return run
