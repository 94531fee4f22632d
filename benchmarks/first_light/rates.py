"""What the card can do: what every other figure is a share of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.first_light.setting import Setting, timed
from benchmarks.harness.machine import Timed
from benchmarks.harness.report import dtype_name

LAUNCHES = 200  # in one graph, for the gap between two
# Elements of a block, blocks (16 MB), programs (four for each SM) and reads of all blocks by each.
RESIDENT = (4096, 1024, 528, 1)


@triton.jit
def resident_read_kernel(x_ptr, out_ptr, BLOCKS, READS, BLOCK: tl.constexpr):
    """Every program reads BLOCKS * BLOCK elements READS times, each from a start of its own."""
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(READS * BLOCKS):
        block = (pid + step) % BLOCKS
        total += tl.load(x_ptr + block * BLOCK + offs, cache_modifier=".cg")
    tl.store(out_ptr + pid * BLOCK + offs, total)


def items(setting: Setting) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    machine = setting.machine()

    def copy_and_matrix() -> dict[str, Any]:
        found = {}
        for dtype in setting.dtypes:
            rates = machine.rates(dtype)
            found[dtype_name(dtype)] = rates._asdict()
        return found

    yield "copy and matrix", copy_and_matrix
    yield "reads from L2", lambda: resident_reads(setting)
    yield "launch gap in a graph", lambda: launch_gap(setting)


def resident_reads(setting: Setting) -> dict[str, Any]:
    """TB/s that all SMs together read of a buffer that stays in the L2 cache."""
    block, blocks, programs, reads = (64, 2, 2, 1) if setting.rehearsal else RESIDENT
    x = torch.randn(blocks * block, device=setting.device)
    out = torch.empty(programs * block, device=setting.device)

    def run() -> None:
        resident_read_kernel[(programs,)](x, out, blocks, reads, BLOCK=block)

    found = timed(setting.machine(), setting.settings(10, 3.0), {"read": Timed(run)})["read"]
    nbytes = programs * reads * x.nbytes
    return {**found, "tb_per_s": nbytes / found["us"] / 1e6, "buffer_bytes": x.nbytes}


def launch_gap(setting: Setting) -> dict[str, Any]:
    """Microseconds a kernel of no work takes among its like in one graph."""
    x = torch.zeros(32, device=setting.device)

    def add(x: torch.Tensor) -> torch.Tensor:
        for _ in range(LAUNCHES):
            x.add_(1)
        return x

    run = setting.graphed(add, x)
    call = Timed(lambda: run(x))
    found = timed(setting.machine(), setting.settings(20, 2.0), {"graph": call})["graph"]
    return {**found, "us_per_kernel": found["us"] / LAUNCHES}
