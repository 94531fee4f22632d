"""The documents say what the results and the package say."""

import re
from pathlib import Path

import pytest

from benchmarks.output import readme, results

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs/pages").rglob("*.md"))


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_tables_are_those_of_the_results():
    pages = readme.pages()
    assert len(pages) > 1, "benchmarks/results holds no machine"
    for path, text in pages.items():
        assert path.read_text() == text, f"{path}: run python -m benchmarks readme"


def test_every_measured_row_is_in_it():
    from cvkernels.demo import BATCHES, NETWORKS

    for network in NETWORKS:
        assert any(row.startswith(f"| {network} |") for row in rows_of(TEXT))
        for machine in results.machine_folders():
            rows = rows_of((machine / "README.md").read_text())
            for batch in BATCHES:
                assert any(row.startswith(f"| {network} | {batch} |") for row in rows)


def test_it_has_the_two_commands():
    commands = re.findall(r"^python3 -m venv .*$", TEXT, flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("-m cvkernels demo") and commands[1].endswith("-m pytest")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_benchmark_commands_are_those_there_are(document):
    from benchmarks.__main__ import _parser

    commands = re.findall(r"python -m benchmarks ([^`&#\n]*)", document.read_text())
    for command in commands:
        words = command.replace("--all", "all").replace("<op>", "max_pool").split()
        _parser().parse_args([word for word in words if word])
