"""What stops a build of the package, and the one line that says why and what mends it."""

import re
import sys

import pytest

from tests.support.source_builds import (
    LINUX,
    ROOT,
    assert_refused,
    packages,
    setup,
    setup_with,
    skip_without,
    without,
)  # fmt: skip

TOOLS = ("setuptools", "_distutils_hack", "pybind11", "ninja")


def test_unknown_build_mode(source):
    modes = "auto, cpu, cuda, none"
    refused = f"CVKERNELS_BUILD must be one of {modes}, got 'gpu'"
    assert_refused(setup(source, "build_ext", CVKERNELS_BUILD="gpu"), refused)


@pytest.mark.parametrize("names", ["memory", "address", "thread,undefined"])
def test_unknown_sanitizer(source, names):
    refused = f"CVKERNELS_SANITIZE must be address,undefined or thread, or not set, got '{names}'"
    result = setup(source, "build_ext", CVKERNELS_BUILD="cpu", CVKERNELS_SANITIZE=names)
    assert_refused(result, refused)


@pytest.mark.parametrize("mode", ["none", "auto"])
def test_sanitizers_are_for_the_cpu_ops(source, mode):
    refused = f"CVKERNELS_SANITIZE=thread needs CVKERNELS_BUILD=cpu, got '{mode}'"
    result = setup(source, "build_ext", CVKERNELS_BUILD=mode, CVKERNELS_SANITIZE="thread")
    assert_refused(result, refused)


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_other_systems(source, mode, tools, tmp_path):
    seen = packages(tmp_path / "packages", *TOOLS)
    # setup.py's imports first: the standard library's own are for the system that it is on.
    imports = "import setuptools.command.build_ext, setuptools.command.sdist"
    elsewhere = f"{imports}; sys.platform = 'darwin'"
    result = setup_with(seen, source, "build_ext", before=elsewhere, CVKERNELS_BUILD=mode)
    assert_refused(result, f"CVKERNELS_BUILD={mode} needs Linux, this is darwin")


# What is set, the programs that PATH lacks, and what is said.
MISSING_PROGRAMS = {
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
@pytest.mark.parametrize(
    ("variables", "hidden", "pattern"), MISSING_PROGRAMS.values(), ids=MISSING_PROGRAMS.keys()
)
def test_missing_programs(variables, hidden, pattern, source, tmp_path):
    path = without(hidden, tmp_path / "bin")
    assert_refused(setup(source, "build_ext", PATH=path, **variables), pattern)


# The package that is absent, and what is said.
MISSING_PACKAGES = {
    "torch": "no torch to take headers from: pip install torch, or set CVKERNELS_BUILD=none",
    "pybind11": "no pybind11: pip install pybind11, or set CVKERNELS_BUILD=none",
    "ninja": "no ninja: pip install ninja, or set CVKERNELS_BUILD=none",
}


@LINUX
@pytest.mark.parametrize("name", MISSING_PACKAGES)
def test_missing_packages(name, source, tmp_path, tools):
    names = [tool for tool in TOOLS if tool != name]
    seen = packages(tmp_path / "packages", *names, torch="" if name == "torch" else "2.13.0")
    path = without("ninja", tmp_path / "bin")
    result = setup_with(seen, source, "build_ext", CVKERNELS_BUILD="cpu", PATH=path)
    assert_refused(result, MISSING_PACKAGES[name])


@LINUX
def test_torch_below_the_floor(source, tmp_path, tools):
    seen = packages(tmp_path / "packages", *TOOLS, torch="2.10.0+cpu")
    result = setup_with(seen, source, "build_ext", CVKERNELS_BUILD="cpu")
    assert_refused(result, r"torch >= 2\.11 are needed, this is torch 2\.10\.0\+cpu: pip install")


@LINUX
def test_no_headers_of_python(source, tmp_path, tools):
    seen = packages(tmp_path / "packages", *TOOLS, torch="2.13.0")
    moved = (
        "import sysconfig; paths = sysconfig.get_paths\n"
        "sysconfig.get_paths = lambda *_, **__: {**paths(*_, **__), 'include': '/nowhere'}"
    )
    result = setup_with(seen, source, "build_ext", before=moved, CVKERNELS_BUILD="cpu")
    assert_refused(result, r"no Python\.h in /nowhere: install python3-dev or set")


def toolkit(root, version):
    """A CUDA_HOME whose nvcc is of this version, and has nothing else."""
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'release {version}, V{version}.1'\necho '#$ TOP={root}'\n")
    nvcc.chmod(0o755)
    return str(root)


@LINUX
def test_toolkit_without_headers(source, tmp_path):
    root = tmp_path / "toolkit"
    cuda = {"CVKERNELS_BUILD": "cuda", "CUDA_HOME": toolkit(root, "12.0")}
    assert_refused(setup(source, "build_ext", **cuda), "the toolkit of .* has no cuda_runtime.h")
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    assert_refused(setup(source, "build_ext", **cuda), "the toolkit of .* has no libcudart_static")


# The toolkit's version, that of torch's CUDA, and what is said.
TOOLKITS = {
    "too old": ("11.8", "13.0", "nvcc is CUDA 11.8, and C..20 needs CUDA 12 or newer"),
    "newer than torch's": (
        "13.0",
        "12.8",
        "nvcc is CUDA 13.0, and torch is built for CUDA 12.8, .*: set CUDA_HOME to a toolkit of "
        "CUDA 12, or install a torch for CUDA 13",
    ),
    "older than torch's": ("12.0", "13.0", "has no cuda_runtime.h"),
    "of a later minor version": ("13.1", "13.0", "has no cuda_runtime.h"),
    "beside a torch without CUDA": ("13.0", None, "has no cuda_runtime.h"),
}


@LINUX
@pytest.mark.parametrize(("version", "theirs", "pattern"), TOOLKITS.values(), ids=TOOLKITS.keys())
def test_toolkits(version, theirs, pattern, source, tmp_path, tools):
    seen = packages(tmp_path / "packages", *TOOLS, torch="2.13.0", cuda=theirs)
    home = toolkit(tmp_path / "toolkit", version)
    result = setup_with(seen, source, "build_ext", CVKERNELS_BUILD="cuda", CUDA_HOME=home)
    assert_refused(result, f"CVKERNELS_BUILD=cuda needs a CUDA toolkit: .*{pattern}")
    # "auto" says why it leaves the CUDA ops out; MAX_JOBS ends it before it compiles.
    auto = {"CVKERNELS_BUILD": "auto", "CUDA_HOME": home, "MAX_JOBS": "0"}
    said = setup_with(seen, source, "build_ext", **auto).stdout.splitlines()
    assert len(said) == 1 and said[0].startswith("cvkernels: building CPU ops, no CUDA ops: ")


@LINUX
@pytest.mark.parametrize("archs", ["75", "9.0", "eighty", "80;1"])
def test_unknown_architecture(source, archs, tools):
    skip_without("nvcc")
    result = setup(source, "build_ext", CVKERNELS_BUILD="cuda", CVKERNELS_CUDA_ARCHS=archs)
    assert_refused(result, f"CVKERNELS_CUDA_ARCHS='{archs}': .* is not one of")


@LINUX
def test_bad_max_jobs(source, tools):
    result = setup(source, "build_ext", CVKERNELS_BUILD="cpu", MAX_JOBS="many")
    assert_refused(result, "MAX_JOBS must be a positive number, got 'many'")


@LINUX
def test_compiler_that_fails(source, tools):
    result = setup(source, "build_ext", CVKERNELS_BUILD="cpu", CXX="false", MAX_JOBS="1")
    assert_refused(result, "compilation failed, see the lines above; mend it or set CVKERNELS_BUI")


def test_metadata_needs_setuptools_alone(source, tmp_path):
    # Resolvers ask for it in environments without torch.
    pytest.importorskip("setuptools")
    seen = packages(tmp_path / "packages", "setuptools", "_distutils_hack")
    result = setup_with(seen, source, "egg_info", CVKERNELS_BUILD="auto")
    assert result.returncode == 0, result.stderr
    metadata = (source / "cvkernels.egg-info/PKG-INFO").read_text()
    assert "Requires-Dist: torch>=2.11\n" in metadata
    assert set(re.findall("^Dynamic: (.+)$", metadata, re.MULTILINE)) <= {"license-file"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is Python 3.11's")
def test_isolated_builds_bring_their_own_torch():
    import tomllib

    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    names = {text.split("=")[0].split(">")[0] for text in required}
    assert names == {"setuptools", "torch", "pybind11", "ninja"}
