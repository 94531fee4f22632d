"""State dicts of one library's network as another library's, where that is exact."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from cvkernels.models.checkpoint_names import advice, parse_network, refusal
from cvkernels.models.checkpoints import complaints, read_checkpoint, with_todays_keys
from cvkernels.models.registry import get_builder


def convert_checkpoint(
    state: Mapping[str, Tensor] | str | os.PathLike, source: str, target: str
) -> OrderedDict[str, Tensor]:
    """The weights of ``source`` under the names, and in the order, of ``target``.

    Converted are ResNet, ResNeXt, Wide ResNet, DenseNet and EfficientNet B0 to B4 between
    torchvision and timm, and the legacy SENets between timm and Cadene's ``pretrainedmodels``. In
    eval the output is the same; dropout and stochastic depth are arguments of each library's
    builder. What loads strictly and computes something else is refused.

    Neither library needs to be installed.

    Args:
        state: a state dict of source, with any number of classes, or the path of one.
        source: "torchvision/NAME", "timm/NAME" (a tag may follow, "timm/resnet50.a1_in1k") or
            "cadene/NAME".
        target: likewise.

    Returns:
        A new OrderedDict of the same tensors, none copied, without ``_metadata``.

    Raises:
        ValueError: a name is unknown, or the two are not the same network; says why not.
        RuntimeError: keys of state are missing or unexpected, or shapes differ from source's.
        FileNotFoundError, ValueError: as for :func:`read_checkpoint`.
    """
    origin, destination = parse_network(source), parse_network(target)
    if reason := refusal(origin, destination):
        raise ValueError(f"convert_checkpoint: {origin} cannot become {destination}: {reason}")
    if not isinstance(state, Mapping):
        state = read_checkpoint(state)
    with torch.device("meta"):
        model = get_builder(origin.builder)()
    state = with_todays_keys(model, state)
    entries = model.state_dict()
    shapes = {origin.key(entry): list(value.shape) for entry, value in entries.items()}
    _allow_any_classes(shapes, state)
    if found := complaints(shapes, state, str(origin)):
        first = f"Error(s) in converting state_dict of {origin}; nothing is converted:"
        way_out = advice(state, shapes, origin.builder)
        raise RuntimeError("\n\t".join([first, *found, *([way_out] if way_out else [])]))
    return OrderedDict(
        (destination.key(entry), state[origin.key(entry)])
        for entry in entries
        if origin.key(entry) in state
    )


def _allow_any_classes(shapes: dict[str, list[int]], state: Mapping[str, Tensor]) -> None:
    """Let the classifier, which is a state dict's last weight and bias, have state's classes."""
    weight, bias = list(shapes)[-2:]
    given = getattr(state.get(weight), "shape", ())
    if len(given) == 2:
        shapes[weight][0] = shapes[bias][0] = given[0]
