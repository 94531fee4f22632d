"""Where weights come from: torchvision's enums, files and state dicts; and loading them."""

from __future__ import annotations

import argparse
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvkernels.models.checkpoint_names import advice
from cvkernels.tables import first_line

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


def read_checkpoint(
    source: str | os.PathLike | Mapping[str, Any],
    *,
    entry: str | None = None,
    prefix: str | None = None,
) -> Mapping[str, Tensor]:
    """The state dict in a checkpoint; ``weights=`` and :func:`load_checkpoint` take what it gives.

    A file is one that torch.save wrote, and is read with ``weights_only=True``, so no code in it
    runs; the ``argparse.Namespace`` that training scripts save beside the weights is let through.

    Args:
        source: path of the file, or its content.
        entry: the key of the wanted state dict in a training checkpoint, such as "model_ema"
            (torchvision's scripts) or "state_dict_ema" (timm's). By default a dict that holds the
            state dict under "state_dict", "model" or "model_state_dict" is unpacked.
        prefix: what is taken off the front of every key, such as "module."
            (DistributedDataParallel, AveragedModel) or "_orig_mod." (torch.compile), or several of
            them one after the other. AveragedModel's ``n_averaged`` is left out then.

    Returns:
        The state dict; its tensors are source's where that is in memory, else on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is damaged, or holds something else than tensors;
            there is no such entry; a key lacks the prefix.
    """
    if isinstance(source, Mapping):
        name, content = "checkpoint", source
    else:
        name, content = f"checkpoint {os.fspath(source)!r}", _read_file(source)
    if entry is not None:
        content = _entry(content, entry, name)
    else:
        for key in CONTAINERS:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
    if not _is_state_dict(content):
        raise ValueError(f"{name} holds a {type(content).__name__}, not a state dict")
    return content if prefix is None else _without_prefix(content, prefix, name)


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _read_file(path: str | os.PathLike) -> Any:
    # A plain container of attributes: building one runs no code.
    allowed = {argparse.Namespace} - set(torch.serialization.get_safe_globals())
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(Path(path), map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    # Reading bytes that are no file of torch.save's may raise anything.
    except Exception as error:  # noqa: BLE001
        if refused := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"checkpoint {os.fspath(path)!r} cannot be read safely, it holds {refused[1]} "
                f"beside or instead of tensors; if you trust the file, read it once with "
                f"torch.load(path, weights_only=False) and save the state dict alone"
            ) from error
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} cannot be read, it is damaged or not a file of "
            f"torch.save's tensors: {first_line(error)}"
        ) from error


def _entry(content: Any, entry: str, name: str) -> Mapping[str, Tensor]:
    held = content if isinstance(content, Mapping) else {}
    if not isinstance(held.get(entry), Mapping):
        entries = [repr(k) for k, v in held.items() if isinstance(v, Mapping) and _is_state_dict(v)]
        raise ValueError(
            f"{name} has no state dict under {entry!r}; "
            + (f"it has one under {', '.join(entries)}" if entries else "it has none under any key")
        )
    return held[entry]


def _without_prefix(state: Mapping[str, Tensor], prefix: str, name: str) -> Mapping[str, Tensor]:
    if not prefix.endswith("."):
        raise ValueError(f"read_checkpoint: prefix must end in a dot, got {prefix!r}")
    named = {key: value for key, value in state.items() if key != "n_averaged"}
    if bare := [key for key in named if not key.startswith(prefix)]:
        shown = ", ".join(bare[:3]) + (", ..." if len(bare) > 3 else "")
        raise ValueError(
            f"{name} has {len(bare)} key(s) of {len(named)} that do not start with {prefix!r}: "
            f"{shown}"
        )
    stripped = OrderedDict((key[len(prefix) :], value) for key, value in named.items())
    if hasattr(state, "_metadata"):
        # Keyed by module: the wrapped one is "module", its children are "module.conv1" and so on.
        stripped._metadata = OrderedDict(
            (module[len(prefix) :], versions)
            for module, versions in state._metadata.items()
            if f"{module}.".startswith(prefix)
        )
    return stripped


def load_checkpoint(
    model: nn.Module,
    source: Mapping[str, Tensor] | str | os.PathLike,
    *,
    builder: str | None = None,
) -> None:
    """Load a state dict or a checkpoint file into ``model``, strictly, and all of it or nothing.

    Names that an older release of the network gave its entries are understood. ``builder``, the
    name of the function that built the model, lets an error be more definite.

    Raises:
        RuntimeError: keys are missing or unexpected, or shapes differ; names them all, and the way
            out where the checkpoint is seen to be another library's or a wrapped model's.
        FileNotFoundError, ValueError: as for :func:`read_checkpoint`.
    """
    state = source if isinstance(source, Mapping) else read_checkpoint(source)
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    way_out = None
    if not (found := _no_values(model, state)):
        state = with_todays_keys(model, state)
        if found := complaints(own, state, "the model"):
            way_out = advice(state, own, builder)
    if found:
        kind = type(model).__name__
        first = f"Error(s) in loading state_dict for {kind}; the model is unchanged:"
        raise RuntimeError("\n\t".join([first, *found, *([way_out] if way_out else [])]))
    model.load_state_dict(state)


def _no_values(model: nn.Module, state: Mapping[Any, Any]) -> list[str]:
    """What load_state_dict would find out when it has loaded other entries."""
    found = [f"{key!r} is no name of an entry." for key in state if not isinstance(key, str)]
    on_meta = any(value.is_meta for value in model.state_dict().values())
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        kind = "sparse" if value.layout is not torch.strided else ""
        kind = "quantized" if value.is_quantized else "complex" if value.is_complex() else kind
        kind = "without data, on the meta device" if value.is_meta and not on_meta else kind
        if kind:
            found.append(f"{key} is {kind}; the model's entries are dense numbers.")
    return found


def complaints(own: Mapping[str, list[int]], state: Mapping[str, Tensor], owner: str) -> list[str]:
    """What keeps state from being one with the keys and shapes ``own``, which are ``owner``'s."""
    missing = [key for key in own if key not in state]
    if not hasattr(state, "_metadata"):
        # Norms of before torch 0.4.1 count no batches, and load_state_dict accepts that.
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    mismatched = [
        f"{key} {_shown(state[key])}, {owner}'s has {shape}"
        for key, shape in own.items()
        if key in state and _shape(state[key]) != shape
    ]
    found = {"missing key": missing, "unexpected key": unexpected}
    shown = [f"{len(keys)} {what}(s): {', '.join(keys)}." for what, keys in found.items() if keys]
    if mismatched:
        shown.append(f"{len(mismatched)} size mismatch(es): {', '.join(mismatched)}.")
    return shown


def _shape(value: Any) -> list[int] | None:
    return list(value.shape) if isinstance(value, Tensor) else None


def _shown(value: Any) -> str:
    shape = _shape(value)
    return f"is a {type(value).__name__}" if shape is None else f"has shape {shape}"


def with_todays_keys(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A copy of state in which the modules that know old names of their entries renamed them."""
    renamed = OrderedDict(state)
    if hasattr(state, "_metadata"):
        renamed._metadata = state._metadata
    for name, module in model.named_modules():
        if hasattr(module, "rename_old_keys"):
            module.rename_old_keys(renamed, f"{name}." if name else "")
    return renamed
