"""The repository's shape: one stem per op, layers that import only downwards, short files."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(p.name for p in (ROOT / "cvkernels/ops").iterdir() if (p / "op.py").is_file())
SOURCES = sorted((ROOT / "cvkernels").rglob("*.py"))
# Each layer may import itself and those before it.
LAYERS = ["record", "backend", "extension", "ops", "functional", "nn", "models"]
ALLOWED_TOP = "pyproject.toml setup.py csrc cvkernels benchmarks tests README.md LICENSE".split()


@pytest.mark.parametrize("op", OPS)
def test_op_is_complete(op):
    for path in (
        f"cvkernels/ops/{op}/reference.py",
        f"tests/test_{op}.py",
        f"benchmarks/bench_{op}.py",
    ):
        assert (ROOT / path).is_file(), f"op {op!r} lacks {path}"


@pytest.mark.parametrize("op", OPS)
def test_op_is_public_under_its_name(op):
    import cvkernels

    function = getattr(cvkernels.functional, op)
    sections = [
        function.__doc__.find(title) for title in ("Args:", "Returns:", "Raises:", "Source: ")
    ]
    assert -1 not in sections and sections == sorted(sections)


def test_native_sources_belong_to_ops():
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert folders - {"common"} <= set(OPS)
    for folder in folders - {"common"}:
        files = {path.name for path in (ROOT / "csrc" / folder).iterdir()}
        assert {"cpu.cpp"} <= files and ("cuda.cu" in files) == ("kernels.cuh" in files)


HEADERS = [path for suffix in ("h", "cuh") for path in sorted((ROOT / "csrc").rglob(f"*.{suffix}"))]


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_headers_share_what_they_define_and_device_headers_need_no_torch(path):
    def included(header):
        for name in re.findall(r'#include "(.+)"', header.read_text()):
            found = next(p for p in (header.parent / name, ROOT / "csrc" / name) if p.is_file())
            yield from (found, *included(found))

    assert "namespace {" not in path.read_text()
    if path.suffix == ".cuh" or path.name == "problem.h":
        for header in (path, *included(path)):
            assert "#include <torch" not in header.read_text(), header


def test_top_level_holds_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    top = {line.split("/")[0] for line in listed if line}
    assert {name for name in top if not name.startswith(".")} <= set(ALLOWED_TOP)


def imports_at_module_level(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers_import_only_downwards(path):
    parts = path.relative_to(ROOT / "cvkernels").with_suffix("").parts
    if parts[0] not in LAYERS:
        return
    for _, module in imports_at_module_level(path):
        imported = module.split(".")[1:2] if module.startswith("cvkernels.") else []
        for layer in imported:
            assert layer in LAYERS, f"{path.name} imports {module}"
            assert LAYERS.index(layer) <= LAYERS.index(parts[0]), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_triton_and_torchvision_are_imported_where_they_are_used(path):
    body = ast.parse(path.read_text()).body
    names = {
        alias.name.split(".")[0]
        for node in body
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {(node.module or "").split(".")[0] for node in body if isinstance(node, ast.ImportFrom)}
    optional = {"torchvision", "timm", "rich", "PIL", "sklearn", "numpy"}
    assert not names & optional
    if not path.stem.startswith("triton_"):
        assert "triton" not in names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 450
