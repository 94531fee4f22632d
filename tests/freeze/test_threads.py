"""freeze under load: threads that share a frozen model get the bits of one, in bounded memory."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cvkernels
from cvkernels.nn import Bottleneck, DenseBlock, Inception, MBConv, MBConvConfig, SEBasicBlock
from tests.support.pairs import calibrate, image

THREADS, CALLS = 4, 2500
# Batches that the threads take turns with: each has a plan, and arenas of its own.
BATCHES = (1, 2, 3)
GROWTH = 16 << 20


class FiveFamilies(nn.Module):
    """A block of each family, on maps so small that a call is mostly the calls in it."""

    def __init__(self) -> None:
        super().__init__()
        widen = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        mbconv = MBConvConfig(2, 3, 1, 24, 24, 1)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            Bottleneck(8, 4, downsample=widen),
            SEBasicBlock(16, 16),
            DenseBlock(2, 16, bn_size=2, growth_rate=4, drop_rate=0.0),
            MBConv(mbconv, 0.0, norm_layer=nn.BatchNorm2d),
            nn.MaxPool2d(2),
            Inception(24, 8, 8, 8, 8, 8, 8),
        )
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


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
