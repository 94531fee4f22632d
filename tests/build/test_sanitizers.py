"""The CPU ops under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The extension is built for them in a copy of the repository, and tests of the ops run there. Python
and PyTorch are not instrumented: what is found is in csrc, or in memory that it was given.
"""

import importlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels import extension
from tests.support.five_families import Uses, assert_same_bits
from tests.support.made_once import made_once, shared_folder
from tests.support.own_process import ROOT, ended, start

ADDRESS, THREAD = "address,undefined", "thread"
RUNTIMES = {ADDRESS: ("libasan.so", "libubsan.so"), THREAD: ("libtsan.so",)}
OPTIONS = {
    ADDRESS: {
        # CPython leaves memory to the end of the process; PyTorch's libraries define some variables
        # twice; some tests ask for more memory than there is.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Python's own allocator would hide what is read after it is freed.
        "PYTHONMALLOC": "malloc",
    },
    THREAD: {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1"},
}

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded as on Linux"),
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the sources are not here"),
    pytest.mark.skipif(not extension.has("cpu"), reason="the compiled extension is missing"),
]


def runtimes(names: str) -> str:
    """What a process has to load first, in LD_PRELOAD's form."""
    if not shutil.which("g++"):
        pytest.skip("there is no g++")
    paths = []
    # libstdc++ too: the sanitizers look for its functions before Python has loaded it.
    for name in (*RUNTIMES[names], "libstdc++.so.6"):
        command = ["g++", f"-print-file-name={name}"]
        path = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"g++ has no {name}")
        paths.append(str(path))
    return ":".join(paths)


def build(names: str, folder: Path) -> None:
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for part in ("csrc", "cvkernels", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    switches = {"CVKERNELS_BUILD": "cpu", "CVKERNELS_SANITIZE": names, "CXX": "g++"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    options = {"cwd": folder, "env": {**os.environ, **switches}, "text": True}
    built = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options
    )
    assert built.returncode == 0, built.stdout


class Sanitized:
    """A copy of the repository whose extension is built for sanitizers."""

    def __init__(self, names: str, factory: pytest.TempPathFactory) -> None:
        preload = runtimes(names)
        for module in ("pybind11", "ninja", "setuptools"):
            pytest.importorskip(module)
        self.folder = made_once(
            shared_folder(factory) / f"sanitized_{names}", lambda part: build(names, part)
        )
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        self.environment = {**kept, **OPTIONS[names], "LD_PRELOAD": preload}

    def call(self, function, *arguments) -> tuple[int, str, str]:
        """The exit status, stdout and stderr of a process that calls the copy's function."""
        where = {"cwd": self.folder, "env": self.environment}
        return ended(start(function, *arguments, **where), timeout=1200)

    def run(self, *command: str) -> str:
        """stdout of a Python that succeeds there."""
        where = {"cwd": self.folder, "env": self.environment, "timeout": 1200}
        result = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False, **where
        )
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
        return result.stdout

    def run_tests(self, *arguments: str) -> None:
        # faulthandler would take the signals that the sanitizers report.
        plugins = ("-p", "no:faulthandler", "-p", "no:cacheprovider")
        report = self.run("-m", "pytest", "-q", *plugins, *arguments)
        assert " passed" in report and " failed" not in report


@pytest.fixture(scope="module")
def addresses(tmp_path_factory) -> Sanitized:
    return Sanitized(ADDRESS, tmp_path_factory)


@pytest.fixture(scope="module")
def threads(request, tmp_path_factory) -> Sanitized:
    if not request.config.getoption("--tsan"):
        pytest.skip("only with --tsan")
    return Sanitized(THREAD, tmp_path_factory)


def squeezing(size: int) -> tuple:
    """A DirectCall that reads a map, whose memory is not kept, and writes its means."""
    x = torch.randn(2, 64, size, size).contiguous(memory_format=torch.channels_last)
    out = torch.empty(2, 64)
    direct = importlib.import_module("cvkernels._C").direct(
        lambda: torch.ops.cvkernels.squeeze_native_out(x, out)
    )
    return direct, x, out


def read_freed_memory() -> None:
    """The copy of this package reads through an address whose tensor is gone."""
    assert Path(cvkernels.__file__).is_relative_to(Path.cwd())
    direct, *tensors = squeezing(16)
    direct(*direct.addresses)
    print("ran", flush=True)
    tensors.clear()
    direct(*direct.addresses)


@pytest.mark.long  # with the build
def test_memory_that_is_freed_is_found(addresses):
    status, out, err = addresses.call(read_freed_memory)
    assert (status != 0, out) == (True, "ran\n"), err
    assert "AddressSanitizer: heap-use-after-free" in err and "csrc/squeeze_excite" in err


def test_undefined_behaviour_is_looked_for(addresses):
    (library,) = addresses.folder.glob("cvkernels/_C.*.so")
    undefined = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True).stdout
    assert "__ubsan_handle_shift_out_of_bounds_abort" in undefined


# All algorithms, with channels and sizes that nothing divides.
SELECTED = "nchw and (odd or not-8) or window or every_16"


def test_every_instruction_set(addresses):
    addresses.run_tests("tests/build/test_instruction_sets.py", "-k", SELECTED)


def test_gradients_of_convolutions(addresses):
    """Of every size that tiles, blocks and bands do not divide, by every instruction set."""
    files = (f"tests/ops/test_{op}_training.py" for op in ("conv_bn_act", "depthwise_conv_bn_act"))
    addresses.run_tests(*files, "-k", "exact or nothing or one-row or threads")


def test_random_calls(addresses):
    addresses.run_tests("tests/ops/contract/test_random_calls.py", "--fuzz", "30")


def test_direct_and_kept_calls(addresses):
    files = ("tests/build/test_direct_calls.py", "tests/build/test_kept_calls.py")
    addresses.run_tests(*files, "-k", "not 1029")


def test_recycled_memory_and_guards(addresses):
    addresses.run_tests("tests/nn/test_recycled.py", "tests/build/test_guard.py")


def test_frozen_random_networks(addresses):
    out = addresses.run("-m", "tests.support.random_networks", "0", "30")
    assert "'right'" in out and "seed" not in out, out


# Threads


def write_in_two_threads() -> None:
    torch.set_num_threads(1)
    direct, *_tensors = squeezing(32)
    in_threads(lambda: [direct(*direct.addresses) for _ in range(100)])


def in_threads(function, count: int = 4) -> None:
    """``function`` in several threads; what it raises is raised here."""
    raised = []

    def call():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    others = [threading.Thread(target=call) for _ in range(count)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    if raised:
        raise raised[0]


def use_in_threads() -> None:
    # ThreadSanitizer does not see how OpenMP's own threads wait for each other.
    torch.set_num_threads(1)
    uses = Uses()
    expected = uses.all()
    in_threads(lambda: [assert_same_bits(uses.inference(), expected) for _ in range(25)])
    convolution = nn.Conv2d(16, 64, 3, padding=1).eval()
    large = cvkernels.freeze(convolution, torch.randn(2, 16, 128, 128))
    x = torch.randn(2, 16, 128, 128)
    y = large(x)

    def call():
        for _ in range(10):
            assert torch.equal(large(x), y)

    in_threads(call)


def test_a_race_is_found(threads):
    status, _, err = threads.call(write_in_two_threads)
    assert status != 0 and "ThreadSanitizer: data race" in err and "csrc/squeeze_excite" in err, err


def test_concurrent_calls(threads):
    status, _, err = threads.call(use_in_threads)
    assert (status, err) == (0, "")


def test_ops_on_bytes(addresses):
    addresses.run_tests("tests/ops/test_quantised.py")
