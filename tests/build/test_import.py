"""Importing the package needs torch alone; what else is missing is one line in info()."""

import os
import subprocess
import sys
import textwrap

import pytest

RUN = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import cvkernels

model = cvkernels.models.resnet18(num_classes=4).eval()
with torch.no_grad():
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)
assert not LAZY & set(sys.modules), LAZY & set(sys.modules)
print(cvkernels.info())
"""


def run(missing, lazy=()):
    code = f"MISSING, LAZY = {set(missing)!r}, {set(lazy)!r}\n" + textwrap.dedent(RUN)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["triton", "torchvision", "timm"])
def test_imports_and_runs_without(name):
    printed = run({name})
    (line,) = (line for line in printed.splitlines() if line.startswith(name))
    # A remedy that does not fit is on a line of its own.
    assert " no " in line and f"->  pip install {name}" in printed


def test_imports_and_runs_without_any_of_them():
    run({"triton", "torchvision", "timm", "PIL", "sklearn", "rich"})


def test_importing_and_a_cpu_forward_import_nothing_optional():
    run((), lazy={"triton", "torchvision", "timm", "sklearn", "rich", "matplotlib"})


def test_older_torch_is_refused_in_one_line():
    code = "import torch; torch.__version__ = '2.10.0+cu128'; import cvkernels"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == (
        "ImportError: cvkernels needs torch >= 2.11, this is torch 2.10.0+cu128: "
        "pip install --upgrade torch"
    )


def test_broken_triton_is_one_line(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise RuntimeError('0 active drivers\\n([])')")
    code = "import cvkernels; print(cvkernels.backend.lacks_triton('cuda'))"
    said = at_home(code, tmp_path, PYTHONPATH=str(tmp_path)).strip()
    assert said == "Triton does not import: RuntimeError: 0 active drivers ([])"


def at_home(code, home, **variables):
    """stdout of ``code`` in a process of this HOME, None for none."""
    merged = {**os.environ, "HOME": home, "TRITON_INTERPRET": None, **variables}
    merged = {name: str(value) for name, value in merged.items() if value is not None}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=merged
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


HOMES = ("writable", "unset", "a file")


@pytest.fixture(params=HOMES)
def home(request, tmp_path):
    (tmp_path / "file").touch()
    return {"writable": tmp_path, "unset": None, "a file": tmp_path / "file"}[request.param]


def test_runs_and_saves_in_any_home(home, tmp_path):
    path = tmp_path / "frozen.cvk"
    code = f"""
        import torch, cvkernels
        model = cvkernels.models.resnet18(num_classes=4).eval()
        cvkernels.freeze(model, torch.rand(1, 3, 32, 32)).save({str(path)!r})
        assert cvkernels.load_frozen({str(path)!r})(torch.rand(1, 3, 32, 32)).shape == (1, 4)
        print(cvkernels.info())
    """
    at_home(textwrap.dedent(code), home)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"file", "frozen.cvk"}


CACHE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import cvkernels.ops.common.triton_launch
from triton.runtime.cache import FileCacheManager
FileCacheManager("key").put(b"compiled", "kernel.cubin")
print(*[str(warning.message) for warning in caught if "cache" in str(warning.message)], sep="\\n")
"""


@pytest.mark.parametrize("where", ["HOME", "TRITON_CACHE_DIR"])
def test_triton_compiles_where_its_cache_cannot_be_written(where, tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "file"
    file.touch()
    there = {"TRITON_CACHE_DIR": None, where: file / "cache"}
    (line,) = at_home(CACHE, there.pop("HOME", tmp_path), **there).splitlines()
    assert line.startswith(f"Triton's cache {file}") and "set TRITON_CACHE_DIR to a folder" in line


def test_triton_cache_that_can_be_written_is_left_alone(tmp_path):
    pytest.importorskip("triton")
    assert at_home(CACHE, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache")).strip() == ""
    assert [path.name for path in (tmp_path / "cache").rglob("*.cubin")] == ["kernel.cubin"]


def test_importing_takes_little_beside_torch():
    code = (
        "import time, torch; start = time.process_time(); import cvkernels\n"
        "print(time.process_time() - start)"
    )
    command = [sys.executable, "-c", code]
    # The first run compiles the modules, where installing has not done so.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    seconds = [float(subprocess.check_output(command, text=True, env=env)) for _ in range(3)]
    assert min(seconds) <= 0.15, seconds  # 0.11 on an EPYC, where torch takes 1.6
