"""The tiles of the Triton kernels: what a launch is cut into, and which cuts there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from cvkernels.ops.common.tiles import cdiv, sm_count
from cvkernels.ops.conv_bn_act.problem import Problem

KERNELS = ("1x1", "spatial", "filter_row")
BACKENDS = ("triton", "cudnn", "halo")

# below this many input channels, a channel block of one tap would be mostly padding
_FILTER_ROW_BELOW = 16


@dataclass(frozen=True)
class Config:
    """How a problem runs: the backend, and the tile that Triton runs (or would run) it with.

    The filter-row kernel ignores ``block_k``: its block is as wide as a row of the filter.
    """

    backend: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1  # programs that share the reduction of a tile

    @property
    def name(self) -> str:
        """What tells it from the others for a problem; a table of ``cvkernels.tune`` has it."""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        split = f" k{self.split_k}" if self.split_k > 1 else ""
        return f"{self.backend} {tile} w{self.num_warps} s{self.num_stages}{split}"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {self.backend!r}")
        for name in _TILE_FIELDS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
            if name.startswith("block") and (value < 16 or value > 512 or value & (value - 1)):
                raise ValueError(f"{name} must be a power of two from 16 to 512, got {value}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, got {self.num_warps}")
        if self.split_k > 32:
            raise ValueError(f"split_k must be at most 32, got {self.split_k}")
        if self.num_stages > 8:
            raise ValueError(f"num_stages must be at most 8, got {self.num_stages}")


_TILE_FIELDS = tuple(f.name for f in fields(Config) if f.name != "backend")


def kernel(problem: Problem) -> str:
    """The Triton kernel that runs ``problem``, one of :data:`KERNELS`."""
    if problem.groups == 1 and problem.pointwise:
        return "1x1"
    if problem.groups == 1 and problem.C < _FILTER_ROW_BELOW:
        return "filter_row"
    return "spatial"


# (block_m, block_n) -> (num_warps, num_stages), largest first: few enough accumulators a thread,
# and a pipeline short enough, that two programs of a tile share an H100 SM, and three or more of
# the smaller ones. Of the first two, which read least, a program has an SM for itself.
_TILES_16BIT = {
    (128, 256): (8, 3),
    (256, 128): (8, 3),
    (128, 128): (8, 3),
    (128, 64): (8, 3),
    (128, 32): (4, 3),
    (64, 64): (8, 4),
    (64, 32): (4, 4),
}
_TILES_32BIT = {(128, 64): (8, 3), (64, 64): (4, 3), (64, 32): (4, 3)}
# The filter-row kernel gathers: it wants many warps, and has no pipeline.
_TILES_FILTER_ROW = {(64, 64): (8, 2), (64, 32): (8, 2)}
# Of whole packs of channels it reads rows that overlap, through the first cache: copies into shared
# memory that the program does not wait for would pass it by.
_TILES_PACKED_ROW = {(256, 64): (8, 1), (256, 32): (8, 1), (64, 64): (8, 1), (64, 32): (8, 1)}
# Tiles that are only measured, for a table to choose, by kernel and element size. Of larger ones of
# this kernel, one program would take the registers of a whole SM.
MEASURED_ONLY = {
    ("filter_row", 2): {(128, 32): (8, 2)},
    ("filter_row", 4): {(64, 32): (8, 3)},
}
# Programs that may share the reduction of a tile, and the steps that each has at least.
_SPLITS, _STEPS = (2, 4, 8, 16), 2


def of_problem(
    problem: Problem, capability: tuple[int, int]
) -> dict[tuple[int, int], tuple[int, int]]:
    """The tables' tiles that may run the problem on such a GPU."""
    name, itemsize = kernel(problem), problem.dtype.itemsize
    if name == "filter_row":
        packed = itemsize == 2 and problem.C % 8 == 0
        return _TILES_PACKED_ROW if packed else _TILES_FILTER_ROW
    if itemsize == 4:
        return _TILES_32BIT
    if capability >= (9, 0) and not problem.has_prologue:
        return _TILES_16BIT
    return {tile: how for tile, how in _TILES_16BIT.items() if not alone(*tile)}


def alone(block_m: int, block_n: int) -> bool:
    """Whether a program of a tile takes more than half of an SM's registers."""
    return block_m * block_n > 128 * 128


def registers(num_warps: int, itemsize: int, capability: tuple[int, int]) -> int:
    """Of a thread, at most: where a program is not alone on its SM, two fit one.

    Without a limit ptxas may aim at fewer, and spill to get there. mma.sync, and float32 without
    tensor cores, keep more in registers.
    """
    if itemsize == 4 or capability < (9, 0):
        return 255
    return 128 if num_warps == 8 else 168


def candidates(problem: Problem, capability: tuple[int, int]) -> Iterator[Config]:
    """What the heuristic chooses from: each tile, and where its programs leave SMs idle, each split
    of its reduction."""
    name = kernel(problem)
    depth = problem.R * problem.S
    for (block_m, block_n), (num_warps, num_stages) in of_problem(problem, capability).items():
        if block_n > 32 and block_n >= 2 * problem.K:
            continue
        block_k = _block_k(problem, block_n)
        if alone(block_m, block_n) and block_k < 64:
            continue
        # a pipeline deeper than the loop only takes shared memory from other programs
        if name == "1x1" and problem.C <= 2 * block_k:
            num_stages = 2
        tile = Config("triton", block_m, block_n, block_k, num_warps, num_stages)
        yield tile
        steps = depth * cdiv(group_span(problem, block_n), block_k)
        if name == "filter_row" or programs(problem, tile) > sm_count(capability):
            continue
        yield from (replace(tile, split_k=n) for n in _SPLITS if n * _STEPS <= steps)


def _block_k(problem: Problem, block_n: int) -> int:
    if problem.dtype.itemsize == 4 or kernel(problem) == "filter_row":
        return 32
    # gates and the sums of a wide tile use up the registers
    if problem.has_input_gate and block_n > 64:
        return 32
    return 32 if group_span(problem, block_n) <= 32 else 64


def programs(problem: Problem, config: Config) -> int:
    """The tiles of the output; with a gate, a tile is of one image."""
    p = problem
    pixels = p.N * p.P * p.Q
    rows = cdiv(pixels, config.block_m)
    if p.has_input_gate and kernel(p) == "1x1":
        rows = p.N * cdiv(p.P * p.Q, config.block_m)
    return rows * cdiv(p.K, config.block_n)


def group_span(problem: Problem, block_n: int) -> int:
    """The most input channels that a tile of ``block_n`` output channels needs."""
    k_group = problem.K // problem.groups
    if k_group % block_n == 0:
        groups = 1
    elif block_n % k_group == 0:
        groups = block_n // k_group
    else:
        groups = (block_n - 2) // k_group + 2
    return min(groups, problem.groups) * (problem.C // problem.groups)


def _reachable(name: str, itemsize: int) -> tuple[Config, ...]:
    tables = [_TILES_32BIT if itemsize == 4 else _TILES_16BIT]
    if name == "filter_row":
        tables = [_TILES_FILTER_ROW, _TILES_PACKED_ROW][: 4 // itemsize]
    found = []
    for tiles in (*tables, MEASURED_ONLY.get((name, itemsize), {})):
        for (block_m, block_n), (num_warps, num_stages) in tiles.items():
            large = alone(block_m, block_n)
            depths, stages = [32, 64], {num_stages}
            if itemsize == 4 or name == "filter_row":
                depths = [32]
            elif large:
                depths = [64]
            if name == "1x1" and not large:
                stages.add(2)
            for block_k, count in itertools.product(depths, sorted(stages)):
                tile = (block_m, block_n, block_k, num_warps, count)
                found.append(Config("triton", *tile))
    return tuple(dict.fromkeys(found))


# every tile that the heuristic returns or that is measured, by kernel and element size
CONFIGS = {(name, size): _reachable(name, size) for name in KERNELS for size in (2, 4)}
