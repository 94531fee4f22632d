"""How a plan is captured as a CUDA graph and replayed: torch.cuda in fakes that run on CPU.

What a capture meets is recorded by a dispatch mode, and a replay computes it again from the memory
that it read then to the memory that it wrote then, as a CUDA graph does.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cvkernels
from cvkernels.freeze import frozen as freezing
from cvkernels.freeze import plan as plans
from cvkernels.freeze.cuda_graphs import WARM_UP, CudaGraph, Pool, may_be_captured


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

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    waited_for = ()
    wait_stream = synchronize = lambda self, *other: None

    def wait_event(self, event):
        self.waited_for = (*self.waited_for, event)


class Event:
    recorded_on = ()

    def record(self, stream):
        self.recorded_on = (*self.recorded_on, stream)


class Cuda:
    """torch.cuda as far as freeze uses it, each name a fake."""

    def __init__(self):
        self.current, self.capturing, self.pools = Stream(), False, 0
        self.end_capture = lambda: None
        self.Event, self.Stream, self.CUDAGraph = Event, Stream, Graph

    def graph_pool_handle(self):
        self.pools += 1
        return f"pool {self.pools}"

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert isinstance(stream, Stream) and not self.capturing
        self.capturing = True
        with self.stream(stream), Recording(graph):
            yield
            self.end_capture()
        self.capturing = False

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield  # an error leaves the stream, as in torch 2.11
        self.current = before

    def set_stream(self, stream):
        self.current = stream

    device = staticmethod(contextlib.nullcontext)

    def current_stream(self, device=None):
        return self.current

    def is_current_stream_capturing(self):
        return self.capturing


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """The fakes, and steps that run one by one, as on a GPU."""
    monkeypatch.setattr(plans, "recordable", lambda *_: set())
    fakes = Cuda()
    Graph.made.clear()
    for name in dir(fakes):
        if not name.startswith("_") and hasattr(torch.cuda, name):
            monkeypatch.setattr(torch.cuda, name, getattr(fakes, name))
    return fakes


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


def graphed(*shapes, model=None):
    """(frozen, {shape: CudaGraph}), the graphs in one pool as those of one frozen model."""
    frozen = cvkernels.freeze((model or Net()).eval(), torch.randn(shapes[0]))
    pool, graphs = Pool(frozen.device), {}
    for shape in shapes:
        plan = frozen.plan_for(torch.empty(shape))
        plan.on_cuda = True
        graphs[shape] = CudaGraph(plan, pool)
    return frozen, graphs


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
    frozen, graphs = graphed(SMALL)
    graph, x = graphs[SMALL], torch.randn(SMALL)
    first = graph(x)
    written = {
        t.data_ptr()
        for *_, result in Graph.made[0].calls
        for t in tree_leaves(result)
        if isinstance(t, Tensor)
    }
    assert not graph.plan.drop_arenas()  # none that the warm-up left
    for _ in range(2):
        graph.plan(torch.randn(SMALL))
        (env,) = graph.plan._idle
        assert written.isdisjoint(t.data_ptr() for t in env if isinstance(t, Tensor))
    torch.testing.assert_close(graph(x), first)


def test_an_arena_waits_for_the_stream_that_had_it(cuda):
    _, graphs = graphed(SMALL)
    plan, first, second = graphs[SMALL].plan, cuda.current, Stream()
    plan(torch.randn(SMALL))
    cuda.current = second
    plan(torch.randn(SMALL))
    (env,) = plan._idle
    assert second.waited_for == (env.done,) and env.done.recorded_on == (first, second)


def test_an_arena_that_is_not_kept_is_done_with(cuda, monkeypatch):
    monkeypatch.setattr(plans, "KEPT", 0)
    _, graphs = graphed(SMALL)
    waited = []
    monkeypatch.setattr(Stream, "synchronize", lambda self: waited.append(self))
    graphs[SMALL].plan(torch.randn(SMALL))
    assert waited == [cuda.current] and not graphs[SMALL].plan._idle


def test_a_capture_in_inference_mode_serves_other_modes():
    frozen, graphs = graphed(SMALL)
    x = torch.randn(SMALL)
    with torch.inference_mode():
        captured = graphs[SMALL](x)
    torch.testing.assert_close(graphs[SMALL](x), frozen(x))
    torch.testing.assert_close(captured, frozen(x))


def test_an_input_of_any_strides_is_copied_into_the_graph():
    frozen, graphs = graphed(LARGE)
    x = torch.randn(LARGE)
    expected = frozen(x)
    for layout in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        torch.testing.assert_close(graphs[LARGE](layout), expected)


def test_a_graph_keeps_the_zeros_beside_its_images(monkeypatch):
    monkeypatch.setattr(freezing, "is_gpu", lambda device: True)
    frozen, graphs = graphed(LARGE)
    graph = graphs[LARGE]
    assert graph.plan.staged_shape[1] in (4, 8)
    for _ in range(3):
        x = torch.randn(LARGE)
        torch.testing.assert_close(graph(x), frozen(x))
        whole = graph._images._base
        assert whole.numel() > x.numel() and whole.count_nonzero() == x.count_nonzero()


def test_the_capture_comes_after_warm_up_calls(monkeypatch):
    _, graphs = graphed(SMALL)
    graph, calls = graphs[SMALL], []
    plan = graph.plan
    graph.plan = lambda x: calls.append(len(Graph.made)) or plan(x)
    graph.plan.drop_arenas = plan.drop_arenas
    graph.plan.staged, graph.plan.images = plan.staged, plan.images
    graph(torch.randn(SMALL))
    graph(torch.randn(SMALL))
    assert calls == [0] * WARM_UP + [1]


class Calling(nn.Module):
    """Somebody's module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model[1].register_forward_hook(lambda module, args, out: out.mul_(2))
    return model


MAY_WAIT = {
    "cannot be traced": Calling(lambda x: x * 2 if x.sum().item() > 0 else x),
    "hooked": hooked(),
    "masked": Calling(lambda x: x[x > 0]),
    "masked columns": Calling(lambda x: x[:, :, (x > 0).all(1)[0].all(1)]),
    "where": Calling(lambda x: torch.where(x > 0)[0]),
    "moved": Calling(lambda x: (x + 1).to("cpu")),
}


@pytest.mark.parametrize("model", MAY_WAIT.values(), ids=MAY_WAIT.keys())
def test_a_plan_that_may_wait_for_the_gpu_is_not_captured(model):
    frozen, _ = graphed(SMALL, model=nn.Sequential(model, nn.Identity()))
    plan = frozen.plan_for(torch.empty(SMALL))
    assert not all(may_be_captured(step) for step, _ in plan.steps)
    assert frozen._captured(plan) is plan and not Graph.made


def test_torch_s_own_modules_and_functions_are_captured():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = torch.nn.functional.pad(self.norm(self.conv(x)), (1, 1)).mul(2).to(x.dtype)
            x = torch.where(x > 0, x, x[:, :, :, :1].to(torch.float32))
            return torch.chunk(x, 2, 1)[0]

    frozen, graphs = graphed(SMALL, model=Own())
    x = torch.rand(SMALL)
    plan = graphs[SMALL].plan
    assert sum(step.op.name == "call" for step, _ in plan.steps) > 4
    assert isinstance(frozen._captured(plan), CudaGraph)
    torch.testing.assert_close(graphs[SMALL](x), frozen(x))
    assert Graph.made


def test_what_fails_in_the_capture_runs_step_by_step_with_one_warning(cuda):
    def refuse():
        cuda.end_capture, cuda.capturing = lambda: None, False
        raise RuntimeError("operation not permitted when stream is capturing")

    frozen, graphs = graphed(SMALL)
    x, stream, pool = torch.randn(SMALL), cuda.current, graphs[SMALL]._pool
    handle, cuda.end_capture = pool.handle, refuse
    with pytest.warns(UserWarning, match="runs step by step .*not permitted when stream"):
        torch.testing.assert_close(graphs[SMALL](x), frozen(x))
    torch.testing.assert_close(graphs[SMALL](x), frozen(x))  # and no second try
    assert cuda.current is stream and pool.handle != handle
    # The second capture is of nothing: it ends what the first one left open.
    assert [len(graph.calls) > 0 for graph in Graph.made] == [True, False]


def test_too_little_memory_for_a_capture_is_the_caller_s_error(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", full)
    with pytest.raises(torch.OutOfMemoryError):
        graphed(SMALL)[1][SMALL](torch.randn(SMALL))


def test_every_call_waits_for_the_one_ahead_of_it(cuda):
    _, graphs = graphed(SMALL)
    done, stream = graphs[SMALL]._pool.done, cuda.current
    for _ in range(3):
        graphs[SMALL](torch.randn(SMALL))
    assert stream.waited_for.count(done) == 3 and done.recorded_on == (stream,) * 3


@pytest.mark.parametrize("watcher", ["explain", "outer capture"])
def test_the_caller_s_capture_and_explain_see_the_steps(watcher, monkeypatch):
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

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(serve, range(4)))
    for actual, right in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, right)
