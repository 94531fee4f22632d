"""setup.py: each CVKERNELS_BUILD, and what the shared objects depend on.

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
from tests.support.source_builds import LINUX, ROOT, environment, run, setup, skip_without, without

# It writes its command down, and an empty file where the command has an output.
COMPILER = """#!/bin/sh
echo "$@" >> {commands}
while [ $# -gt 1 ]; do
  [ "$1" = -o ] && : > "$2"
  [ "$1" = -MF ] && echo "none:" > "$2"
  shift
done
"""


@LINUX
def test_objects_of_ordinary_and_sanitized_builds_do_not_mix(source, tmp_path, tools):
    compiler, commands = tmp_path / "compiler", tmp_path / "commands"
    compiler.write_text(COMPILER.format(commands=commands))
    compiler.chmod(0o755)
    options = {"CVKERNELS_BUILD": "cpu", "CXX": str(compiler), "MAX_JOBS": "1"}
    count = len(list((source / "csrc").rglob("*.cpp")))
    for names in (None, "thread", "address,undefined", None):
        commands.unlink(missing_ok=True)
        arguments = ("build_ext", "--inplace")
        assert setup(source, *arguments, **options, CVKERNELS_SANITIZE=names).returncode == 0
        lines = commands.read_text().splitlines()
        made = [line for line in lines if " -c " in line]
        linked = [line for line in lines if "-shared" in line and "-soname" not in line]
        assert (len(made), len(linked)) == (count, 1)
        for line in made + linked:
            assert (f"-fsanitize={names} " in line) == (names is not None)
        assert all(("-O2" in line) == (names is None) for line in made)


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
    commands = (tmp_path / "commands").read_text().splitlines()
    command = next(command for command in commands if "-isystem" in command)
    found = [Path(folder).name for folder in re.findall(r"-isystem (\S+)", command)]
    assert [name.partition("-")[0] for name in found[:2]] == ["pybind11", "torch"]


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
