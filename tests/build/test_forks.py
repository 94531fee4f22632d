"""Forked processes compute live, frozen and in training what the process that they came from does.

GNU's OpenMP does not survive a fork of a process that has used several threads: stock PyTorch hangs
in such a child until it has called ``torch.set_num_threads(1)``. No more than that is needed here.
"""

import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time

import pytest
import torch

from cvkernels import extension
from cvkernels.freeze.graph import Graph
from cvkernels.ops.common import recycled
from cvkernels.ops.common.recycled import maker
from tests.support.five_families import Uses, assert_same_bits
from tests.support.own_process import run_alone

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
if sys.version_info >= (3, 12):
    # A fork beside other threads is what is tested.
    pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]


def forked(function) -> int:
    """The exit status of a forked process that calls the function, negative for a signal's."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def compute_after_import(threads: int) -> None:
    torch.set_num_threads(threads)
    parts = tempfile.mkdtemp()

    def child():
        torch.set_num_threads(1)
        torch.save(Uses().all(), f"{parts}/child")

    assert forked(child) == 0
    torch.set_num_threads(1)
    assert_same_bits(torch.load(f"{parts}/child"), Uses().all())
    shutil.rmtree(parts)


def compute_after_calls(threads: int) -> None:
    torch.set_num_threads(threads)
    uses = Uses()
    uses.all()
    torch.set_num_threads(1)
    expected = uses.all()
    torch.set_num_threads(threads)
    uses.all()

    def child():
        torch.set_num_threads(1)
        for _ in range(3):
            assert_same_bits(uses.all(), expected)

    assert forked(child) == 0
    torch.set_num_threads(1)
    assert_same_bits(uses.all(), expected)


@pytest.mark.few(2)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("compute", [compute_after_import, compute_after_calls])
def test_a_forked_process_computes_the_same(compute, threads):
    run_alone(compute, threads)


FORKS, LARGE_FORKS = 12, 100


def fork_during_calls() -> None:
    torch.set_num_threads(1)
    uses, errors, stop = Uses(), [], threading.Event()
    expected = uses.all()

    def work(use):
        while not stop.is_set():
            if not all(map(torch.equal, getattr(uses, use)(), expected[use])):
                errors.append(use)

    calls = ("live", "frozen", "train")
    others = [threading.Thread(target=work, args=(use,)) for use in calls]
    for thread in others:
        thread.start()
    statuses = []
    for _ in range(FORKS):
        time.sleep(0.02)
        statuses.append(forked(lambda: assert_same_bits(uses.all(), expected)))
    stop.set()
    for thread in others:
        thread.join()
    assert (statuses, errors) == ([0] * FORKS, [])


def test_fork_during_calls_of_other_threads():
    run_alone(fork_during_calls)


def fork_during_planning() -> None:
    torch.set_num_threads(1)
    uses = Uses()
    other = torch.randn(1, 3, 14, 14)
    inside, leave = threading.Event(), threading.Event()
    infer = Graph.infer

    def slow_infer(*arguments):
        inside.set()
        leave.wait()
        return infer(*arguments)

    Graph.infer = slow_infer
    planner = threading.Thread(target=lambda: uses._frozen(other))
    planner.start()
    inside.wait()
    Graph.infer = infer
    with torch.no_grad():
        expected = uses.network(other)
    status = forked(lambda: torch.testing.assert_close(uses._frozen(other), expected))
    leave.set()
    planner.join()
    assert status == 0


def test_fork_while_another_thread_plans():
    """The child has no thread that would ever release the lock of the plans."""
    run_alone(fork_during_planning)


def fork_during_large_results() -> None:
    torch.set_num_threads(1)
    make = maker(torch.empty(4, 128, 64, 64))
    # The more blocks are idle, the longer one is looked for, under the lock.
    idle = [recycled._recycled(torch.empty(1).expand(1 << 19)) for _ in range(100)]
    del idle
    stop = threading.Event()

    def work():
        while not stop.is_set():
            make()

    others = [threading.Thread(target=work) for _ in range(4)]
    for thread in others:
        thread.start()
    forks = itertools.takewhile(lambda _: forked(make) == 0, range(LARGE_FORKS))
    succeeded = len(list(forks))
    stop.set()
    for thread in others:
        thread.join()
    assert succeeded == LARGE_FORKS


@pytest.mark.skipif(not extension.has("cpu"), reason="the compiled extension is missing")
def test_fork_while_other_threads_make_large_results():
    """The child has no thread that would ever release the lock of the idle memory."""
    run_alone(fork_during_large_results)
