"""A plan on CUDA as one CUDA graph: captured at its first call, replayed at every later one."""

from __future__ import annotations

import contextlib
import operator
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cvkernels import record
from cvkernels.freeze.graph import Ref, Step
from cvkernels.freeze.ops import Call
from cvkernels.freeze.plan import Plan, copied
from cvkernels.tables import first_line

# Calls before the capture: Triton compiles and cuDNN chooses in them.
WARM_UP = 2
# Of what is called as it is, what a capture may meet: code of these packages, but for functions
# and methods that wait for the GPU.
CAPTURABLE = ("torch.", "torchvision.ops.", "cvkernels.", "_operator.")
WAITS = frozenset(
    "allclose argwhere bincount cpu equal is_nonzero item masked_select multinomial nonzero numpy "
    "one_hot repeat_interleave tolist unique unique_consecutive".split()
)
# One capture at a time in a process: it has to do with the state of random generators, too.
_capturing = threading.Lock()


class Pool:
    """What the graphs of one frozen model share: memory, so that they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.Lock()
        with torch.cuda.device(device):
            self.handle = torch.cuda.graph_pool_handle()
            self.done = torch.cuda.Event()
            # Of this device: torch.cuda.graph's own is of the first device that captured.
            self.stream = torch.cuda.Stream()


class CudaGraph:
    """Runs a plan by replaying its CUDA graph, one call at a time.

    Input and output of a graph are always the same memory: a call copies its input there, replays,
    and returns a copy of the output. All happens on the caller's stream under the pool's lock, and
    an event keeps a call on another stream from writing before the one ahead of it is done.

    A capture that fails is made good as far as PyTorch lets it, and the plan then runs step by
    step; :func:`may_be_captured` keeps those away that would fail.
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
                    self._refuse(error, stream)
                    return self.plan(x)
            self._images.copy_(x)
            self._graph.replay()
            result = copied(self._output, x)
            self._pool.done.record(stream)
            return result

    # Whatever the caller's mode: tensors of inference mode could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, x: Tensor) -> None:
        staged = self.plan.staged(x)
        if staged is x:
            staged = x.clone(memory_format=torch.channels_last)
        self._images = self.plan.images(staged)
        side = self._pool.stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.plan(staged)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: only this one's calls are the graph's.
        only_this = {"stream": side, "capture_error_mode": "thread_local"}
        with _capturing, torch.cuda.graph(graph, self._pool.handle, **only_this):
            self._output = self.plan(staged)  # in an arena of the graph's memory
        self.plan.drop_arenas()
        self._graph = graph

    def _refuse(self, error: RuntimeError, stream: torch.cuda.Stream) -> None:
        self._refused = True
        self._images = None
        # torch 2.11 leaves the capture's stream current, its random generator in the capture, and
        # the pool open.
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError), _capturing:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._pool.stream):
                pass
        torch.cuda.set_stream(stream)
        self._pool.handle = torch.cuda.graph_pool_handle()
        warnings.warn(
            f"freeze: the model cannot be captured as a CUDA graph and runs step by step "
            f"({first_line(error)})",
            stacklevel=4,
        )


def may_be_captured(step: Step) -> bool:
    """False for a call of code that may wait for the GPU."""
    call = step.op
    if not isinstance(call, Call):
        return True
    target, args = call.target, call.args
    if call.kind == "method":
        # A device is a string or torch.device: to() another one waits.
        devices = [arg for arg in args[1:] if isinstance(arg, (str, torch.device))]
        moves = target == "to" and (devices or "device" in call.kwargs)
        return target not in WAITS and not moves
    if isinstance(target, nn.Module):
        return all(
            f"{type(module).__module__}.".startswith(CAPTURABLE)
            and not (module._forward_hooks or module._forward_pre_hooks)
            for module in target.modules()
        )
    if target is operator.getitem and any(isinstance(part, Ref) for part in tree_leaves(args[1])):
        return False  # a mask, perhaps
    if target is torch.where and len(args) == 1:
        return False
    if target is getattr:  # a shape or a dtype
        return True
    home = getattr(target, "__module__", "") or "torch"  # torch's built-in functions have None
    return f"{home}.".startswith(CAPTURABLE) and getattr(target, "__name__", "") not in WAITS
