"""setup.py: each CVKERNELS_BUILD, its one-line errors, and what the shared objects depend on.

Builds run on a copy of the sources in this environment's torch, without build isolation.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cvkernels import extension

ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the compiled part needs Linux")


@functools.cache
def missing_tools() -> str:
    """Why nothing can be compiled here; empty if it can."""
    for module in ("pybind11", "ninja", "setuptools"):
        if subprocess.run([sys.executable, "-c", f"import {module}"]).returncode:
            return f"{module} is not installed"
    return "" if shutil.which("c++") or shutil.which("g++") else "no C++ compiler"


@pytest.fixture
def source(tmp_path):
    """What a build needs of the repository, outside of any git checkout."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests run without the repository")
    target = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    for folder in ("csrc", "cvkernels"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target / name)
    (target / "README.md").touch()
    return target


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


def setup(source: Path, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=source,
        env=environment(**variables),
        capture_output=True,
        text=True,
    )


def assert_one_line(result: subprocess.CompletedProcess, pattern: str) -> None:
    """The build failed, and said why in one line and no traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("cvkernels: ")]
    assert len(lines) == 1 and re.search(pattern, lines[0]), result.stderr


def test_unknown_build_mode(source):
    result = setup(source, "--version", CVKERNELS_BUILD="gpu")
    assert_one_line(result, "CVKERNELS_BUILD must be one of auto, cpu, cuda, none, got 'gpu'")


@LINUX
def test_cuda_without_a_toolkit(source, tmp_path):
    path = without("nvcc", tmp_path / "bin")
    result = setup(source, "build_ext", CVKERNELS_BUILD="cuda", PATH=path)
    assert_one_line(result, "CVKERNELS_BUILD=cuda needs a CUDA toolkit: no nvcc on PATH")


@LINUX
def test_cuda_home_without_a_toolkit(source, tmp_path):
    result = setup(source, "build_ext", CVKERNELS_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert_one_line(result, "CUDA_HOME or CUDA_PATH is .*, which has no bin/nvcc")


@LINUX
def test_toolkit_without_headers(source, tmp_path):
    root = tmp_path / "toolkit"
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'release 13.0, V13.0.88'\necho '#$ TOP={root}'\n")
    nvcc.chmod(0o755)
    result = setup(source, "build_ext", CVKERNELS_BUILD="cuda", CUDA_HOME=str(root))
    assert_one_line(result, "the toolkit of .* has no cuda_runtime.h")
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    result = setup(source, "build_ext", CVKERNELS_BUILD="cuda", CUDA_HOME=str(root))
    assert_one_line(result, "the toolkit of .* has no libcudart_static.a")


@LINUX
@pytest.mark.parametrize("archs", ["75", "9.0", "eighty", "80;1"])
def test_unknown_architecture(source, archs):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    if missing_tools():
        pytest.skip(missing_tools())
    result = setup(source, "build_ext", CVKERNELS_BUILD="cuda", CVKERNELS_CUDA_ARCHS=archs)
    assert_one_line(result, f"CVKERNELS_CUDA_ARCHS='{archs}': .* is not one of")


@LINUX
def test_no_compiler(source, tmp_path):
    path = without(r"^(c\+\+|g\+\+|clang\+\+)", tmp_path / "bin")
    result = setup(source, "build_ext", CVKERNELS_BUILD="cpu", PATH=path, CXX=None)
    assert_one_line(result, "no C.. compiler .*: install g.. or set CVKERNELS_BUILD=none")


@LINUX
def test_bad_max_jobs(source):
    if missing_tools():
        pytest.skip(missing_tools())
    result = setup(source, "build_ext", CVKERNELS_BUILD="cpu", MAX_JOBS="many")
    assert_one_line(result, "MAX_JOBS must be a positive number, got 'many'")


@LINUX
@pytest.mark.parametrize("nvcc", [False, True], ids=["no-toolkit", "toolkit"])
def test_says_once_what_it_builds(nvcc, source, tmp_path):
    if missing_tools():
        pytest.skip(missing_tools())
    if nvcc and shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    path = os.environ["PATH"] if nvcc else without("nvcc", tmp_path / "bin")
    # It ends before it compiles.
    result = setup(source, "build_ext", CVKERNELS_BUILD="auto", PATH=path, MAX_JOBS="0")
    said = [line for line in result.stdout.splitlines() if line.startswith("cvkernels: building")]
    what = r"CPU and CUDA ops \(CUDA .*" if nvcc else "CPU ops, no CUDA ops: no nvcc on PATH.*"
    assert len(said) == 1 and re.fullmatch(f"cvkernels: building {what}", said[0]), result.stdout


@LINUX
def test_pybind11_is_its_own_package(source, tmp_path):
    # Not the copy that some torch carry, which refuses to be included beside the stable ABI.
    if missing_tools():
        pytest.skip(missing_tools())
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\nexit 1\n')
    compiler.chmod(0o755)
    setup(source, "build_ext", CVKERNELS_BUILD="cpu", CXX=str(compiler), MAX_JOBS="1")
    command = (tmp_path / "commands").read_text().splitlines()[0]
    holds = [
        name
        for folder in re.findall(r"-isystem (\S+)", command)
        for name in ("pybind11", "torch")
        if Path(folder).parent.name == name
    ]
    assert holds == ["pybind11", "torch"]


def pip_wheel(source: Path, target: Path, mode: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    result = subprocess.run(
        [*command, "-w", str(target), str(source)],
        env=environment(CVKERNELS_BUILD=mode, CUDA_HOME=os.environ.get("CUDA_HOME")),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


def test_pure_python_wheel(source, tmp_path):
    wheel = pip_wheel(source, tmp_path / "wheels", "none")
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert all(name.startswith(("cvkernels/", "cvkernels-")) for name in names)
    assert not any(name.endswith((".so", ".cpp", ".cu", ".h")) for name in names)
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import torch, cvkernels\n"
        "from cvkernels.ops.max_pool.op import max_pool\n"
        f"assert cvkernels.__file__.startswith({str(installed)!r})\n"
        "assert max_pool(torch.ones(1, 3, 8, 8), 3, 2, 1).shape == (1, 3, 4, 4)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_source_distribution_carries_the_native_sources(source):
    result = setup(source, "sdist", "--formats=zip", CVKERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = (source / "dist").glob("*.zip")
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(archive).namelist()}
    sources = (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cpu_object() -> str:
    """The installed one: what installing the package built."""
    spec = importlib.util.find_spec("cvkernels._C")
    if spec is None:
        pytest.skip(extension.status()["cpu"].reason)
    return spec.origin


def cuda_object() -> str:
    path = Path(cpu_object()).with_name("_C_cuda.so")
    if not extension.build_info()["cuda_archs"]:
        pytest.skip("installed without CUDA ops")
    return str(path)


@pytest.mark.parametrize(
    ("find", "torch_library"), [(cpu_object, "libtorch_cpu.so"), (cuda_object, "libtorch_cuda.so")]
)
def test_depends_on_the_stable_abi_alone(find, torch_library):
    path = find()
    dynamic = tool("readelf", "-d", "-W", path)
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    system = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    system |= {"libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-aarch64.so.1"}
    assert torch_library in needed and set(needed) - {torch_library} <= system
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic

    undefined = re.findall(r"^\s+[Uw] (.+)$", tool("nm", "-D", "-u", path), re.MULTILINE)
    torch_symbols = [name for name in undefined if "torch" in name]
    assert torch_symbols and all(re.match(r"(aoti_)?torch_\w+$", name) for name in torch_symbols)
    assert not [name for name in undefined if re.match(r"_Z\w*(2at|3c10|5torch)", name)]
    assert not [name for name in undefined if name.startswith("cuda")]  # the runtime is inside


@pytest.mark.parametrize("find", [cpu_object, cuda_object])
def test_holds_no_build_path(find):
    data = Path(find()).read_bytes()
    assert str(ROOT).encode() not in data and b"site-packages" not in data


def triton_cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else Path()
    if not path.is_file():
        pytest.skip("neither the toolkit nor Triton has cuobjdump here")
    return str(path)


def test_cuda_code_for_every_architecture():
    path = cuda_object()
    archs = extension.build_info()["cuda_archs"].split(";")
    cuobjdump = shutil.which("cuobjdump") or triton_cuobjdump()
    elf = tool(cuobjdump, "--list-elf", path)
    assert {f"sm_{arch}" for arch in archs} == set(re.findall(r"sm_\d+", elf))
    ptx = tool(cuobjdump, "--list-ptx", path)
    assert set(re.findall(r"sm_\d+", ptx)) == {f"sm_{archs[-1]}"}


def test_cuda_kernels_keep_to_registers():
    path = cuda_object()
    cuobjdump = shutil.which("cuobjdump") or triton_cuobjdump()
    usage = tool(cuobjdump, "--dump-resource-usage", path)
    kernels = re.findall(r"Function (\w+):\s*\n?.*?REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    ops = {path.parent.name for path in (ROOT / "csrc").rglob("*.cu")}
    names = " ".join(name for name, *_ in kernels)
    assert all(re.search(rf"{op}_\w*kernel", names) for op in ops)
    # The stack holds what the call of a 64-bit division or of a root saves, and no element.
    assert not [name for name, _, stack, local in kernels if int(stack) > 16 or int(local)]
