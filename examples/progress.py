"""A progress bar where rich is installed, else lines alone."""

from __future__ import annotations

import importlib.util
from typing import Any


class Progress:
    """Shows nothing unless ``shown``."""

    def __init__(self, shown: bool) -> None:
        self.shown, self._bar, self._task = shown, None, None
        if shown and importlib.util.find_spec("rich") is not None:
            from rich.progress import Progress as Bar

            self._bar: Any = Bar(transient=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, what: str, total: int) -> None:
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total)

    def advance(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        elif self.shown:
            print(line, flush=True)
