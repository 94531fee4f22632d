"""Runs the commands that pages show and writes what they print: ``python docs/recordings.py``.

A page marks one by ``<!-- recorded, LINES lines: COMMAND -->`` above a block of text. Of a longer
output the first and the last lines are kept. Times are those of the machine that it runs on, which
had better be quiet. Commands run in a folder that holds scikit-learn's ``photographs``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "pages"
RECORDED = re.compile(r"<!-- recorded, (\d+) lines: ([^\n]*) -->\n```text\n.*?```", re.DOTALL)
COLUMNS = 100
LAST = 3  # of a longer output


def main() -> None:
    for path in sorted(PAGES.rglob("*.md")):
        text = path.read_text()
        path.write_text(RECORDED.sub(_recorded, text))


def _recorded(mark: re.Match) -> str:
    lines, command = int(mark[1]), mark[2]
    words = shlex.split(command)
    assert words[0] == "python", command
    print(command, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(_photographs(), Path(folder) / "photographs")
        result = subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, check=True, cwd=folder,
            env={**os.environ, "COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    return f"<!-- recorded, {lines} lines: {command} -->\n```text\n$ {command}\n" + (
        "\n".join(_shortened(result.stdout.rstrip().splitlines(), lines)) + "\n```"
    )


def _photographs() -> Path:
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images"


def _shortened(output: list[str], lines: int) -> list[str]:
    output = [line.rstrip() for line in output]
    if len(output) > lines:
        output = [*output[: lines - LAST], "...", *output[-LAST:]]
    return output


if __name__ == "__main__":
    main()
