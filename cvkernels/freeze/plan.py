"""The plan of one input shape: its steps, its arena, and how a call runs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cvkernels import backend, record
from cvkernels.freeze.backends import is_gpu
from cvkernels.freeze.graph import Graph, Op, Ref, Run, Step, TensorSpec, fill, mapped
from cvkernels.freeze.lower import Lowered
from cvkernels.freeze.memory import Memory, new_arena
from cvkernels.freeze.ops import Call, Conv, Copy, Input, PlannedConv, Quantise
from cvkernels.freeze.programs import Env, Segment, recordable
from cvkernels.freeze.progress import progress
from cvkernels.freeze.steps import Site
from cvkernels.functional import DerivedWeights
from cvkernels.ops.common.autograd import has_dispatch_modes
from cvkernels.ops.common.launches import Launched, collecting
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.common.work import Prediction, Work, model_of, predict
from cvkernels.ops.conv_bn_act.problem import Problem

# Arenas that a plan keeps for later calls; more calls at once than this allocate theirs.
KEPT = 8


class Plan:
    """Runs a graph on inputs of one shape. Threads may share it: each call has an arena."""

    def __init__(
        self,
        graph: Graph,
        x: TensorSpec,
        device: torch.device,
        caches: dict[Op, DerivedWeights],
        table: Mapping[str, str],
    ) -> None:
        self.device = device
        self.on_cuda = device.type == "cuda"
        self.output = graph.output
        self.lowered = Lowered(graph, graph.infer(x, device), device, table)
        self.input = graph.nodes[0].op
        assert isinstance(self.input, Input)
        image = graph.nodes[0]
        readers = [node.op for node in graph.nodes if image in node.inputs]
        self.takes_any_layout = all(isinstance(op, Quantise) for op in readers)
        self.dtype = x.dtype
        self.shape, self.staged_shape = x.shape, self.lowered.values[graph.nodes[0]].shape
        self.memory = Memory(self.lowered)
        index = self.memory.index
        self.fixed = frozenset(index[step] for step in index if self.memory.in_arena(step))
        self._idle: deque[Env] = deque()
        # Here rather than in the first call, so that too little memory is an error of planning.
        self._idle.append(self._new_env())
        self.steps: list[tuple[Step, Run | None]] = []
        self.traffic: dict[Step, Traffic] = {}
        self.backends: dict[Step, str] = {}
        # The GPU whose times are predicted, if the plan is for one that the model knows.
        self.gpu = None
        if is_gpu(device):
            self.gpu = model_of(backend.gpu(torch.empty(0, device=device))[1])
        self.work: dict[Step, tuple[Work, ...]] = {}
        native = set()
        with progress("freeze", len(index)) as advance:
            for step in index:
                site = Site(self.memory, step, caches, self._idle[0])
                run = step.op.build(site)
                self.steps.append((step, run))
                self.traffic[step] = site.traffic
                self.backends[step] = site.backend
                if self.gpu is not None and run is not None:
                    self.work[step] = site.work(self.gpu)
                if site.recordable:
                    native.add(step)
                advance()
        self.recorded = recordable(self.memory, native)
        self.run_order = self._run_order()
        self.results = [(index[step], self._needs_copy(step)) for step in self.lowered.results]
        self.single = isinstance(self.output, Ref)
        self.returned = [0, *(n for n, _ in self.results if n not in self.fixed)]
        self.hides_nan = any(
            step.backend == "onednn" or isinstance(step.op, Quantise) for step in self.memory.steps
        )

    def __call__(self, x: Tensor) -> Any:
        # A graph's arena is memory of its own, that no other call gets.
        captured = self.on_cuda and torch.cuda.is_current_stream_capturing()
        env = self._new_env() if captured else self._idle_env()
        env[0] = self.staged(x)
        watched = record.active() is not None or torch.autograd._profiler_enabled()
        if watched or has_dispatch_modes():
            self._run_watched(env)
        else:
            for run in self.run_order:
                run(env)
        results = [
            copied(env[number], x) if shared else laid_out(env[number], x)
            for number, shared in self.results
        ]
        for number in self.returned:
            env[number] = None
        # oneDNN's relu and bytes turn NaN into 0: a bad image must not give plausible logits.
        if self.hides_nan and not math.isfinite(x.sum().item()):
            _spoil(results, x)
        if not captured:
            self._give_back(env)
        return results[0] if self.single else fill(self.output, results)

    def staged(self, x: Tensor) -> Tensor:
        """Images as the first step reads them; those that are staged already as they are."""
        if self.takes_any_layout and x.dtype is self.dtype:
            return x
        if self.input.channels is None or x.shape == self.staged_shape:
            return self._in_channels_last(x)
        N, C, H, W = self.staged_shape
        memory = x.new_zeros(N, H, W, C, dtype=self.dtype).permute(0, 3, 1, 2)
        self.images(memory).copy_(x)
        return memory

    def _in_channels_last(self, x: Tensor) -> Tensor:
        """The images in the plan's dtype, themselves where they are so."""
        if x.dtype is self.dtype:
            return x.contiguous(memory_format=torch.channels_last)
        return x.to(self.dtype, memory_format=torch.channels_last)

    def images(self, staged: Tensor) -> Tensor:
        """Where in the memory of staged images they themselves are."""
        return self.input.images(staged, self.shape)

    def launches(self) -> list[tuple[str, Launched]]:
        """The launches of Triton kernels in a call, each with its layer; nothing runs.

        Of a plan for the meta device, if it was made where they are collected.
        """
        env = self._idle_env()
        found: list[tuple[str, Launched]] = []
        for step, run in self.steps:
            if run is None or "triton" not in self.backends[step]:
                continue
            site = Site(self.memory, step, {}, env)
            for number in (*site.inputs, site.out):
                env[number] = site.like(number)
            with collecting() as launched:
                run(env)
            found += [(step.layer, one) for one in launched]
            for number in {*self.memory.index.values()} - self.fixed:
                env[number] = None
        self._give_back(env)
        return found

    def each_step(self, x: Tensor) -> Iterator[tuple[Step, Callable[[], None]]]:
        """The steps of a call in their order, each with what runs it; it is to run before the next
        one is asked for, and may run several times."""
        env = self._idle_env()
        env.programs.clear()  # the steps make their tensors anew
        env[0] = self.staged(x)
        for step, run in self.steps:
            if run is not None:
                yield step, functools.partial(run, env)
        for number in {*self.memory.index.values()} - self.fixed:
            env[number] = None
        self._give_back(env)

    def walk(self, x: Tensor) -> Iterator[tuple[Step, Env]]:
        """Run the steps of a call one by one; each with all values, once it has run."""
        env = self._idle_env()
        env.programs.clear()  # the steps make their tensors anew
        env[0] = self._in_channels_last(x)
        for step, run in self.steps:
            if run is not None:
                run(env)
            yield step, env
        for number in {*self.memory.index.values()} - self.fixed:
            env[number] = None
        self._give_back(env)

    def drop_arenas(self) -> list[Env]:
        """The idle arenas, which later calls get no more."""
        dropped = list(self._idle)
        self._idle.clear()
        return dropped

    def convolutions(self) -> list[tuple[Conv, Problem]]:
        """The graph's convolutions that ``table`` can choose for, with their prologues."""
        return [
            (node.op, node.op.problem(self.lowered.values[node.inputs[0]]))
            for node, planned in self.lowered.planned.items()
            if isinstance(planned, PlannedConv)
        ]

    def _idle_env(self) -> Env:
        try:
            env = self._idle.pop()
        except IndexError:
            return self._new_env()
        if env.done is not None:  # of a call on another stream, perhaps
            torch.cuda.current_stream(self.device).wait_event(env.done)
        return env

    def _give_back(self, env: Env) -> None:
        full = len(self._idle) >= KEPT
        if self.on_cuda:
            stream = torch.cuda.current_stream(self.device)
            if full:  # its memory is free for every stream then
                stream.synchronize()
            else:
                env.done = env.done or torch.cuda.Event()
                env.done.record(stream)
        if not full:
            self._idle.append(env)

    def _new_env(self) -> Env:
        """The values of a call before it: those in an arena of its own, and None for the others.

        One more, the last, is always None: it stands for what a step does not have.
        """
        env = Env([None] * (len(self.memory.index) + 1))
        # Memory of inference mode could not be written outside of it.
        with torch.inference_mode(False):
            arena = new_arena(self.memory.nbytes, self.device)
            for number in self.fixed:
                env[number] = self.memory.view(arena, self.memory.steps[number])
        return env

    def _run_order(self) -> list:
        """The steps' functions, and after each what forgets the tensors that are read no more.

        Steps that can be recorded together are one function, and their tensors are kept.
        """
        index = self.memory.index
        dying: dict[int, list[int]] = {}
        for step, last in self.memory.last.items():
            kept = index[step] in self.fixed or step in self.recorded
            if not kept and not isinstance(step.op, Input):
                dying.setdefault(last, []).append(index[step])
        order: list[Run] = []
        together: list[Run] = []

        def end_segment() -> None:
            if together:
                order.append(Segment(list(together)))
                together.clear()

        for number, (step, run) in enumerate(self.steps):
            if step in self.recorded and run is not None:
                together.append(run)
            elif run is not None:
                end_segment()
                order.append(run)
            if number in dying:
                end_segment()
                order.append(_forget(dying[number]))
        end_segment()
        return order

    def _needs_copy(self, step: Step) -> bool:
        """Whether a result lies in memory that a later call, or the caller, writes to."""
        if isinstance(step.op, (Input, Call)) or self.memory.in_arena(step):
            return True
        return step.op.views and any(self._needs_copy(source) for source in step.inputs)

    def _run_watched(self, env: Env) -> None:
        """Step by step, for ``explain``, a profiler or a mode to see."""
        refuse_traces()
        env.programs.clear()  # the steps make their tensors anew
        recorder = record.active()
        for step, run in self.steps:
            if run is None:
                continue
            if recorder is None:
                run(env)
                continue
            recorder.layer = step.layer
            if step.reports:
                run(env)
                continue
            about = (step.op.name, step.backend, self.reason(step))
            with recorder.call(*about, *self.traffic[step]):
                run(env)

    def prediction(self, step: Step) -> Prediction | None:
        """The time that the model of the plan's GPU predicts; None without one."""
        return None if self.gpu is None else predict(self.work.get(step, ()), self.gpu)

    def reason(self, step: Step) -> str:
        """Why the step is as it is, for ``explain`` and the report."""
        planned = isinstance(step.op, PlannedConv)
        if planned and self.memory.in_arena(step) and not step.op.writes:
            return "frozen; copied into its slice"
        if isinstance(step.op, Copy):
            return "frozen; its producer cannot write into the slice"
        if isinstance(step.op, Call):
            return "called as it is"
        note = "" if step.source is None else step.source.note
        return f"frozen; {note}" if note else "frozen"


def refuse_traces(x: Tensor | None = None) -> None:
    """Raise where torch.export, make_fx or torch.jit.trace records a call, on x: kernels write into
    memory that no graph has."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    if mode is not None or isinstance(x, FakeTensor) or torch.jit.is_tracing():
        raise RuntimeError(
            "frozen model: a frozen model cannot be traced or exported, and has no fake tensors; "
            "trace or export the model that it came from"
        )


def laid_out(value: Any, x: Tensor) -> Any:
    """A result as the model gives it: for contiguous images contiguous, within channels_last."""
    may_differ = isinstance(value, Tensor) and value.dim() > 2 and x.is_contiguous()
    return value.contiguous() if may_differ else value


def copied(value: Any, x: Tensor) -> Any:
    """value with its tensors copied for the caller to keep, maps as by :func:`laid_out`."""

    def copy_of(tensor: Tensor) -> Tensor:
        twin = laid_out(tensor, x)
        return tensor.clone() if twin is tensor else twin

    return _with_tensors(value, copy_of)


def converted(value: Any, dtype: torch.dtype, to: torch.dtype) -> Any:
    """value with its tensors of ``dtype`` in ``to``."""
    return _with_tensors(value, lambda tensor: tensor.to(to) if tensor.dtype is dtype else tensor)


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A result with each of its tensors changed; the model's dataclasses are copied."""

    def changed(part: Any) -> Any:
        if isinstance(part, Tensor):
            return change(part)
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            return part
        twin = copy.copy(part)
        for field in dataclasses.fields(part):
            object.__setattr__(twin, field.name, mapped(changed, getattr(part, field.name)))
        return twin

    return mapped(changed, value)


def _spoil(results: list, x: Tensor) -> None:
    """Make the results of images that hold NaN or infinity NaN."""
    bad = ~x.isfinite().flatten(1).all(1)
    for result in results:
        if isinstance(result, Tensor) and result.is_floating_point() and result.dim():
            if result.shape[0] == len(x):
                result[bad] = float("nan")


def _forget(numbers: list[int]) -> Run:
    def forget(env: list) -> None:
        for number in numbers:
            env[number] = None

    return forget
