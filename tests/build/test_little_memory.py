"""Memory that runs out is an error of Python's or PyTorch's, and nothing else is broken by it."""

import copy
import gc
import sys
from pathlib import Path

import pytest
import torch

import cvkernels
from cvkernels import extension
from cvkernels.memory_use import out_of_memory
from cvkernels.ops.common import recycled
from tests.support.five_families import USES, Uses, assert_same_bits
from tests.support.own_process import run_alone

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
MB = 1 << 20
# Of free memory that the large batch does not fit into. What a call makes first fits, or its last.
STEPS = [0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]


class LittleMemory:
    """Within it, the process may take only so many bytes more than it has."""

    def __init__(self, more: int) -> None:
        self.more = more

    def __enter__(self) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + self.more
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def __exit__(self, *raised: object) -> None:
        infinite = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_AS, (infinite, infinite))


def drop_idle_memory() -> None:
    """A result that nothing has room for frees all that could make room."""
    if extension.has("cpu"):
        with LittleMemory(0), pytest.raises(RuntimeError, match="can't allocate memory"):
            recycled._recycled(torch.empty(1).expand(1 << 45))


def run_out(use: str) -> None:
    torch.set_num_threads(1)
    uses = Uses()
    small, large = uses.x, torch.randn(64, 3, 192, 192)
    expected = uses.all()
    uses.x = large
    # oneDNN keeps what it compiles, and where memory ran out meanwhile its failure, for ever.
    answers = getattr(uses, use)()
    failed = 0
    for step in STEPS:
        uses.x = large
        drop_idle_memory()
        try:
            with LittleMemory(step * MB):
                getattr(uses, use)()
        except (MemoryError, RuntimeError) as error:
            assert out_of_memory(error), error
            failed += 1
        uses.x = small
        assert_same_bits(uses.all(), expected)
    assert failed > 3, failed
    uses.x = large
    assert all(map(torch.equal, getattr(uses, use)(), answers))


@pytest.mark.full
@pytest.mark.parametrize("use", USES)
def test_memory_that_runs_out_is_an_error_and_nothing_is_broken(use):
    run_alone(run_out, use)


def fill_idle_memory() -> None:
    """More than is free is idle in blocks that are too small for the result."""
    like = torch.empty(16 * MB, dtype=torch.uint8)
    held = [recycled._recycled(like).zero_() for _ in range(12)]
    del held
    with LittleMemory(8 * MB):
        y = recycled._recycled(torch.empty(1, dtype=torch.uint8).expand(128 * MB))
        assert y.numel() == 128 * MB


@pytest.mark.skipif(not extension.has("cpu"), reason="the compiled extension is missing")
def test_idle_memory_is_freed_for_a_result_that_has_no_room():
    run_alone(fill_idle_memory)


def run_out_in_copies() -> None:
    """A frozen model that is copied, or read from another process, plans at its first call."""
    torch.set_num_threads(1)
    uses = Uses()
    expected = uses.frozen()
    twin = copy.deepcopy(uses._frozen)
    large = torch.randn(64, 3, 192, 192)
    with LittleMemory(4 * MB), pytest.raises(MemoryError, match="freeze: out of memory"):
        twin(large)
    assert torch.equal(twin(uses.x), expected[0])
    assert torch.equal(cvkernels.freeze(uses.network, uses.x)(uses.x), expected[0])


def test_planning_without_memory_says_so():
    run_alone(run_out_in_copies)
