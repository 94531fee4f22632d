"""setup.py: each CVKERNELS_BUILD, its one-line errors, and what the shared objects depend on.

Builds run on a copy of the sources in this environment's torch, without build isolation.
"""

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


@pytest.fixture(scope="module")
def tools():
    """Skips what compiles, where nothing can be compiled."""
    for module in ("pybind11", "ninja", "setuptools"):
        if subprocess.run([sys.executable, "-c", f"import {module}"]).returncode:
            pytest.skip(f"{module} is not installed")
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")


def skip_without(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


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


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def setup(source: Path, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess:
    return run("setup.py", "-q", *arguments, cwd=source, env=environment(**variables))


def assert_refused(source: Path, pattern: str, **variables: str | None) -> None:
    """The build fails, and says why in one line and no traceback."""
    result = setup(source, "build_ext", **variables)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("cvkernels: ")]
    assert len(lines) == 1 and re.search(pattern, lines[0]), result.stderr


def test_unknown_build_mode(source):
    modes = "auto, cpu, cuda, none"
    refused = f"CVKERNELS_BUILD must be one of {modes}, got 'gpu'"
    assert_refused(source, refused, CVKERNELS_BUILD="gpu")


# What is set, the programs that PATH lacks, and what is said.
MISSING = {
    "toolkit": (
        {"CVKERNELS_BUILD": "cuda"},
        "nvcc",
        "CVKERNELS_BUILD=cuda needs a CUDA toolkit: no nvcc on PATH",
    ),
    "toolkit in CUDA_HOME": (
        {"CVKERNELS_BUILD": "cuda", "CUDA_HOME": str(ROOT)},
        "nvcc",
        "CUDA_HOME or CUDA_PATH is .*, which has no bin/nvcc",
    ),
    "compiler": (
        {"CVKERNELS_BUILD": "cpu", "CXX": None},
        r"^(c\+\+|g\+\+|clang\+\+)",
        "no C.. compiler .*: install g.. or set CVKERNELS_BUILD=none",
    ),
}


@LINUX
@pytest.mark.parametrize(("variables", "hidden", "pattern"), MISSING.values(), ids=MISSING.keys())
def test_missing_tools(variables, hidden, pattern, source, tmp_path):
    path = without(hidden, tmp_path / "bin")
    assert_refused(source, pattern, PATH=path, **variables)


@LINUX
def test_toolkit_without_headers(source, tmp_path):
    root = tmp_path / "toolkit"
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'release 13.0, V13.0.88'\necho '#$ TOP={root}'\n")
    nvcc.chmod(0o755)
    cuda = {"CVKERNELS_BUILD": "cuda", "CUDA_HOME": str(root)}
    assert_refused(source, "the toolkit of .* has no cuda_runtime.h", **cuda)
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    assert_refused(source, "the toolkit of .* has no libcudart_static.a", **cuda)


@LINUX
@pytest.mark.parametrize("archs", ["75", "9.0", "eighty", "80;1"])
def test_unknown_architecture(source, archs, tools):
    skip_without("nvcc")
    pattern = f"CVKERNELS_CUDA_ARCHS='{archs}': .* is not one of"
    assert_refused(source, pattern, CVKERNELS_BUILD="cuda", CVKERNELS_CUDA_ARCHS=archs)


@LINUX
def test_bad_max_jobs(source, tools):
    pattern = "MAX_JOBS must be a positive number, got 'many'"
    assert_refused(source, pattern, CVKERNELS_BUILD="cpu", MAX_JOBS="many")


@LINUX
@pytest.mark.parametrize("nvcc", [False, True], ids=["no-toolkit", "toolkit"])
def test_says_once_what_it_builds(nvcc, source, tmp_path, tools):
    if nvcc:
        skip_without("nvcc")
    path = os.environ["PATH"] if nvcc else without("nvcc", tmp_path / "bin")
    # It ends before it compiles.
    result = setup(source, "build_ext", CVKERNELS_BUILD="auto", PATH=path, MAX_JOBS="0")
    said = [line for line in result.stdout.splitlines() if line.startswith("cvkernels: building")]
    what = r"CPU and CUDA ops \(CUDA .*" if nvcc else "CPU ops, no CUDA ops: no nvcc on PATH.*"
    assert len(said) == 1 and re.fullmatch(f"cvkernels: building {what}", said[0]), result.stdout


@LINUX
def test_pybind11_is_its_own_package(source, tmp_path, tools):
    # Not the copy that some torch carry, which refuses to be included beside the stable ABI.
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\nexit 1\n')
    compiler.chmod(0o755)
    setup(source, "build_ext", CVKERNELS_BUILD="cpu", CXX=str(compiler), MAX_JOBS="1")
    command = (tmp_path / "commands").read_text().splitlines()[0]
    homes = [Path(folder).parent.name for folder in re.findall(r"-isystem (\S+)", command)]
    assert [name for name in homes if name in ("pybind11", "torch")] == ["pybind11", "torch"]


def pip_wheel(source: Path, target: Path, mode: str) -> Path:
    options = ("-q", "--no-build-isolation", "--no-deps", "-w", str(target), str(source))
    env = environment(CVKERNELS_BUILD=mode, CUDA_HOME=os.environ.get("CUDA_HOME"))
    result = run("-m", "pip", "wheel", *options, env=env)
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
    skip_without(command[0])
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


def cuobjdump(*arguments: str) -> str:
    """The toolkit's or Triton's."""
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else Path()
    program = shutil.which("cuobjdump") or str(carried)
    if not Path(program).is_file():
        pytest.skip("neither the toolkit nor Triton has cuobjdump here")
    return tool(program, *arguments)


def test_cuda_code_for_every_architecture():
    path = cuda_object()
    archs = extension.build_info()["cuda_archs"].split(";")
    elf, ptx = cuobjdump("--list-elf", path), cuobjdump("--list-ptx", path)
    assert {f"sm_{arch}" for arch in archs} == set(re.findall(r"sm_\d+", elf))
    assert set(re.findall(r"sm_\d+", ptx)) == {f"sm_{archs[-1]}"}


def test_cuda_kernels_keep_to_registers():
    usage = cuobjdump("--dump-resource-usage", cuda_object())
    kernels = re.findall(r"Function (\w+):\s*\n?.*?REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    ops = {path.parent.name for path in (ROOT / "csrc").rglob("*.cu")}
    names = " ".join(name for name, *_ in kernels)
    assert all(re.search(rf"{op}_\w*kernel", names) for op in ops)
    # The stack holds what the call of a 64-bit division or of a root saves, and no element.
    assert not [name for name, _, stack, local in kernels if int(stack) > 16 or int(local)]
