"""Where weights come from: torchvision's enums, files and state dicts; and loading them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONTAINERS = ("state_dict", "model", "model_state_dict")
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")


class Pretrained(NamedTuple):
    """A member of a torchvision weights enum."""

    enum_member: Any

    @property
    def num_classes(self) -> int:
        return len(self.enum_member.meta["categories"])

    def load(self, progress: bool) -> Mapping[str, Tensor]:
        return self.enum_member.get_state_dict(progress=progress, check_hash=True)


class Checkpoint(NamedTuple):
    """A checkpoint file, or a state dict that is in memory already."""

    source: str | os.PathLike | Mapping[str, Tensor]

    def load(self, progress: bool) -> Mapping[str, Tensor]:
        if isinstance(self.source, Mapping):
            return self.source
        return read_checkpoint(self.source)


def resolve(weights: Any, weights_enum: str) -> Pretrained | Checkpoint | None:
    """What a builder's ``weights=`` argument names.

    Raises:
        ImportError: it names a torchvision weight, and torchvision cannot be imported.
        KeyError: no member of the enum has this name (as in torchvision).
        TypeError: a member of another network's enum, or no kind of weights at all.
    """
    if weights is None:
        return None
    if (checkpoint := given_checkpoint(weights)) is not None:
        return checkpoint
    try:
        import torchvision.models
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"weights={weights!r} is a name of torchvision's, and torchvision cannot be imported "
            f"({error}); install it (pip install torchvision), or pass the path of a checkpoint or "
            f"a state dict"
        ) from error
    return Pretrained(getattr(torchvision.models, weights_enum).verify(weights))


def given_checkpoint(weights: Any) -> Checkpoint | None:
    """``weights`` as a checkpoint, where it is a state dict or a path; None for any other kind."""
    if isinstance(weights, (Mapping, os.PathLike)):
        return Checkpoint(weights)
    if isinstance(weights, str) and _looks_like_path(weights):
        return Checkpoint(weights)
    return None


def _looks_like_path(text: str) -> bool:
    return text.endswith(SUFFIXES) or os.sep in text or os.path.isfile(text)


def read_checkpoint(path: str | os.PathLike) -> Mapping[str, Tensor]:
    """The state dict in a file that torch.save wrote; read with ``weights_only=True``.

    A dict that holds the state dict under "state_dict", "model" or "model_state_dict" is unpacked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is damaged, or holds something else than tensors.
    """
    try:
        content = torch.load(Path(path), map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} cannot be read, it is damaged or not a file of "
            f"torch.save's tensors: {cause}"
        ) from error
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} holds a {type(content).__name__}, not a state dict"
        )
    return content


def load_checkpoint(model: nn.Module, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
    """Load a state dict or a checkpoint file into ``model``, strictly, and all of it or nothing.

    Names that an older release of the network gave its entries are understood.

    Raises:
        RuntimeError: keys are missing or unexpected, or shapes differ; names them all.
        FileNotFoundError, ValueError: as for :func:`read_checkpoint`.
    """
    state = source if isinstance(source, Mapping) else read_checkpoint(source)
    state = _with_todays_keys(model, state)
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    if not hasattr(state, "_metadata"):
        # Norms of before torch 0.4.1 count no batches, and load_state_dict accepts that.
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    mismatched = [
        f"{key} has shape {list(state[key].shape)}, the model's has {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    complaints = [
        f"{what}: {', '.join(names)}."
        for what, names in (
            (f"{len(missing)} missing key(s)", missing),
            (f"{len(unexpected)} unexpected key(s)", unexpected),
            (f"{len(mismatched)} size mismatch(es)", mismatched),
        )
        if names
    ]
    if complaints:
        raise RuntimeError(
            "\n\t".join(
                [
                    f"Error(s) in loading state_dict for {type(model).__name__}; "
                    f"the model is unchanged:",
                    *complaints,
                ]
            )
        )
    model.load_state_dict(state)


def _with_todays_keys(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A copy of state in which the modules that know old names of their entries renamed them."""
    renamed = OrderedDict(state)
    if hasattr(state, "_metadata"):
        renamed._metadata = state._metadata
    for name, module in model.named_modules():
        if hasattr(module, "rename_old_keys"):
            module.rename_old_keys(renamed, f"{name}." if name else "")
    return renamed
