"""A progress bar for what takes over a second, where rich is installed, on a terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator

PATIENCE = 1.0  # seconds without a bar


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A function to call after each of ``total`` parts; the bar goes when the block ends."""
    if importlib.util.find_spec("rich") is None:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total)
    start = time.perf_counter()
    shown = False

    def advance() -> None:
        nonlocal shown
        if not shown and time.perf_counter() - start > PATIENCE and bar.console.is_terminal:
            shown = True
            bar.start()
        bar.advance(task)

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
