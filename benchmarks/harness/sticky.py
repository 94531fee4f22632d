"""CUDA errors that stay: after one of them, every later call of the process fails."""

from __future__ import annotations

import sys

# Status of a process that ends because of one: the rest belongs in a new process.
STATUS = 75


class ContextLost(BaseException):
    """The process can use CUDA no more. No Exception: what handles those must not go on."""


def check_context(error: BaseException) -> None:
    """After ``error``: raise :class:`ContextLost` if CUDA fails by itself now."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as sticky:
        raise ContextLost(
            f"CUDA is lost to this process ({_first_line(sticky)}) after "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
