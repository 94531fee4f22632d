"""The compiled part of cvkernels; everything else about the package is in pyproject.toml.

Two shared objects, written with LibTorch's stable ABI so that one build serves every torch >= 2.11:

- ``cvkernels/_C``: Python module and CPU ops, from csrc's .cpp; needs libtorch_cpu.
- ``cvkernels/_C_cuda.so``: CUDA ops, from csrc's .cu; needs libtorch_cuda, not the CUDA runtime.

There is one wheel for each CPython and none for abi3: pybind11 does not compile under
Py_LIMITED_API, and csrc/common/stamps.h reads fields of dicts and types that it hides.

Switches, all environment variables:

- ``CVKERNELS_BUILD=auto|cpu|cuda|none``: ``auto`` (the default) builds the CUDA ops if a toolkit
  is found, ``cuda`` insists on them, ``none`` gives a pure-Python package.
- ``CVKERNELS_CUDA_ARCHS``: compute capabilities to build for, such as ``"80;90"``. The default is
  ``80;86;90;100``, less those that the toolkit does not know; 8.9 runs the code of 8.6. PTX of the
  newest is added: it runs on every later GPU.
- ``CVKERNELS_SANITIZE=address,undefined|thread``: CPU ops that report their own errors of memory
  or their data races, to test them; tests/build/test_sanitizers.py has what runs them. Only with
  ``CVKERNELS_BUILD=cpu``.
- ``CUDA_HOME`` or ``CUDA_PATH``: the toolkit, where it is not that of the ``nvcc`` on ``PATH``.
  Its major version may be older than that of torch's CUDA, not newer: drivers run what is older.
- ``CXX``: the C++ compiler. ``MAX_JOBS``: how many files compile at once.

Another processor's wheel comes from its cross compiler in ``CXX``, with setuptools' own
``_PYTHON_HOST_PLATFORM=linux-aarch64`` and ``SETUPTOOLS_EXT_SUFFIX`` (see .ci/aarch64).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
TORCH_MIN = (2, 11)
DEFAULT_ARCHS = (80, 86, 90, 100)
# As fast as GCC's -O3, and compiled in three quarters of its time.
OPTIMISED = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]
OPTIMISED += ["-Wno-ignored-optimization-argument"]  # clang knows no cost models
MODES = ("auto", "cpu", "cuda", "none")
SANITIZERS = ("address,undefined", "thread")
WITHOUT = "or set CVKERNELS_BUILD=none for a pure-Python package"


class BuildError(SystemExit):
    """Ends the build with one line."""

    def __init__(self, message: str) -> None:
        super().__init__(f"cvkernels: {message}")


def build_mode() -> str:
    mode = os.environ.get("CVKERNELS_BUILD", "") or "auto"
    if mode not in MODES:
        raise BuildError(f"CVKERNELS_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if sys.platform != "linux" and mode != "none":
        if mode != "auto":
            raise BuildError(f"CVKERNELS_BUILD={mode} needs Linux, this is {sys.platform}")
        say(
            f"a pure-Python package, since the compiled part needs Linux and this is {sys.platform}"
        )
        return "none"
    return mode


def sanitizers(mode: str) -> str:
    """What CVKERNELS_SANITIZE asks for; empty for an ordinary build."""
    names = os.environ.get("CVKERNELS_SANITIZE", "")
    if names and names not in SANITIZERS:
        raise BuildError(
            f"CVKERNELS_SANITIZE must be {' or '.join(SANITIZERS)}, or not set, got {names!r}"
        )
    if names and mode != "cpu":
        raise BuildError(f"CVKERNELS_SANITIZE={names} needs CVKERNELS_BUILD=cpu, got {mode!r}")
    return names


def say(what: str) -> None:
    print(f"cvkernels: building {what}", flush=True)


class Toolkit(NamedTuple):
    """A CUDA toolkit that can compile and link."""

    nvcc: str
    version: str
    library_dir: str
    archs: list[int]

    @classmethod
    def find(cls) -> Toolkit | str:
        """The toolkit, or why there is none that serves."""
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
        if nvcc is None:
            return "no nvcc on PATH, and neither CUDA_HOME nor CUDA_PATH is set"
        if not os.access(nvcc, os.X_OK):
            return f"CUDA_HOME or CUDA_PATH is {home}, which has no bin/nvcc"

        # The nvcc on PATH may be a wrapper script; its dry run tells where the real one lives.
        plan = _output([nvcc, "--dryrun", "-x", "cu", os.devnull])
        banner = _output([nvcc, "--version"])
        version = re.search(r"release (\d+\.\d+)", banner or "")
        top = re.search(r"TOP=(.+)", plan or "")
        if version is None or top is None:
            return f"{nvcc} does not run"
        if _major(version[1]) < 12:
            return f"{nvcc} is CUDA {version[1]}, and C++20 needs CUDA 12 or newer"
        if (theirs := torch_cuda()) and _major(version[1]) > _major(theirs):
            return (
                f"{nvcc} is CUDA {version[1]}, and torch is built for CUDA {theirs}, whose drivers "
                f"need not run it: set CUDA_HOME to a toolkit of CUDA {_major(theirs)}, or install "
                f"a torch for CUDA {_major(version[1])} and pip install --no-build-isolation"
            )
        root = Path(top[1].strip()).resolve()
        includes = [*re.findall(r'"-I([^"]+)"', plan), str(root / "include")]
        libraries = [*re.findall(r'"-L([^"]+)"', plan), str(root / "lib64"), str(root / "lib")]
        if not any(os.path.isfile(os.path.join(d, "cuda_runtime.h")) for d in includes):
            return f"the toolkit of {nvcc}, {root}, has no cuda_runtime.h"
        library_dir = next(
            (d for d in libraries if os.path.isfile(os.path.join(d, "libcudart_static.a"))), None
        )
        if library_dir is None:
            return f"the toolkit of {nvcc}, {root}, has no libcudart_static.a"
        known = re.findall(r"compute_(\d+)\s", (_output([nvcc, "--list-gpu-arch"]) or "") + "\n")
        return cls(nvcc, version[1], library_dir, sorted(map(int, known)))

    def selected_archs(self) -> list[int]:
        text = os.environ.get("CVKERNELS_CUDA_ARCHS", "").strip()
        if not text:
            return [arch for arch in DEFAULT_ARCHS if arch in self.archs]
        parts = [part for part in re.split(r"[;,\s]+", text) if part]
        usable = [arch for arch in self.archs if arch >= DEFAULT_ARCHS[0]]
        for part in parts:
            if not part.isdecimal() or int(part) not in usable:
                raise BuildError(
                    f"CVKERNELS_CUDA_ARCHS={text!r}: {part!r} is not one of "
                    f"{';'.join(map(str, usable))}, which CUDA {self.version} and cvkernels know"
                )
        return sorted({int(part) for part in parts})


class Inputs(NamedTuple):
    """What every build needs, CUDA or not."""

    cxx: str
    ninja: str
    torch_include: str
    python_include: str
    pybind11_include: str

    @classmethod
    def find(cls) -> Inputs:
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        cxx = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
        if cxx is None:
            raise BuildError(f"no C++ compiler ({', '.join(names)}): install g++ {WITHOUT}")
        ninja = shutil.which("ninja")
        if ninja is None and importlib.util.find_spec("ninja"):
            import ninja as package

            ninja = os.path.join(package.BIN_DIR, "ninja")
        if ninja is None:
            raise BuildError(f"no ninja: pip install ninja, {WITHOUT}")
        torch = importlib.util.find_spec("torch")  # not imported: only its headers are needed
        if torch is None or not torch.submodule_search_locations:
            raise BuildError(f"no torch to take headers from: pip install torch, {WITHOUT}")
        version = _version("torch")
        if tuple(map(int, version.split(".")[:2])) < TORCH_MIN:
            wanted = ".".join(map(str, TORCH_MIN))
            raise BuildError(
                f"the headers of torch >= {wanted} are needed, this is torch {version}: "
                f"pip install --upgrade torch, {WITHOUT}"
            )
        if importlib.util.find_spec("pybind11") is None:
            raise BuildError(f"no pybind11: pip install pybind11, {WITHOUT}")
        import pybind11

        python_include = sysconfig.get_paths()["include"]
        if not os.path.isfile(os.path.join(python_include, "Python.h")):
            raise BuildError(f"no Python.h in {python_include}: install python3-dev {WITHOUT}")
        return cls(
            cxx,
            ninja,
            os.path.join(torch.submodule_search_locations[0], "include"),
            python_include,
            pybind11.get_include(),
        )

    def linked(self, folder: Path) -> Inputs:
        """The packages' headers by links in the folder, named by version: pip builds in a new
        environment each time, and what was compiled is up to date in the next one."""
        links = {}
        for name in ("torch", "pybind11"):
            path, link = getattr(self, f"{name}_include"), folder / f"{name}-{_version(name)}"
            if not link.is_symlink() or os.readlink(link) != path:
                link.unlink(missing_ok=True)
                link.symlink_to(path)
            links[f"{name}_include"] = str(link)
        return self._replace(**links)


class NinjaBuild(build_ext):
    """Compiles both shared objects in one ninja run."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_cuda"):  # a plain library, not a Python module
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        inputs = Inputs.find()
        toolkit = TOOLKIT if isinstance(TOOLKIT, Toolkit) else None
        archs = toolkit.selected_archs() if toolkit else []
        if toolkit:
            listed = ", sm_".join(map(str, archs))
            theirs = torch_cuda() or toolkit.version
            other = f"; torch is built for CUDA {theirs}" if theirs != toolkit.version else ""
            say(f"CPU and CUDA ops (CUDA {toolkit.version}, sm_{listed} and later{other})")
        elif MODE == "cpu":
            say("CPU ops" + f" under sanitizers ({SANITIZE})" * bool(SANITIZE))
        else:
            say(f"CPU ops, no CUDA ops: {TOOLKIT}")

        # An editable install's own folder for objects is gone after it.
        kept = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        temp = kept if self.editable_mode else Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        inputs = inputs.linked(temp)
        write_if_changed(temp / "build_info.h", build_info_header(toolkit, archs))
        outputs = [Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions]
        for output in outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text(ninja_file(inputs, toolkit, archs, temp, outputs))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        if not jobs.isdecimal() or int(jobs) < 1:
            raise BuildError(f"MAX_JOBS must be a positive number, got {jobs!r}")
        command, start = [inputs.ninja, "-C", str(temp), "-j", jobs], time.monotonic()
        if subprocess.run(command + ["-v"] * bool(self.verbose > 1)).returncode != 0:
            raise BuildError(f"compilation failed, see the lines above; mend it {WITHOUT}")
        print(f"cvkernels: built in {time.monotonic() - start:.0f} s, {jobs} files at a time")


class SourceDist(sdist):
    """An sdist carries csrc whatever CVKERNELS_BUILD says."""

    def make_distribution(self) -> None:
        self.filelist.extend(sources("*.*"))
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()


def ninja_file(
    inputs: Inputs, toolkit: Toolkit | None, archs: list[int], temp: Path, outputs: list[Path]
) -> str:
    """The build of ``outputs``: _C, then _C_cuda if there is a toolkit."""
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_MIN[0]:02x}{TORCH_MIN[1]:02x}000000000000"
    common = [target, "-std=c++20", f"-I{_shell(temp)}", f"-I{_shell(ROOT / 'csrc')}"]
    # No object names a folder of the machine that built it.
    prefixes = {ROOT: ".", inputs.torch_include: "torch", inputs.pybind11_include: "pybind11"}
    prefix_maps = [f"-ffile-prefix-map={_shell(path)}={name}" for path, name in prefixes.items()]
    # GCC would write what a link points to, where that is shorter; clang has no such switch.
    spelled = "-fno-canonical-system-headers"
    if _output([*shlex.split(inputs.cxx), spelled, "-E", "-x", "c++", os.devnull]) is not None:
        prefix_maps.append(spelled)
    cxxflags = common + ["-fPIC", "-fvisibility=hidden", "-Wall"]
    cxxflags += sanitized_flags() if SANITIZE else OPTIMISED
    # Neither changes a result: a comparison with NaN may stay quiet, so that it is vectorised.
    cxxflags += ["-fno-math-errno", "-fno-trapping-math", *prefix_maps]
    # "omp simd" alone, no threads and no library: a loop says that its sum may be reordered.
    cxxflags += ["-fopenmp-simd"]
    # pybind11 first: torch 2.11 carries a copy that refuses to be included beside the stable ABI.
    for include in (inputs.pybind11_include, inputs.torch_include, inputs.python_include):
        cxxflags += ["-isystem", _shell(include)]
    # A sanitizer's report names functions, which a stripped library does not.
    closing = f"-fsanitize={SANITIZE}" if SANITIZE else "-Wl,--exclude-libs,ALL -Wl,-s"
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {inputs.cxx.replace('$', '$$')}",
        f"cxxflags = {' '.join(cxxflags)}",
        f"ldflags = -shared -Wl,-O1 -Wl,--as-needed {closing}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxxflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = C++ $in",
        # An empty library with the soname of torch's: all that linking needs is a DT_NEEDED entry.
        "rule stub",
        "  command = $cxx -shared -x c /dev/null -Wl,-soname,$soname -o $out",
        "  description = stub $soname",
        "rule link",
        "  command = $cxx $ldflags -o $out $in -Wl,--no-as-needed $stub -Wl,--as-needed $libs",
        "  description = link $out",
    ]
    targets = [("libtorch_cpu.so", "cxx", sources("*.cpp"), "")]
    if toolkit:
        gencode = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
        gencode.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        nvccflags = common + ["-O3", "-DUSE_CUDA", *gencode]
        nvccflags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        nvccflags += ["-ccbin", _shell(shutil.which(shlex.split(inputs.cxx)[-1]) or inputs.cxx)]
        nvccflags += ["-isystem", _shell(inputs.torch_include), "--threads", "2"]
        nvccflags += [f"-Xcompiler {prefix_map}" for prefix_map in prefix_maps]
        lines += [
            f"nvcc = {_shell(toolkit.nvcc)}",
            f"nvccflags = {' '.join(nvccflags)}",
            "rule nvcc",
            "  command = $nvcc -MMD -MF $out.d $nvccflags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CUDA $in",
        ]
        libs = f"-L{_shell(toolkit.library_dir)} -lcudart_static -lpthread -ldl -lrt"
        targets.append(("libtorch_cuda.so", "nvcc", sources("*.cu"), libs))
    for output, (soname, rule, files, libs) in zip(outputs, targets, strict=True):
        objects = [f"{file}.o" for file in files]
        for file in slowest_first(files):
            lines.append(f"build {file}.o: {rule} {_target(ROOT / file)}")
        lines += [f"build {soname}: stub", f"  soname = {soname}"]
        lines += [f"build {_target(output)}: link {' '.join(objects)} | {soname}"]
        lines += [f"  stub = {soname}", f"  libs = {libs}"]
    return "\n".join(lines) + "\n"


def sanitized_flags() -> list[str]:
    # vptr would compare the types of torch and pybind11 with hidden ones of the same name.
    checks = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"]
    return ["-O1", "-g1", "-fno-omit-frame-pointer", *checks]  # -g takes half as long again


def build_info_header(toolkit: Toolkit | None, archs: list[int]) -> str:
    values = {
        "CVK_CUDA_ARCHS": ";".join(map(str, archs)),
        "CVK_CUDA_TOOLKIT": toolkit.version if toolkit else "",
        "CVK_TORCH_TARGET": ".".join(map(str, TORCH_MIN)),
        "CVK_GIT_REVISION": git_revision(),
    }
    defines = "".join(f'#define {name} "{value}"\n' for name, value in values.items())
    return f"#pragma once\n{defines}"


def git_revision() -> str:
    """The commit of this checkout; empty if this is none, even one inside another repository."""
    git = ["git", "-C", str(ROOT)]
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return ""
    return (_output([*git, "rev-parse", "--short=12", "--verify", "-q", "HEAD"]) or "").strip()


def torch_cuda() -> str:
    """The CUDA that the torch at hand is built for; empty where there is neither."""
    torch = importlib.util.find_spec("torch")
    for folder in (torch and torch.submodule_search_locations) or ():
        path = Path(folder) / "version.py"
        text = path.read_text() if path.is_file() else ""
        if found := re.search(r"^cuda\b.*=\s*['\"]([\d.]+)", text, re.MULTILINE):
            return found[1]
    return ""


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


def slowest_first(files: list[str]) -> list[str]:
    """The order to compile in, so that no long compilation is left to run alone at the end:
    module.cpp instantiates pybind11, the others what lies beside them."""

    def work(file: str) -> float:
        if file.endswith("module.cpp"):
            return float("inf")
        return sum(path.stat().st_size for path in (ROOT / file).parent.iterdir())

    return sorted(files, key=work, reverse=True)


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _output(command: list[str]) -> str | None:
    """stdout and stderr of a command, None if it does not run."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _shell(path: str | Path) -> str:
    """A path in a ninja variable that a shell will read."""
    return shlex.quote(str(path)).replace("$", "$$")


def _target(path: str | Path) -> str:
    """A path in a ninja build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


MODE = build_mode()
SANITIZE = sanitizers(MODE)
TOOLKIT = Toolkit.find() if MODE in ("auto", "cuda") else "not asked for"
if MODE == "cuda" and isinstance(TOOLKIT, str):
    raise BuildError(f"CVKERNELS_BUILD=cuda needs a CUDA toolkit: {TOOLKIT}")

extensions = []
if MODE != "none":
    extensions.append(
        Extension("cvkernels._C", sources("*.cpp"), depends=sources("*.h") + sources("*.cuh"))
    )
if isinstance(TOOLKIT, Toolkit):
    extensions.append(
        Extension("cvkernels._C_cuda", sources("*.cu"), depends=sources("*.h") + sources("*.cuh"))
    )

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild, "sdist": SourceDist})
