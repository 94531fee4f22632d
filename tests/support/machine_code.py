"""What compiled GPU code needs of a multiprocessor, and how much it loads at once.

Little's law: a memory of 4.3 TB/s that answers after about 1 us is busy while 132 multiprocessors
wait for some 32 KB each.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton.backends.nvidia

IN_FLIGHT = 32 * 1024
# An H200: multiprocessors, and of each one registers, threads, blocks and shared memory, of which a
# block takes 1 KB beside its own.
SMS = 132
_REGISTERS, _THREADS, _BLOCKS, _SHARED, _RESERVED = 65536, 2048, 32, 228 * 1024, 1024
_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def kernels_in(code: Path) -> dict[str, dict[str, int]]:
    """Of each kernel in a cubin, by its mangled name: ``registers``, ``stack`` and ``local`` of a
    thread, ``static_shared`` of a block, and ``waits_for`` of :func:`bytes_per_thread`."""
    usage = dict(re.findall(r"Function (\S+?):\n(.*)", _dump("-res-usage", code)))
    parts = re.split(r"\n\s*Function : (\S+)\n", _dump("-sass", code))
    found = {}
    for name, sass in zip(parts[1::2], parts[2::2], strict=True):
        n = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[name])}
        found[name] = {
            "registers": n["REG"], "stack": n["STACK"], "local": n["LOCAL"],
            "static_shared": n["SHARED"], "waits_for": bytes_per_thread(sass),
        }  # fmt: skip
    return found


def resident_blocks(registers: int, threads: int, shared: int, grid: int | None = None) -> int:
    """Blocks of a kernel that one SM holds at once, of a grid that may not fill it."""
    of_warp = -(-registers // 8) * 8 * 32
    fits = [_REGISTERS // of_warp // (threads // 32), _THREADS // threads, _BLOCKS]
    fits.append(_SHARED // (shared + _RESERVED))
    if grid is not None:
        fits.append(-(-grid // SMS))
    return min(fits)


def bytes_per_thread(sass: str) -> int:
    """Most bytes from global memory that a thread waits for at once.

    The code is read from top to bottom. A load is on its way until an instruction names a register
    that it fills; an asynchronous copy, until a barrier waits for its group.
    """
    most = 0
    loads: dict[int, int] = {}  # first register: bytes
    groups: list[int] = []
    open_group = 0
    for opcode, operands in _INSTRUCTION.findall(sass):
        name, *modifiers = opcode.split(".")
        size = next((int(m) for m in modifiers if m in ("128", "64")), 32) // 8
        if name == "LDG":
            target, _, operands = operands.partition(",")
            size = 2 if {"U16", "S16"} & set(modifiers) else size
        used = {int(r) for r in re.findall(r"\bR(\d+)", operands)}
        loads = {
            first: filled
            for first, filled in loads.items()
            if used.isdisjoint(range(first, first + max(1, filled // 4)))
        }
        if name == "LDG":
            loads[int(target.strip().removeprefix("R"))] = size
        elif name == "LDGSTS":
            open_group += size
        elif name == "LDGDEPBAR":
            groups.append(open_group)
            open_group = 0
        elif name == "DEPBAR":
            left = int(operands.split(",")[1], 0)
            groups = groups[len(groups) - left :] if left else []
        most = max(most, sum(loads.values()) + sum(groups) + open_group)
    return most


def _dump(what: str, code: Path) -> str:
    command = [_CUOBJDUMP, what, str(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
