"""AMX's own instructions, on a processor without them: see support/amx_instructions.cpp."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from cvkernels import extension

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the signals are Linux's"),
    pytest.mark.skipif(COMPILER is None, reason="there is no g++"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here"),
    pytest.mark.skipif(
        "amx" in extension.instruction_sets(), reason="the processor runs them itself"
    ),
]


def test_the_instructions_compute_what_plain_tiles_do(tmp_path):
    program = tmp_path / "amx_instructions"
    source = ROOT / "tests/support/amx_instructions.cpp"
    # Without contraction: both sides round each product.
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-unused-function"]
    command = [COMPILER, *options, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    sanitized = [*command, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if subprocess.run(sanitized, capture_output=True, timeout=300).returncode:
        subprocess.run(command, check=True, timeout=300)  # a compiler without their libraries
    run = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "products of tiles" in run.stdout
