"""Functions of tests called in an interpreter of their own, which they may end or exhaust."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(function: Callable, *arguments: object, **options) -> subprocess.Popen:
    """A process that calls ``function`` of a module of tests; arguments are written as code."""
    name = function.__name__
    code = f"from {function.__module__} import {name}\n{name}(*{arguments!r})"
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{"cwd": ROOT, **pipes, **options})


def ended(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
    """The exit status of a process, and what it wrote to stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s; {out}{err}") from None
    return process.returncode, out, err


def run_alone(function: Callable, *arguments: object, timeout: float = 300, **options) -> str:
    """stdout of a process that calls ``function``, succeeds and writes no word to stderr."""
    status, out, err = ended(start(function, *arguments, **options), timeout)
    assert (status, err) == (0, ""), f"status {status}: {out}{err}"
    return out
