"""Where a run is: a bar by rich on a terminal, else a line for each step."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


class Display:
    """Says which of ``total`` steps runs, and which item of it."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.name = total, 0, ""
        self._bar: Any = None

    def __enter__(self) -> Display:
        if importlib.util.find_spec("rich") and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("machine", total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, name: str) -> None:
        self.name, self.done = name, self.done + 1
        if self._bar is None:
            print(f"[{self.done}/{self.total}] {name}", file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=self.done - 1, description=name)

    def item(self, name: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self.name}: {name}")
