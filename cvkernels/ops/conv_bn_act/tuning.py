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
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import torch

from cvkernels.ops.common.work import model_of, predict
from cvkernels.ops.conv_bn_act import halo, tiles, work
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.ops.conv_bn_act.tiles import Config

_SHIPPED = Path(__file__).parents[2] / "tuned"
_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
_TABLE_FIELDS = ("device", "capability", "op", "torch", "triton", "commit", "entries")
# Times that differ by less are taken for equal.
NEAR = 1.02


_NAME = re.compile(r"triton (\d+)x(\d+)x(\d+) w(\d+) s(\d+)(?: k(\d+))?")


def named(problem: Problem, name: str, device_name: str, capability: tuple[int, int]) -> Config:
    """The tile that Triton runs ``problem`` with, under :attr:`Config.name` or just "triton"."""
    if (given := _NAME.fullmatch(name)) is None:
        return choose(problem, device_name, capability)
    block_m, block_n, block_k, warps, stages, splits = (int(n or 1) for n in given.groups())
    return Config("triton", block_m, block_n, block_k, warps, stages, splits)


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device_name: str, capability: tuple[int, int]) -> Config:
    """The table's entry for ``problem`` on this device, else the heuristic's answer."""
    return lookup(problem, device_name, capability) or heuristic(problem, capability)


def measured(problem: Problem, capability: tuple[int, int]) -> list[Config]:
    """Triton's tiles that may be the fastest for ``problem``, the heuristic's first."""
    name, itemsize = tiles.kernel(problem), problem.dtype.itemsize
    possible = tiles.of_problem(problem, capability)
    possible = possible | tiles.MEASURED_ONLY.get((name, itemsize), {})
    found = [_fastest(problem, capability), *tiles.candidates(problem, capability)]
    for config in tiles.CONFIGS[name, itemsize]:
        padding = config.block_n > 32 and config.block_n >= 2 * problem.K
        tile, how = (config.block_m, config.block_n), (config.num_warps, config.num_stages)
        short = how[1] == 2 and name == "1x1"
        if not padding and (possible.get(tile) == how or (tile in possible and short)):
            found.append(config)
    return list(dict.fromkeys(found))


@functools.lru_cache(maxsize=4096)
def _fastest(problem: Problem, capability: tuple[int, int]) -> Config:
    """The tile of the least predicted time; of several that differ by little, the largest."""
    found = list(tiles.candidates(problem, capability))
    if problem.bytes_written == 0:
        return found[0]
    gpu = model_of(capability)
    seconds = [predict(work.by_tile(problem, tile, gpu), gpu).seconds for tile in found]
    enough = NEAR * min(seconds)
    return next(tile for tile, time in zip(found, seconds, strict=True) if time <= enough)


def heuristic(problem: Problem, capability: tuple[int, int]) -> Config:
    """The answer for a problem that no table holds.

    Of the spatial convolutions that its fused op can do, cuDNN gets those that it is predicted to
    do in less time than Triton: one group, 16 bits, ReLU, no prologue, memory of its own for the
    output, and C >= 64, since on a 7x7 stem its fused op is many times slower than its plain one.
    The halo kernel gets what it can do of at most 32 output channels, or 64 from at most 32: there
    a matrix product that reads its input from L2 for each tap waits for it most of the time. All
    others are Triton's.
    """
    tile = _fastest(problem, capability)
    if _halo_rule(problem):
        return replace(tile, backend="halo")
    if _cudnn_rule(problem) and problem.bytes_written:
        gpu = model_of(capability)
        ours = predict(work.by_tile(problem, tile, gpu), gpu).seconds
        if predict((work.cudnn(problem, gpu),), gpu).seconds < ours:
            return replace(tile, backend="cudnn")
    return tile


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
        and not problem.has_output_gate
        and not problem.has_out
    )


def key(problem: Problem) -> str:
    """The table key: what the speed depends on, with N rounded up to a power of two.

    ``bf16 C64 K64 R3 S3 stride1x1 pad1x1 dil1x1 groups1 H56 W56 N128 relu`` and then, where the
    problem has them, ``residual``, ``input_bn``, ``input_gate``, ``output_gate``,
    ``projection64 by1x1``.
    """
    p = problem
    words = [
        _DTYPES[p.dtype],
        f"C{p.C} K{p.K} R{p.R} S{p.S}",
        "stride{}x{} pad{}x{} dil{}x{}".format(*p.stride, *p.padding, *p.dilation),
        f"groups{p.groups} H{p.H} W{p.W} N{1 << max(p.N - 1, 0).bit_length()}",
        p.act,
    ]
    flags = ("has_residual", "has_input_bn", "has_input_gate", "has_output_gate")
    words += [flag.removeprefix("has_") for flag in flags if getattr(p, flag)]
    if p.projection is not None:
        words.append("projection{} by{}x{}".format(p.projection.C, *p.projection.stride))
    return " ".join(words)


_KEY = re.compile(
    r"(f16|bf16|f32) C\d+ K\d+ R\d+ S\d+ stride\d+x\d+ pad\d+x\d+ dil\d+x\d+ groups\d+ H\d+ W\d+ "
    r"N\d+ (none|relu|relu6|silu)( residual)?( input_bn)?( input_gate)?"
    r"( output_gate)?( projection\d+ by\d+x\d+)?"
)


def lookup(problem: Problem, device_name: str, capability: tuple[int, int]) -> Config | None:
    """The measured choice for ``problem`` on this device, or None."""
    entries = _entries(device_name)
    entry = entries.get(key(problem)) if entries else None
    if entry is None:
        return None
    return entry if isinstance(entry, Config) else replace(_fastest(problem, capability), **entry)


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
