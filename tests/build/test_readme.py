"""The README says what the results and the package say."""

import re
from pathlib import Path

from benchmarks import readme

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_results():
    assert readme.demo_tables(), "benchmarks/results holds no demo.json"
    assert readme.regenerated(TEXT) == TEXT, "run python -m benchmarks.readme"


def test_every_measured_row_is_in_it():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    from cvkernels.demo import BATCHES, NETWORKS

    for network in NETWORKS:
        for batch in BATCHES:
            assert any(row.startswith(f"| {network} | {batch} |") for row in rows)


def test_it_has_the_two_commands():
    commands = re.findall(r"^python3 -m venv .*$", TEXT, flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("-m cvkernels demo") and commands[1].endswith("-m pytest")


def test_the_example_runs():
    import torch

    block = re.search(r"```python\n(.*?)```", TEXT, flags=re.DOTALL).group(1)
    # Random weights and a small image: the example downloads and takes its time.
    code = block.replace('weights="IMAGENET1K_V2"', "").replace("8, 3, 224, 224", "2, 3, 64, 64")
    variables = {}
    exec(compile(code, "README.md", "exec"), variables)
    assert torch.is_tensor(variables["logits"]) and variables["logits"].shape == (2, 1000)
