"""Builds of a copy of the sources, with more or less of the machine around them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the compiled part needs Linux")


def skip_without(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def skip_without_compiler() -> None:
    for module in ("pybind11", "ninja", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")


def copy_of_the_sources(folder: Path) -> Path:
    """What a build needs of the repository, outside of any git checkout."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests run without the repository")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    for name in ("csrc", "cvkernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").touch()
    return folder


def environment(**variables: str | None) -> dict[str, str]:
    """This process's environment with ``variables`` set, those that are None removed."""
    merged = {**os.environ, "CUDA_HOME": None, "CUDA_PATH": None, **variables}
    return {name: value for name, value in merged.items() if value is not None}


def without(tool: str, folder: Path) -> str:
    """A PATH with every program of this one's, but for those whose name starts with ``tool``."""
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).glob("*") if directory else ():
            link = folder / program.name
            if not re.search(tool, program.name) and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def setup(source: Path, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess:
    return run("setup.py", "-q", *arguments, cwd=source, env=environment(**variables))


def packages(folder: Path, *names: str, torch: str = "", cuda: str | None = None) -> Path:
    """A folder of these installed packages, and of a torch that is nothing but its versions."""
    folder.mkdir()
    for name in names:
        package = Path(importlib.util.find_spec(name).origin).parent
        (folder / name).symlink_to(package)
        for metadata in package.parent.glob(f"{name}-*.dist-info"):  # it names setuptools' commands
            (folder / metadata.name).symlink_to(metadata)
    if torch:
        (folder / "torch").mkdir()
        (folder / "torch/__init__.py").touch()
        (folder / "torch/version.py").write_text(f"cuda: Optional[str] = {cuda!r}\n")
        (folder / f"torch-{torch}.dist-info").mkdir()
        (folder / f"torch-{torch}.dist-info/METADATA").write_text(f"Name: torch\nVersion: {torch}")
    return folder


def setup_with(
    seen: Path, source: Path, *arguments: str, before: str = "", **variables: str | None
) -> subprocess.CompletedProcess:
    """As :func:`setup`, by a Python that sees the packages in ``seen`` and the standard library."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(seen)!r})\n{before}\n"
        f"sys.argv = ['setup.py', '-q', *{arguments!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    return run("-I", "-S", "-c", code, cwd=source, env=environment(**variables))


def assert_refused(result: subprocess.CompletedProcess, pattern: str) -> None:
    """The build failed, and said why in one line and no traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("cvkernels: ")]
    assert len(lines) == 1 and re.search(pattern, lines[0]), result.stderr
