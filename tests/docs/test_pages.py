"""The documents' code runs, their links lead somewhere, and what is generated is up to date.

A block of code goes on where the page's blocks before it ended. A comment above it, ``<!-- needs
PACKAGE, ... -->``, ``<!-- full: REASON -->`` or ``<!-- not run: REASON -->``, makes it a test of
its own, which begins with the page's first block.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.support.source_builds import ROOT

PAGES = sorted((ROOT / "docs/pages").rglob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES]
# Blocks do not download, and networks look at small images.
IN_TESTS = {'weights="IMAGENET1K_V2"': "weights=None", "224, 224": "64, 64"}
MARKED = r"((?:<!-- (?:needs |full: |not run: ).*-->\n)*)"
BLOCK = re.compile(MARKED + r"```python\n(.*?)```", flags=re.DOTALL)


class Block(NamedTuple):
    line: int
    marks: str
    code: str


def named(path):
    return str(path.relative_to(ROOT))


def blocks_of(path):
    """Those of the page; its code is at the lines of the file in tracebacks."""
    text = path.read_text()
    found = []
    for match in BLOCK.finditer(text):
        marks, code = match.groups()
        for shown, run in IN_TESTS.items():
            code = code.replace(shown, run)
        line = text.count("\n", 0, match.start(2))
        found.append(Block(line, marks, code))
    return found


def run(path, blocks):
    variables = {"__name__": path.stem}
    for block in blocks:
        exec(compile("\n" * block.line + block.code, str(path), "exec"), variables)


WITH_CODE = [path for path in DOCUMENTS if blocks_of(path) and path.name != "CONTRIBUTING.md"]
MARKED_BLOCKS = [
    pytest.param(
        path,
        block,
        id=f"{named(path)}:{block.line}",
        marks=[pytest.mark.full] if "<!-- full: " in block.marks else [],
    )
    for path in WITH_CODE
    for block in blocks_of(path)
    if block.marks
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)


@pytest.mark.few(5)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", WITH_CODE, ids=named)
def test_code_runs(path):
    run(path, [block for block in blocks_of(path) if not block.marks])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("path", "block"), MARKED_BLOCKS)
def test_marked_code_runs(path, block):
    if reason := re.search(r"<!-- not run: (.*) -->", block.marks):
        pytest.skip(reason[1])
    if needed := re.search(r"<!-- needs (.*) -->", block.marks):
        for package in needed[1].split(", "):
            pytest.importorskip(package)
    run(path, [blocks_of(path)[0], block])


def anchors_of(path):
    """Of a page's headings, as the site and code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.strip().replace(" ", "-") for text in words}


@pytest.mark.fast
@pytest.mark.few(len(DOCUMENTS))
@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text()):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), f"{target}#{anchor}"


@pytest.mark.fast
@pytest.mark.few(len(DOCUMENTS))
@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=named)
def test_lines_are_of_reasonable_width(path):
    tables_and_links = ("| ", "![", "[")
    lines = path.read_text().splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith(tables_and_links)]


@pytest.mark.fast
@pytest.mark.few(len(DOCUMENTS))
@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=named)
def test_commands_are_those_there_are(path, capsys):
    from cvkernels.__main__ import main

    for command in re.findall(r"python -m cvkernels ([a-z][^`&#|<>\n]*)", path.read_text()):
        name, *words = shlex.split(command)
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0, command
        options = [word for word in words if word.startswith("--")]
        text = capsys.readouterr().out
        assert not [option for option in options if option not in text], command


@pytest.mark.fast
def test_readme_fits_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def plans():
    """docs/plans.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("docs_plans", ROOT / "docs/plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "network", ["googlenet", "resnet50", "densenet121", "seresnet50", "efficientnet_b0"]
)
def test_plans_are_those_of_explain(network):
    path, text = plans().page(network)
    assert path.read_text() == text, f"{named(path)}: run python docs/plans.py"


def test_the_reference_names_all_that_is_public():
    import cvkernels

    reference = {path.stem: path.read_text() for path in (ROOT / "docs/pages/reference").iterdir()}
    modules = ("backend", "functional", "models", "nn")
    public = [*cvkernels.__all__, *cvkernels.functional.__all__, *cvkernels.nn.__all__]
    for name in set(public) - set(modules):
        assert any(re.search(rf"\b{name}\b", text) for text in reference.values()), name


@pytest.mark.full  # .ci/docs builds it, too
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["-f", str(ROOT / "docs/mkdocs.yml"), "-d", str(tmp_path / "site")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "site/reference/functional.html").read_text()
    assert "conv_bn_act" in reference and ":func:" not in reference
    assert (tmp_path / "site/repository/benchmarks/results").is_dir()
