"""What several test processes need and one of them makes."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """One for all processes of a test run."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """``path``, which one process has ``make`` write, under another name, while others wait."""
    part = path.with_suffix(".part")
    baton = FileBaton(str(path.with_suffix(".lock")))
    while not path.exists():
        if not baton.try_acquire():
            baton.wait()
            continue
        try:
            if not path.exists():
                make(part)
                part.replace(path)
        finally:
            baton.release()
    return path
