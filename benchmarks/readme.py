"""``python -m benchmarks.readme``: the README's tables, made of the files under ``results/``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks.environment import ROOT
from cvkernels.demo import HEADER, Table

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- demo table -->", "<!-- end of demo table -->"


def demo_tables() -> str:
    """A Markdown table for each machine's ``demo.json``, its conditions under it."""
    parts = []
    for path in sorted(RESULTS.glob("*/demo.json")):
        table = Table.from_dict(json.loads(path.read_text()))
        lines = [HEADER, ["---"] * len(HEADER), *table.cells()]
        parts += ["\n".join(map(_markdown_row, lines)), f"{table.conditions}."]
    return "\n\n".join(parts)


def regenerated(readme: str) -> str:
    """The README's text with its tables replaced by those of the results."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{demo_tables()}\n\n{END}{after}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(regenerated(path.read_text()))
