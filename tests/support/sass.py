"""Machine code of CUDA C++ kernels, compiled for GPUs that are not there: resources and loops."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
_COMMENT = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"^\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.\w+):")


class Loop(NamedTuple):
    """The instructions of a loop's body, from the label that its last branch leads back to."""

    instructions: tuple[str, ...]

    def count(self, *names: str) -> int:
        """How many instructions there are, or how many of these names, such as "LDG"."""
        return sum(not names or text.partition(".")[0] in names for text in self.instructions)

    @property
    def names(self) -> Counter[str]:
        return Counter(text.partition(".")[0] for text in self.instructions)


class Code(NamedTuple):
    """One kernel's machine code: registers of a thread, bytes, and its innermost loops."""

    name: str
    registers: int
    spilled: int  # bytes
    shared: int  # bytes of a block
    instructions: tuple[str, ...]
    loops: tuple[Loop, ...]

    @property
    def main_loop(self) -> Loop:
        """The innermost loop with the most multiply-adds."""
        return max(self.loops, key=lambda loop: loop.count("FFMA", "HFMA2", "HMMA", "HGMMA"))


def missing() -> str:
    """Why nothing can be compiled and read; empty where it can."""
    absent = [name for name in ("nvcc",) if shutil.which(name) is None]
    if not absent and _disassembler() is None:
        absent = ["nvdisasm"]
    return f"no {absent[0]}" if absent else ""


def _disassembler() -> str | None:
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            import triton.backends.nvidia as nvidia
        except ImportError:
            return None
        found = shutil.which(str(Path(nvidia.__file__).parent / "bin" / "nvdisasm"))
    return found


def compile_kernels(source: str, folder: Path, arch: int = 90) -> list[Code]:
    """The kernels of a .cu file with this text, which includes headers of csrc."""
    text, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    text.write_text(source)
    command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", f"-I{CSRC}"]
    command += ["-Xptxas", "-v", str(text), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listing = subprocess.run(
        [str(_disassembler()), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return [
        Code(name, *_resources(done.stderr, name), *_read(lines))
        for name, lines in _functions(listing).items()
    ]


def _resources(messages: str, name: str) -> tuple[int, int, int]:
    """Registers, bytes spilled and bytes of shared memory, from what ptxas says about a kernel."""
    about = messages[messages.index(f"Compiling entry function '{name}'") :]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", about)
    used = re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", about)
    assert spills and used
    return int(used[1]), int(spills[1]) + int(spills[2]), int(used[2] or 0)


def _functions(listing: str) -> dict[str, list[str]]:
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in listing.split("\n"):
        if found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            lines = functions.setdefault(found[1], [])
        lines.append(line)
    return functions


def _read(lines: list[str]) -> tuple[tuple[str, ...], tuple[Loop, ...]]:
    """The instructions, and the bodies of those loops that hold no other loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(_COMMENT.sub("", line)):
            if found[1].startswith("BRA") and (target := re.search(r"\.L\w+", found[2])):
                branches.append((len(instructions), target[0]))
            instructions.append(found[1])
    bounds = {
        (labels[target], at + 1) for at, target in branches if labels.get(target, at + 1) <= at
    }
    bounds = {(b, e) for b, e in bounds if instructions[b:e] != ["BRA"]}  # the padding at the end
    inner = [
        (begin, end)
        for begin, end in sorted(bounds)
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in bounds)
    ]
    return tuple(instructions), tuple(Loop(tuple(instructions[b:e])) for b, e in inner)
