"""One file with all that a training needs to go on, whole or not there at all.

It holds full, unsharded states: a run may go on with another number of processes, or without FSDP.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.optim import Optimizer

FORMAT = 1


class CheckpointError(Exception):
    """A file that this run cannot go on from, or that could not be written."""


def save(
    path: Path, about: dict[str, Any], model: nn.Module, optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
) -> None:  # fmt: skip
    """Write the states and ``about``, plain values, in the place of what path held.

    All processes call it; the first one writes. The old file stays until the new one is complete.

    Raises:
        CheckpointError: it could not be written, such as on a full disk. The old file is as it was.
    """
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    content: dict[str, Any] = {"format": FORMAT, "about": about}
    content["model"] = states.get_model_state_dict(model, options=options)
    if optimizer is not None:
        content["optimizer"] = states.get_optimizer_state_dict(model, optimizer, options=options)
    if ema is not None:
        content["ema"] = states.get_model_state_dict(ema, options=options)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    new = path.with_suffix(".new")
    try:
        with open(new, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:
        new.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote; tensors and plain values alone are loaded.

    Raises:
        CheckpointError: no such file, not one of :func:`save`, or of a newer format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"{path} is no checkpoint that can be read: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is no checkpoint of this script")
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this script reads up to {FORMAT}: update it"
        )
    return content


def load_model(model: nn.Module, state: dict[str, Any]) -> None:
    states.set_model_state_dict(model, state, options=_loading())


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    states.set_optimizer_state_dict(model, optimizer, state, options=_loading())


def _loading() -> states.StateDictOptions:
    return states.StateDictOptions(full_state_dict=True, strict=True)
