"""How a plan is captured as a CUDA graph and replayed: torch.cuda in fakes that run on CPU.

What a capture meets is recorded by a dispatch mode, and a replay computes it again from the memory
that it read then to the memory that it wrote then, as a CUDA graph does.
"""

import contextlib
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cvkernels
from cvkernels.freeze import plan as plans
from cvkernels.freeze.cuda_graphs import WARM_UP, CudaGraph, Pool


class Recording(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, result))
        return result


class Graph:
    """In torch.cuda.CUDAGraph's place."""

    made = []

    def __init__(self):
        self.calls = []
        Graph.made.append(self)

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    waited_for = ()

    def wait_event(self, event):
        self.waited_for = (*self.waited_for, event)

    def wait_stream(self, stream):
        pass


class Event:
    recorded_on = ()

    def record(self, stream):
        self.recorded_on = (*self.recorded_on, stream)


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """torch.cuda as far as cuda_graphs uses it, and steps that run one by one, as on a GPU."""
    monkeypatch.setattr(plans, "recordable", lambda memory: set())

    @contextlib.contextmanager
    def capturing(graph, pool, capture_error_mode):
        assert pool == "pool" and capture_error_mode == "thread_local"
        with Recording(graph):
            yield

    stream = Stream()
    Graph.made.clear()
    fakes = {
        "graph_pool_handle": lambda: "pool",
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capturing,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda: stream,
        "is_current_stream_capturing": lambda: False,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return stream


class Net(nn.Module):
    """A value in the arena that is read twice, a concatenation, and logits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.left, self.right = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def graphed(*shapes):
    """(frozen, {shape: CudaGraph}), the graphs in one pool as those of one frozen model."""
    frozen = cvkernels.freeze(Net().eval(), torch.randn(shapes[0]))
    pool = Pool()
    return frozen, {shape: CudaGraph(frozen.plan_for(torch.empty(shape)), pool) for shape in shapes}


SMALL, LARGE = (1, 3, 8, 8), (2, 3, 12, 10)


def test_replays_give_what_the_plan_gives_and_each_its_own_memory():
    frozen, graphs = graphed(SMALL, LARGE)
    pairs = []
    for shape in (SMALL, LARGE, SMALL, LARGE, SMALL):
        x = torch.randn(shape)
        pairs.append((graphs[shape](x), frozen(x)))
    for replayed, expected in pairs:  # no later call wrote to an earlier one's result
        torch.testing.assert_close(replayed, expected)
    assert len({replayed.data_ptr() for replayed, _ in pairs}) == len(pairs)
    assert len(Graph.made) == 2


def test_other_calls_of_the_plan_do_not_get_the_graph_s_arena():
    _, graphs = graphed(SMALL)
    graph = graphs[SMALL]
    x = torch.randn(SMALL)
    first = graph(x)
    (arena,) = graph._arena
    written = {t.data_ptr() for t in arena if isinstance(t, Tensor)}
    assert written
    plan_env = graph.plan._new_env()
    assert written.isdisjoint(t.data_ptr() for t in plan_env if isinstance(t, Tensor))
    graph.plan(torch.randn(SMALL))
    torch.testing.assert_close(graph(x), first)


def test_an_input_of_any_strides_is_copied_into_the_graph():
    frozen, graphs = graphed(LARGE)
    x = torch.randn(LARGE)
    expected = frozen(x)
    for layout in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        torch.testing.assert_close(graphs[LARGE](layout), expected)


def test_the_capture_comes_after_warm_up_calls(monkeypatch):
    _, graphs = graphed(SMALL)
    graph, calls = graphs[SMALL], []
    plan = graph.plan
    graph.plan = lambda x: calls.append(len(Graph.made)) or plan(x)
    graph.plan.take_arenas = plan.take_arenas
    graph(torch.randn(SMALL))
    graph(torch.randn(SMALL))
    assert calls == [0] * WARM_UP + [1]


def test_what_cannot_be_captured_runs_step_by_step_with_one_warning(monkeypatch):
    @contextlib.contextmanager
    def refusing(graph, pool, capture_error_mode):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refusing)
    frozen, graphs = graphed(SMALL)
    x = torch.randn(SMALL)
    with pytest.warns(UserWarning, match="runs step by step .*not permitted when stream"):
        torch.testing.assert_close(graphs[SMALL](x), frozen(x))
    torch.testing.assert_close(graphs[SMALL](x), frozen(x))  # and no second try
    assert len(Graph.made) == 1


def test_too_little_memory_for_a_capture_is_the_caller_s_error(monkeypatch):
    def full(graph, pool, capture_error_mode):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", full)
    with pytest.raises(torch.OutOfMemoryError):
        graphed(SMALL)[1][SMALL](torch.randn(SMALL))


def test_every_call_waits_for_the_one_ahead_of_it(cuda):
    _, graphs = graphed(SMALL)
    for _ in range(3):
        graphs[SMALL](torch.randn(SMALL))
    done = graphs[SMALL]._pool.done
    assert cuda.waited_for == (done,) * 3 and done.recorded_on == (cuda,) * 3


@pytest.mark.parametrize("watcher", ["explain", "outer capture"])
def test_somebody_else_s_capture_and_explain_see_the_steps(watcher, monkeypatch):
    frozen, graphs = graphed(SMALL)
    x = torch.randn(SMALL)
    expected = frozen(x)
    if watcher == "explain":
        recorder = cvkernels.record.Recorder()
        with cvkernels.record.recording(recorder):
            result = graphs[SMALL](x)
        assert recorder.calls
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        result = graphs[SMALL](x)
    torch.testing.assert_close(result, expected)
    assert not Graph.made


def test_threads_take_turns():
    frozen, graphs = graphed(SMALL, LARGE)
    inputs = [torch.randn((SMALL, LARGE)[i % 2]) for i in range(24)]
    expected, results = [frozen(x) for x in inputs], [None] * 24

    def serve(first):
        for i in range(first, 24, 4):
            results[i] = graphs[tuple(inputs[i].shape)](inputs[i])

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, right in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, right)
