"""A Triton launch compiled for a GPU that is not there: what its code uses and what it consists of.

Nothing here runs under TRITON_INTERPRET, whose kernels cannot be compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget

from cvkernels.ops.common.triton_launch import Launch

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_MATRIX = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "WGMMA")


class Driver:
    """Of a GPU that is not there: says what to compile for, and launches nothing."""

    def __init__(self, arch: int) -> None:
        # a device for each architecture, since Triton keeps a device's code
        self.get_current_device = lambda: arch
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)


class Sass(NamedTuple):
    """Instructions of one warp, as the code lists them: a loop's body counts once.

    ``loop`` is the innermost loop that multiplies matrices, or where there is none the longest
    innermost one; ``around`` is the loop that it stands in, itself included. 0 without one.
    """

    instructions: int
    loop: int
    around: int
    loop_matrix: int
    matrix: int


def compiled_for(launch: Launch, operands: tuple, arch: int) -> Any:
    """``launch`` compiled for ``sm_<arch>``.

    Triton's own launcher says which arguments are constants, and which divisible by 16: tensors on
    the meta device are aligned, as fresh ones are.
    """
    triton.runtime.driver.set_active(Driver(arch))
    return launch.warmup(*operands)


def inspect_launch(launch: Launch, operands: tuple, arch: int) -> dict[str, Any]:
    """Compile ``launch`` for ``sm_<arch>``; its resources and the instructions tests ask about."""
    return _inspected(launch, compiled_for(launch, operands, arch), arch)


def disassemble(launch: Launch, operands: tuple, arch: int) -> dict[str, Any]:
    """What :func:`inspect_launch` finds, and what the machine code consists of.

    ``narrowest`` is the narrowest global access of a thread in bytes, but for those of 4, which are
    to vectors in float32.
    """
    compiled = compiled_for(launch, operands, arch)
    sass = sass_of(compiled.asm["cubin"])
    accesses = widths(sass)
    to_maps = [size for _, size in accesses if size != 4]
    return {
        **_inspected(launch, compiled, arch),
        **count(sass)._asdict(),
        "triton": triton.__version__,
        "accesses": {f"{name} {size}": n for (name, size), n in sorted(accesses.items())},
        "narrowest": min(to_maps, default=4),
    }


def _inspected(launch: Launch, compiled: Any, arch: int) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    (needs,) = resources(compiled.asm["cubin"]).values()
    has_matrix = re.search(r"\b(mma\.sync|wgmma\.|tcgen05\.mma)", ptx)
    return {
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "grid": launch.grid,
        "shared": compiled.metadata.shared,
        "registers": needs.registers,
        "stack": needs.stack,
        "local": needs.local,
        "waits_for": 0 if has_matrix else bytes_per_thread(sass_of(compiled.asm["cubin"])),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "unfenced": unfenced(ptx),
        "mma": ptx.count("mma.sync"),
        "async_16": len(re.findall(r"cp\.async\.\w+\.shared\.global[^;]*, (?:0x10|16)\b", ptx)),
        "async_narrow": len(
            re.findall(r"cp\.async\.\w+\.shared\.global[^;]*, (?:0x[48]|4|8)\b", ptx)
        ),
        "load_16": len(re.findall(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64|v4\.f32)", ptx)),
        "load_2": len(re.findall(r"ld\.global[\w.:]*\.b16", ptx)),
        "store_16": len(re.findall(r"st\.global[\w.:]*\.(?:v4\.b32|v2\.b64|v4\.f32)", ptx)),
        "store": ptx.count("st.global"),
    }


def unfenced(ptx: str) -> int:
    """Products of the tensor cores that read what was copied asynchronously, without the fence
    between the two that the PTX memory model asks for."""
    count, waited = 0, False
    for line in ptx.splitlines():
        if "fence.proxy.async" in line:
            waited = False
        elif "cp.async.wait_group" in line:
            waited = True
        elif waited and re.search(r"\b(wgmma\.mma_async|tcgen05\.mma)\b", line):
            count, waited = count + 1, False
    return count


class Resources(NamedTuple):
    """What a kernel needs: registers, stack and spills of a thread, shared bytes of a block."""

    registers: int
    stack: int
    local: int
    static_shared: int


def resources(cubin: bytes) -> dict[str, Resources]:
    """Of each kernel by its mangled name, from the cubin's own resource table."""
    usage = re.findall(r"Function (\S+?):\n(.*)", _run("cuobjdump", "-res-usage", cubin))
    found = {}
    for name, text in usage:
        n = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
        found[name] = Resources(n["REG"], n["STACK"], n["LOCAL"], n["SHARED"])
    return found


def kernels_in(cubin: bytes) -> dict[str, tuple[Resources, str]]:
    """The resources and the machine code of each kernel, by its mangled name."""
    parts = re.split(r"\n\s*Function : (\S+)\n", _run("cuobjdump", "-sass", cubin))
    needs = resources(cubin)
    codes = zip(parts[1::2], parts[2::2], strict=True)
    return {name: (needs[name], sass) for name, sass in codes}


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


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


def widths(sass: str) -> dict[tuple[str, int], int]:
    """How many global accesses of each kind move so many bytes of a thread."""
    found: dict[tuple[str, int], int] = {}
    for kind, suffixes in re.findall(r"\b(LDGSTS|LDG|STG)((?:\.\w+)*)", sass):
        size = next((w for s, w in _WIDTHS.items() if s in suffixes.split(".")), 4)
        found[kind, size] = found.get((kind, size), 0) + 1
    return found


_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def sass_of(cubin: bytes) -> str:
    return _run("nvdisasm", "-c", cubin)


def count(sass: str) -> Sass:
    """The instructions of a kernel, and of the loop in which it spends its time."""
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)", line):
            if found[1].startswith("BRA") and (target := re.search(r"\.L_x_\d+", found[2])):
                jumps.append((len(names), target[0]))
            if found[1] != "NOP":
                names.append(found[1])
    loops = [(labels[t], at) for at, t in jumps if labels.get(t, at) < at]
    inner = [
        (a, b) for a, b in loops if not any((a, b) != o and a <= o[0] and o[1] <= b for o in loops)
    ]

    def matrix(first: int, last: int) -> int:
        return sum(name.startswith(_MATRIX) for name in names[first : last + 1])

    best = max(inner, key=lambda loop: (matrix(*loop), loop[1] - loop[0]), default=None)
    total = matrix(0, len(names))
    if best is None:
        return Sass(len(names), 0, 0, 0, total)
    around = [b - a + 1 for a, b in loops if a <= best[0] and best[1] <= b and (a, b) != best]
    return Sass(len(names), best[1] - best[0] + 1, min(around, default=0), matrix(*best), total)


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
