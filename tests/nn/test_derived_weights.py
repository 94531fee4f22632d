"""DerivedWeights on a GPU, in fakes: what a CUDA graph may read, and who waits for what."""

import pytest
import torch

from cvkernels.functional import DerivedWeights


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


class Stream:
    synchronized = 0

    def synchronize(self):
        self.synchronized += 1


@pytest.fixture
def gpu(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.capturing)
    stream.capturing = False
    return stream


def weight():
    return torch.randn(4, 3).as_subclass(OnGpu)


def test_a_graph_derives_for_itself(gpu):
    """Its memory is its own, and its replays read the parameters as they are then."""
    cache, w = DerivedWeights(), weight()
    kept = cache.get("key", [w], lambda: w + 1)
    gpu.capturing = True
    assert cache.get("key", [w], lambda: w + 1) is not kept
    assert cache.get("other", [w], lambda: w + 2) is not None
    gpu.capturing = False
    assert len(cache) == 1 and cache.get("key", [w], lambda: None) is kept
    assert cache.get("other", [w], lambda: "made outside") == "made outside"


def test_what_is_derived_of_constants_is_the_graph_s_too(gpu):
    cache, w = DerivedWeights(constant=True), weight()
    kept = cache.get("key", [w], lambda: w + 1)
    gpu.capturing = True
    assert cache.get("key", [w], lambda: None) is kept
    assert cache.get("new", [w], lambda: "unfilled until the replay") is not None
    assert len(cache) == 1


def test_what_is_kept_is_done_when_another_stream_takes_it(gpu):
    cache, w = DerivedWeights(), weight()
    for _ in range(3):
        cache.get("key", [w], lambda: w + 1)
    assert gpu.synchronized == 1
