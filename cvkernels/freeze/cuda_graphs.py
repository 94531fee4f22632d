"""A plan on CUDA as one CUDA graph: captured at its first call, replayed at every later one."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from cvkernels import record
from cvkernels.freeze.plan import Plan

# Calls before the capture: Triton compiles and cuDNN chooses in them.
WARM_UP = 2


class Pool:
    """What the graphs of one frozen model share: memory, so that they run one after the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.handle = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()


class CudaGraph:
    """Runs a plan by replaying its CUDA graph, one call at a time.

    Input and output of a graph are always the same memory: a call copies its input there, replays,
    and returns a copy of the output. All happens on the caller's stream under the pool's lock, and
    an event keeps a call on another stream from writing before the one ahead of it is done.

    A plan that cannot be captured, since a module that it calls as it is waits for the GPU, runs
    step by step, with one warning.
    """

    def __init__(self, plan: Plan, pool: Pool) -> None:
        self.plan = plan
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False

    def __call__(self, x: Tensor) -> Any:
        watched = record.active() is not None or torch.cuda.is_current_stream_capturing()
        if self._refused or watched:
            return self.plan(x)
        with self._pool.lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._pool.done)
            if self._graph is None:
                try:
                    self._capture(x)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    self._refuse(error)
                    return self.plan(x)
            self._input.copy_(x)
            self._graph.replay()
            result = map_aggregate(
                self._output, lambda part: part.clone() if isinstance(part, Tensor) else part
            )
            self._pool.done.record(stream)
            return result

    def _capture(self, x: Tensor) -> None:
        self._input = x.clone(memory_format=torch.channels_last)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.plan(self._input)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: only this one's calls are the graph's.
        with torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode="thread_local"):
            self._output = self.plan(self._input)
        # The graph writes into its arena at every replay; no other call may get that one.
        self._arena = self.plan.take_arenas()
        self._graph = graph

    def _refuse(self, error: RuntimeError) -> None:
        self._refused = True
        self._input = None
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"freeze: the model cannot be captured as a CUDA graph and runs step by step ({why})",
            stacklevel=4,
        )
