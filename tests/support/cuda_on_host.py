"""The CUDA ops compiled for the CPU: csrc/<op>/cuda.cu with cuda_headers for CUDA's headers.

Everything in a .cu file runs but for the GPU's own instructions: which kernel is chosen and with
which grid, the indices, shared memory and its barriers. The instructions of csrc/common/mma.cuh
are functions here, and a copy into shared memory is done when it is waited for. Undefined behaviour
is looked for: a misaligned vector access, an index beyond an array, an overflow.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import torch

from cvkernels.ops.avg_pool import op as avg_pool
from cvkernels.ops.batch_norm_act import op as batch_norm_act
from cvkernels.ops.common import native
from cvkernels.ops.common.plan import PlanTable
from cvkernels.ops.dense_concat import op as dense_concat
from cvkernels.ops.max_pool import op as max_pool
from tests.support.made_once import made_once

ROOT = Path(__file__).resolve().parents[2]
HEADERS = Path(__file__).parent / "cuda_headers"
SOURCES = tuple(sorted((ROOT / "csrc").rglob("*.cu")))
# Torch's headers come before __CUDACC__, which would have them ask for the toolkit.
_PRELUDE = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "common/number.h"
#define __CUDACC__ 1
"""
_LAUNCH = re.compile(r"(\w+(?:<[^;{}()]*>)?)\s*<<<(.*?)>>>\s*(\(.*?\));", re.DOTALL)
_FLAGS = ("-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing")
_FLAGS += ("-fsanitize=alignment,bounds,null,shift,signed-integer-overflow", "-static-libubsan")


@functools.cache
def missing() -> str:
    """Why the ops cannot be compiled; empty if they can."""
    if not SOURCES:
        return "the tests run without the repository"
    if _compiler() is None:
        return "no C++ compiler"
    probe = [_compiler(), *_FLAGS, "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(probe, input="", capture_output=True, text=True)
    return f"the compiler refuses {' '.join(_FLAGS)}" if done.returncode else ""


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


def _split(text: str) -> list[str]:
    """The arguments of a call, split at commas outside of parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "(") - (character in ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def translate(source: str, namespace: str) -> str:
    """C++ of a .cu file: a launch becomes a call, the ops are those of a library on CPU."""

    def launch(found: re.Match) -> str:
        kernel, configuration, arguments = found.groups()
        grid, block, bytes_, *_ = [*_split(configuration), "0"]
        return f"cuda_on_host::launch({grid}, {block}, {bytes_}, [&] {{ {kernel}{arguments}; }});"

    source, launches = _LAUNCH.subn(launch, source)
    assert launches and "<<<" not in source
    library = "STABLE_TORCH_LIBRARY_IMPL(cvkernels, CUDA,"
    assert library in source
    return _PRELUDE + source.replace(library, f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU,")


def _compile(source: Path, namespace: str, target: Path) -> None:
    translated = target.with_suffix(".cpp")
    translated.write_text(translate(source.read_text(), namespace))
    torch_folder = Path(torch.__file__).parent
    command = [_compiler(), *_FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    includes = (HEADERS, source.parents[1], ROOT / "csrc")
    command += [*(f"-I{folder}" for folder in includes), "-isystem", str(torch_folder / "include")]
    command += [str(translated), "-o", str(target)]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def library_of(source: Path, folder: Path) -> HostLibrary:
    """The library of a .cu file of csrc: a process registers its ops once."""
    return HostLibrary(source, folder)


class HostLibrary:
    """The ops of one .cu file on CPU tensors, compiled in folder."""

    def __init__(self, source: Path, folder: Path, namespace: str = "") -> None:
        op = source.parent.name
        namespace = namespace or f"cuda_on_host_{op}"
        texts = [p.read_text() for p in (ROOT / "csrc" / op).iterdir() if p.suffix != ".cpp"]
        names = re.findall(r'library\.impl\(\s*"(\w+)"', "".join(texts))
        assert names
        target = folder / f"{op}.so"
        path = str(made_once(target, lambda part: _compile(source, namespace, part)))
        self._schemas = torch.library.Library(namespace, "FRAGMENT")
        for name in names:
            schema = str(getattr(torch.ops.cvkernels, name).default._schema)
            self._schemas.define(schema.removeprefix("cvkernels::"))
        torch.ops.load_library(path)
        self._reverse = ctypes.CDLL(path).cuda_on_host_reverse
        ops = getattr(torch.ops, namespace)
        self._kernels = {name: getattr(ops, name).default for name in names}

    @contextlib.contextmanager
    def in_place_of_the_cpu_ops(self, reverse: bool = False):
        """Meanwhile cvkernels' ops run this code, its threads and blocks in order or in reverse."""
        override = torch.library.Library("cvkernels", "IMPL")
        for name, kernel in self._kernels.items():
            override.impl(name, kernel, "CPU", allow_override=True)
        self._reverse(reverse)
        # No plan from before, and none that does an op's work past the dispatcher.
        unkept = mock.patch.object(PlanTable, "key", lambda *_: None)
        for op in (avg_pool, batch_norm_act, dense_concat, max_pool):
            op.run_kept.clear()
        try:
            with unkept, mock.patch.object(native, "directs", lambda _: False):
                yield
        finally:
            override._destroy()
