"""freeze under load: threads that share a frozen model get the bits of one, in bounded memory."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import cvkernels
from tests.support.five_families import FiveFamilies, Uses, assert_same_bits
from tests.support.pairs import calibrate, image

THREADS, CALLS = 4, 2500
# Batches that the threads take turns with: each has a plan, and arenas of its own.
BATCHES = (1, 2, 3)
GROWTH = 16 << 20


def resident_bytes():
    """Of this process, as the kernel counts them."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to read memory from")
def test_ten_thousand_calls_from_four_threads():
    torch.manual_seed(0)
    model = FiveFamilies()
    calibrate(model, image(4, 12))
    model.eval()
    frozen = cvkernels.freeze(model, torch.randn(1, 3, 12, 12))
    images = [[torch.randn(n, 3, 12, 12) for n in BATCHES] for _ in range(THREADS)]
    alone = [[frozen(x) for x in own] for own in images]

    def right(number, calls):
        """How many of the calls of a thread give the bits of one that was alone."""
        turns = [(call + number) % len(BATCHES) for call in range(calls)]
        return sum(
            torch.equal(frozen(images[number][which]), alone[number][which]) for which in turns
        )

    with ThreadPoolExecutor(THREADS) as threads:
        counts = list(threads.map(right, range(THREADS), [50] * THREADS))
        before = resident_bytes()
        counts += threads.map(right, range(THREADS), [CALLS] * THREADS)
        assert counts == [50] * THREADS + [CALLS] * THREADS
        assert resident_bytes() - before < GROWTH


def test_freezing_in_threads_leaves_calls_of_others_alone():
    """torch.fx replaces methods of all modules while it traces, for all threads. Blocks that are
    live then run as stock ones do, which rounds otherwise."""
    methods = nn.Module.__call__, nn.Module.__getattr__
    uses = Uses()
    expected = uses.all()

    def work(use):
        for _ in range(20):
            for ours, others in zip(getattr(uses, use)(), expected[use], strict=True):
                if use in ("frozen", "freeze"):
                    assert torch.equal(ours, others)
                else:
                    torch.testing.assert_close(ours, others, rtol=1e-3, atol=1e-4)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, ("live", "frozen", "freeze", "train", "freeze", "live")))
    assert (nn.Module.__call__, nn.Module.__getattr__) == methods
    assert_same_bits(uses.all(), expected)
