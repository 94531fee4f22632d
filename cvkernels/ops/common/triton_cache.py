"""Triton's folder of compiled kernels, where it cannot be written.

Triton keeps what it compiles in ``~/.triton/cache``, or where ``TRITON_CACHE_DIR`` says, and raises
at the first launch where it may not: a read-only home, a container's user without one.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings

from triton import knobs


def install() -> None:
    """Let this process compile into a folder of its own, and say so, where it has to."""
    folder = knobs.cache.dir
    problem = _unwritable(folder)
    if not problem:
        return
    private = tempfile.mkdtemp(prefix="cvkernels-triton-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    knobs.cache.dir = private
    warnings.warn(
        f"Triton's cache {folder} cannot be written ({problem}): this process compiles into "
        f"{private}, and the next one again; set TRITON_CACHE_DIR to a folder that it may write",
        stacklevel=2,
    )


def _unwritable(folder: str) -> str:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""
