"""Pictures that commands write where matplotlib is installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """To call before what is to be drawn is measured.

    Raises:
        ImportError: it is not installed; the message has the command that installs it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            'a plot needs matplotlib: pip install matplotlib, or pip install "cvkernels[demo]"'
        )


@contextlib.contextmanager
def drawing(path: str | Path, inches: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw into, written to ``path`` in the format that its ending names.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: it has no such format.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    yield figure
    figure.savefig(path)
