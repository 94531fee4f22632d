"""The compiled part may be absent or broken: that is one line of status, and stops no import."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import cvkernels
from cvkernels import extension

PACKAGE = Path(cvkernels.__file__).parent
needs_cpu = pytest.mark.skipif(
    not extension.has("cpu"), reason=extension.status()["cpu"].reason or "it is there"
)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, without its shared objects."""
    shutil.copytree(
        PACKAGE, tmp_path / "cvkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path / "cvkernels"


def run(package: Path, code: str) -> str:
    """stdout of ``code`` in a new process that imports ``package``."""
    prelude = f"""
        import sys
        # An editable install finds its own shared objects for whatever a copy lacks.
        sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
        sys.path.insert(0, {str(package.parent)!r})
        import cvkernels
        from cvkernels import extension
        assert cvkernels.__file__.startswith({str(package)!r}), cvkernels.__file__
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


USE = """
    import torch
    from cvkernels.backend import BackendError
    from cvkernels.ops.max_pool.op import max_pool

    x = torch.ones(1, 8, 4, 4)
    assert max_pool(x, 2).shape == (1, 8, 2, 2)
    assert max_pool.plan(x, 2).backend == "reference"
    assert max_pool.plan(x, 2).reason == extension.status()["cpu"].reason
    try:
        max_pool(x, 2, backend="native")
    except BackendError as error:
        assert extension.status()["cpu"].reason in str(error)
    else:
        raise AssertionError("native ran")
    assert not extension.has("cpu") and extension.build_info() == {}
    for half in ("cpu", "cuda"):
        reason, remedy = extension.status()[half].reason, extension.status()[half].remedy
        assert reason and remedy and len((reason + remedy).splitlines()) == 1
        print(half, reason)
"""

# The header of a shared object for a processor that is none of ours (EM_68K).
FOREIGN = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + b"\x03\0\x04\0\x01\0\0\0" + bytes(40)
DAMAGE = {
    "absent": (None, "the compiled part is not installed"),
    "empty": (b"", "cvkernels._C does not load: "),
    "garbage": (b"not a shared object\n" * 50, "cvkernels._C does not load: "),
    "for another processor": (FOREIGN, "cvkernels._C does not load: "),
    "truncated": (b"\x7fELF\x02\x01\x01" + bytes(9), "cvkernels._C does not load: "),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_absent_or_broken(copy, content, reason):
    if content is not None:
        (copy / "_C.so").write_bytes(content)
        (copy / "_C_cuda.so").write_bytes(content)
    lines = run(copy, USE).splitlines()
    assert lines[0].startswith(f"cpu {reason}")
    if torch.version.cuda is None:
        assert "is built without CUDA" in lines[1]
    elif content is None:
        assert "built without CUDA ops" in lines[1]
    else:
        assert "_C_cuda.so needs cvkernels._C, which is not loaded" in lines[1]


def test_built_for_another_python(copy):
    (copy / "_C.cpython-27-x86_64-linux-gnu.so").write_bytes(b"")
    assert run(copy, USE).startswith("cpu cvkernels._C does not load: No module named")


def test_cuda_half_without_the_cpu_half(copy):
    # The CPU half says for which GPUs the other one has code.
    (copy / "_C_cuda.so").write_bytes(b"")
    code = """
        extension._status.clear()
        extension.torch.version.cuda = "13.0"
        print(*extension.status()["cuda"])
    """
    out = run(copy, code)
    assert out.startswith("False _C_cuda.so needs cvkernels._C, which is not loaded pip install")


def test_missing_module(copy):
    (copy / "ops/max_pool/op.py").unlink()
    # Without the finders of an editable install, which would find what the copy lacks.
    code = f"import sys; sys.path[:] = {[str(copy.parent), *sys.path]!r}; import cvkernels"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert last == "ModuleNotFoundError: No module named 'cvkernels.ops.max_pool.op'"


@needs_cpu
def test_broken_cuda_half_leaves_the_cpu_half(copy):
    for path in PACKAGE.glob("_C.*"):
        shutil.copy(path, copy)
    (copy / "_C_cuda.so").write_bytes(b"garbage")
    out = run(copy, "print(extension.has('cpu'), extension.has('cuda'))")
    assert out.split() == ["True", "False"]


@needs_cpu
def test_build_info():
    info = extension.build_info()
    assert set(info) == {"cuda_archs", "cuda_toolkit", "compiler", "torch_target", "git_revision"}
    assert info["torch_target"] == "2.11" and info["compiler"]


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80;86;90", (8, 0), True),
        ("80;86;90", (8, 9), True),  # code for 8.6 runs on 8.9
        ("80;86;90", (12, 0), True),  # PTX of the newest
        ("86;90", (8, 0), False),
        ("80;90", (7, 5), False),
        ("90", (8, 9), False),
    ],
)
def test_gpus_without_code(monkeypatch, archs, capability, runs):
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda_archs": archs})
    extension.lacks_gpu.cache_clear()
    reason = extension.lacks_gpu(capability)
    extension.lacks_gpu.cache_clear()
    assert (reason == "") == runs
    if reason:
        assert "CVKERNELS_CUDA_ARCHS=" in reason
