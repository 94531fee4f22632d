"""A plan on CUDA as one CUDA graph: captured at its first call, replayed at every later one."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from cvkernels import record
from cvkernels.freeze.plan import Plan

# Calls before the capture: Triton compiles and cuDNN chooses in them.
WARM_UP = 2


class CudaGraph:
    """Runs a plan by replaying its CUDA graph, one call at a time.

    Input and output of a graph are always the same memory: a call copies its input there, replays,
    and returns a copy of the output. All happens on the caller's stream under a lock, and an event
    keeps a call on another stream from writing the input before the one before it is done.
    """

    pool: Any = None
    pool_lock = threading.Lock()

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._lock = threading.Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: Tensor | None = None
        self._output: Any = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, x: Tensor) -> Any:
        if record.active() is not None or torch.cuda.is_current_stream_capturing():
            return self.plan(x)
        with self._lock, torch.cuda.device(x.device):
            if self._graph is None:
                self._capture(x)
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            self._input.copy_(x)
            self._graph.replay()
            result = map_aggregate(
                self._output, lambda part: part.clone() if isinstance(part, Tensor) else part
            )
            self._done.record(stream)
            return result

    def _capture(self, x: Tensor) -> None:
        with CudaGraph.pool_lock:
            if CudaGraph.pool is None:
                CudaGraph.pool = torch.cuda.graph_pool_handle()
            self._input = x.clone(memory_format=torch.channels_last)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.plan(self._input)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile: only this one's calls are the graph's.
            with torch.cuda.graph(graph, pool=CudaGraph.pool, capture_error_mode="thread_local"):
                self._output = self.plan(self._input)
            self._done = torch.cuda.Event()
            self._done.record()
            self._graph = graph
