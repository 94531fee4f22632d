"""Where a step stands in its plan: what an op needs to build the step's function.

The function closes over all that does not change from call to call. It takes ``env``, the list of
the values of one call. Values in the arena are there from the start; a step writes into them, or
puts a tensor of its own into its place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels.freeze.graph import Node, Op, Run, Step, TensorSpec
from cvkernels.freeze.memory import Memory
from cvkernels.functional import DerivedWeights


class Site:
    """One step's numbers in ``env``: its value's, its inputs', and ``none`` of what is always None.

    ``out`` is the number of the memory that the value is written to, ``none`` where the step
    allocates it. ``caches`` keeps what backends derive from a node's weights.
    """

    def __init__(self, memory: Memory, step: Step, caches: dict[Node, DerivedWeights]) -> None:
        self.memory = memory
        self.step = step
        self._caches = caches
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
        return self._caches.setdefault(self.step.source, cache)

    @property
    def kernel(self) -> Callable | None:
        """The op's native implementation, where that runs the step."""
        if self.step.backend != "native":
            return None
        return getattr(torch.ops.cvkernels, self.step.op.kernel).default

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
        number, value = self.number, self.step.value
        if self.out != self.none:

            def run(env: list) -> None:
                env[number].copy_(compute(env))

        elif isinstance(value, TensorSpec) and len(value.shape) == 4:

            def run(env: list) -> None:
                env[number] = compute(env).contiguous(memory_format=torch.channels_last)

        else:

            def run(env: list) -> None:
                env[number] = compute(env)

        return run
