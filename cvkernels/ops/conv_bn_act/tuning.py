"""Which backend and which tile runs a problem: tables measured per GPU, and a rule for the rest.

A table is a JSON file::

    {"device": "NVIDIA H200", "capability": [9, 0], "op": "conv_bn_act",
     "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234",
     "entries": {key: config}}

``key`` is :func:`key` of the problem, and ``config`` the fields of :class:`Config`; an entry
``{"backend": "cudnn"}`` or ``{"backend": "halo"}`` needs no more. Tables shipped under
``cvkernels/tuned/`` are found by the device's name; :func:`load_table` adds one, and its entries
win over those loaded before.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from cvkernels.ops.common.tiles import cdiv, sm_count
from cvkernels.ops.conv_bn_act import halo
from cvkernels.ops.conv_bn_act.problem import Problem

_SHIPPED = Path(__file__).parents[2] / "tuned"
KERNELS = ("1x1", "spatial", "filter_row")
_BACKENDS = ("triton", "cudnn", "halo")
_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
_TABLE_FIELDS = ("device", "capability", "op", "torch", "triton", "commit", "entries")

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
    group_m: int
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
        if self.backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {list(_BACKENDS)}, got {self.backend!r}")
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


_NAME = re.compile(r"triton (\d+)x(\d+)x(\d+) w(\d+) s(\d+)(?: k(\d+))?")


def named(problem: Problem, name: str, device_name: str, capability: tuple[int, int]) -> Config:
    """The tile that Triton runs ``problem`` with, under :attr:`Config.name` or just "triton"."""
    if (given := _NAME.fullmatch(name)) is None:
        return choose(problem, device_name, capability)
    block_m, block_n, block_k, warps, stages, splits = (int(n or 1) for n in given.groups())
    return Config("triton", block_m, block_n, block_k, _GROUP_M, warps, stages, splits)


def kernel(problem: Problem) -> str:
    """The Triton kernel that runs ``problem``, one of :data:`KERNELS`."""
    if problem.groups == 1 and problem.pointwise:
        return "1x1"
    if problem.groups == 1 and problem.C < _FILTER_ROW_BELOW:
        return "filter_row"
    return "spatial"


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device_name: str, capability: tuple[int, int]) -> Config:
    """The table's entry for ``problem`` on this device, else the heuristic's answer."""
    return lookup(problem, device_name, capability) or heuristic(problem, capability)


def tiles(problem: Problem, capability: tuple[int, int]) -> list[Config]:
    """Triton's tiles that may be the fastest for ``problem``, the heuristic's first."""
    first = _tile(problem, capability)
    found, possible = [first], _tiles(problem, capability)
    possible = possible | _MEASURED_ONLY.get((kernel(problem), problem.dtype.itemsize), {})
    for config in CONFIGS[kernel(problem), problem.dtype.itemsize]:
        padding = config.block_n > 32 and config.block_n >= 2 * problem.K
        tile, how = (config.block_m, config.block_n), (config.num_warps, config.num_stages)
        stages = how[1] == 2 and kernel(problem) == "1x1"
        if not padding and (possible.get(tile) == how or (tile in possible and stages)):
            found.append(config)
    return list(dict.fromkeys(found))


def heuristic(problem: Problem, capability: tuple[int, int]) -> Config:
    """The answer for a problem that no table holds.

    cuDNN gets the spatial convolutions that its fused op can do: one group, 16 bits, ReLU, no
    prologue, memory of its own for the output, and C >= 64, since on a 7x7 stem its fused op is
    many times slower than its plain one. The halo kernel gets what it can do of at most 32
    output channels, or 64 from at most 32: there a matrix product that reads its input from L2 for
    each tap waits for it most of the time. All others are Triton's.
    """
    backend = "cudnn" if _cudnn_rule(problem) else "triton"
    backend = "halo" if _halo_rule(problem) else backend
    return replace(_tile(problem, capability), backend=backend)


def _halo_rule(problem: Problem) -> bool:
    few = problem.K <= 32 or (problem.K <= 64 and problem.C <= 32)
    return few and not halo.unfit(problem)


def _cudnn_rule(problem: Problem) -> bool:
    return (
        problem.R * problem.S > 1
        and problem.groups == 1
        and problem.C >= 64
        and problem.dtype in (torch.float16, torch.bfloat16)
        and problem.act == "relu"
        and not problem.has_prologue
        and not problem.has_out
    )


_GROUP_M = 8

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
_MEASURED_ONLY = {
    ("filter_row", 2): {(128, 32): (8, 2)},
    ("filter_row", 4): {(64, 32): (8, 3)},
}
# Fewer products than this do not fill the pipeline of a program that has an SM for itself.
_LONG = 512


def _tiles(problem: Problem, capability: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
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


def registers(num_warps: int) -> int:
    """Of a thread, at most: where a program is not alone on its SM, two fit one.

    Without a limit ptxas may aim at fewer, and spill to get there.
    """
    return 128 if num_warps == 8 else 168


def _tile(problem: Problem, capability: tuple[int, int]) -> Config:
    """The largest tile that still gives every SM two programs, or one that has it for itself."""
    tiles = _tiles(problem, capability)
    pixels = problem.N * problem.P * problem.Q
    widest = _widest(problem)
    channels = problem.C // problem.groups
    long = channels > 32 and channels * problem.R * problem.S >= _LONG
    for block_m, block_n in tiles:
        programs = cdiv(pixels, block_m) * cdiv(problem.K, block_n)
        large = alone(block_m, block_n)
        enough = programs >= (1 if large else 2) * sm_count(capability)
        if block_n <= widest and enough and (long or not large):
            break
    num_warps, num_stages = tiles[block_m, block_n]
    block_k = _block_k(problem, block_n)
    # a pipeline deeper than the loop only takes shared memory from other programs
    if kernel(problem) == "1x1" and problem.C <= 2 * block_k:
        num_stages = 2
    return Config("triton", block_m, block_n, block_k, _GROUP_M, num_warps, num_stages)


def _widest(problem: Problem) -> int:
    """The widest column tile of which at most an eighth is padding, or else the least."""
    if problem.groups > 1:
        # wider than a group, the weight tile is block-diagonal and the rest of it wasted
        return 32 if problem.K // problem.groups < 64 else 64
    padded = {width: cdiv(problem.K, width) * width for width in (256, 128, 64, 32)}
    for width, size in padded.items():
        if 8 * size <= 9 * problem.K:
            return width
    return min(padded, key=lambda width: (padded[width], -width))


def _block_k(problem: Problem, block_n: int) -> int:
    if problem.dtype.itemsize == 4 or kernel(problem) == "filter_row":
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


def key(problem: Problem) -> str:
    """The table key: what the speed depends on, with N rounded up to a power of two.

    ``bf16 C64 K64 R3 S3 stride1x1 pad1x1 dil1x1 groups1 H56 W56 N128 relu`` and then, where the
    problem has them, ``residual``, ``input_bn``, ``input_gate``.
    """
    p = problem
    words = [
        _DTYPES[p.dtype],
        f"C{p.C} K{p.K} R{p.R} S{p.S}",
        "stride{}x{} pad{}x{} dil{}x{}".format(*p.stride, *p.padding, *p.dilation),
        f"groups{p.groups} H{p.H} W{p.W} N{1 << max(p.N - 1, 0).bit_length()}",
        p.act,
    ]
    flags = ("has_residual", "has_input_bn", "has_input_gate")
    words += [flag.removeprefix("has_") for flag in flags if getattr(p, flag)]
    return " ".join(words)


_KEY = re.compile(
    r"(f16|bf16|f32) C\d+ K\d+ R\d+ S\d+ stride\d+x\d+ pad\d+x\d+ dil\d+x\d+ groups\d+ H\d+ W\d+ "
    r"N\d+ (none|relu|relu6|silu)( residual)?( input_bn)?( input_gate)?"
)


def lookup(problem: Problem, device_name: str, capability: tuple[int, int]) -> Config | None:
    """The measured choice for ``problem`` on this device, or None."""
    entries = _entries(device_name)
    entry = entries.get(key(problem)) if entries else None
    if entry is None:
        return None
    return entry if isinstance(entry, Config) else replace(_tile(problem, capability), **entry)


def load_table(path: str | Path) -> int:
    """Use the table in ``path`` on the device it names, from now on; returns its number of entries.

    Raises:
        ValueError: the file is no table of this op; nothing is loaded.
    """
    device, entries = _parse(Path(path).read_text(), str(path))
    _entries(device).update(entries)
    choose.cache_clear()
    return len(entries)


def shipped_table(device_name: str) -> Path:
    """Where a device's table is, if there is one."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return _SHIPPED / f"{slug}.json"


@functools.cache
def _entries(device_name: str) -> dict[str, Config | dict]:
    """All entries known for a device; starts as the shipped table, if there is one."""
    file = shipped_table(device_name)
    return _parse(file.read_text(), str(file))[1] if file.is_file() else {}


def _parse(text: str, where: str) -> tuple[str, dict[str, Config | dict]]:
    """(device, entries) of a table's text."""
    try:
        return _parse_table(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"tuning table {where}: not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"tuning table {where}: {error}") from None


def _parse_table(table: object) -> tuple[str, dict[str, Config | dict]]:
    if not isinstance(table, dict) or set(table) != set(_TABLE_FIELDS):
        got = sorted(table) if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"needs the fields {list(_TABLE_FIELDS)}, got {got}")
    device, capability, entries = table["device"], table["capability"], {}
    if table["op"] != "conv_bn_act":
        raise ValueError(f"op must be 'conv_bn_act', got {table['op']!r}")
    if not isinstance(device, str) or not device:
        raise ValueError(f"device must be a name, got {device!r}")
    if not isinstance(capability, list) or [type(v) for v in capability] != [int, int]:
        raise ValueError(f"capability must be [major, minor], got {capability!r}")
    if not isinstance(table["entries"], dict):
        raise ValueError("entries must map keys to configs")
    for name, entry in table["entries"].items():
        if not _KEY.fullmatch(name):
            raise ValueError(f"{name!r} is not a key; see tuning.key")
        try:
            entries[name] = _parse_entry(entry)
        except ValueError as error:
            raise ValueError(f"entry {name!r}: {error}") from None
    return device, entries


def _parse_entry(entry: object) -> Config | dict:
    if entry in ({"backend": "cudnn"}, {"backend": "halo"}):
        return entry
    names = [f.name for f in fields(Config)]
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise ValueError(f"needs the fields {names}, got {entry!r}")
    return Config(**entry)


def _reachable(name: str, itemsize: int) -> tuple[Config, ...]:
    tables = [_TILES_32BIT if itemsize == 4 else _TILES_16BIT]
    if name == "filter_row":
        tables = [_TILES_FILTER_ROW, _TILES_PACKED_ROW][: 4 // itemsize]
    found = []
    for tiles in (*tables, _MEASURED_ONLY.get((name, itemsize), {})):
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
                tile = (block_m, block_n, block_k, _GROUP_M, num_warps, count)
                found.append(Config("triton", *tile))
    return tuple(dict.fromkeys(found))


# every tile that the heuristic returns or that is measured, by kernel and element size
CONFIGS = {(name, size): _reachable(name, size) for name in KERNELS for size in (2, 4)}
