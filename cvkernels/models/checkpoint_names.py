"""Which networks of torchvision, timm and Cadene are one network, and how each names its entries.

Two networks are one if a state dict moves between them with no more than new keys, and the output
stays the same. An entry is written here as ``cvkernels.models`` writes it; torchvision, timm and
Cadene write the same, but for timm's EfficientNet.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

_RESNETS = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
_DENSENETS = tuple(f"densenet{depth}" for depth in (121, 161, 169, 201))
_SENETS = (
    *(f"seresnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("seresnext50_32x4d", "seresnext101_32x4d", "senet154"),
)
_SHARED = (*_RESNETS, *_DENSENETS, *(f"efficientnet_b{i}" for i in range(5)))
_SIZES_V2 = ("s", "m", "l")

_TORCHVISION = (
    *_SHARED,
    *(f"efficientnet_b{i}" for i in (5, 6, 7)),
    *(f"efficientnet_v2_{size}" for size in _SIZES_V2),
)
_TIMM = (*_SHARED, *_SENETS, "seresnext101_32x8d", *(f"legacy_{name}" for name in _SENETS))

# The builder of each library's network in cvkernels.models.
BUILDERS: dict[str, dict[str, str]] = {
    "torchvision": {name: name for name in _TORCHVISION},
    "timm": {name: name for name in _TIMM},
    "cadene": {
        name.replace("seres", "se_res"): f"legacy_{name}"
        for name in _SENETS
        if name not in ("seresnet18", "seresnet34")
    },
}
# timm's networks that no builder computes, and torchvision's that have the same shapes.
LOOKALIKES: dict[str, str] = {
    **{f"efficientnet_b{i}": f"efficientnet_b{i}" for i in (5, 6, 7)},
    **{f"tf_efficientnet_b{i}": f"efficientnet_b{i}" for i in range(8)},
    **{f"efficientnetv2_{size}": f"efficientnet_v2_{size}" for size in _SIZES_V2},
    **{f"tf_efficientnetv2_{size}": f"efficientnet_v2_{size}" for size in _SIZES_V2},
}


class Network(NamedTuple):
    """A network of another library, such as timm's "efficientnet_b0"."""

    library: str
    name: str

    @property
    def builder(self) -> str | None:
        """The builder in ``cvkernels.models`` that computes what this network computes."""
        return BUILDERS[self.library].get(self.name)

    @property
    def shape(self) -> str:
        """One name for all networks whose tensors have the same shapes."""
        if self.library == "timm" and self.name in LOOKALIKES:
            return LOOKALIKES[self.name]
        return (self.builder or self.name).removeprefix("legacy_")

    def key(self, entry: str) -> str:
        """This library's key of an entry of ``cvkernels.models.<builder>``'s state dict."""
        if self.library == "timm" and self.name.startswith("efficientnet"):
            return timm_efficientnet_key(entry)
        return entry

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"


def parse_network(text: str) -> Network:
    """The network that "library/name" names; a timm tag ("timm/resnet50.a1_in1k") is left out.

    Raises:
        ValueError: there is no such library, or it has no network of this name that is known here.
    """
    library, slash, name = text.partition("/")
    if not slash or library not in BUILDERS:
        raise ValueError(
            f"convert_checkpoint: a network is named as 'torchvision/NAME', 'timm/NAME' or "
            f"'cadene/NAME', got {text!r}"
        )
    if library == "timm":
        name = name.partition(".")[0]
    known = [*BUILDERS[library], *(LOOKALIKES if library == "timm" else ())]
    if name in known:
        return Network(library, name)
    if name == "googlenet":
        raise ValueError(
            "convert_checkpoint: GoogLeNet is torchvision's alone, timm has none; its weights load "
            "into cvkernels.models.googlenet as they are"
        )
    near = difflib.get_close_matches(name, known, n=3) or known
    raise ValueError(
        f"convert_checkpoint: no conversion knows {library}/{name}; "
        f"did you mean {', '.join(f'{library}/{each}' for each in near)}?"
    )


def refusal(source: Network, target: Network) -> str | None:
    """Why source's weights in target would compute something else; None if they would not."""
    if source.builder and source.builder == target.builder:
        return None
    if source == target:
        return "they are the same network, its weights load as they are"
    reason = _difference(source, target)
    if source.builder:
        way_out = f"cvkernels.models.{source.builder}(weights=state)"
    else:
        way_out = f"timm.create_model({source.name!r})"
    return f"{reason}; {way_out} is the network that these weights are for"


def _difference(source: Network, target: Network) -> str:
    if source.shape != target.shape:
        return "they are different architectures"
    if source.shape in _SENETS:
        return f"they are different networks: {legacy_difference(source.shape)}"
    padded = [network for network in (source, target) if network.name.startswith("tf_")]
    if len(padded) == 1:
        return (
            f'they are different networks: {padded[0]} pads as TensorFlow\'s "SAME", '
            f"more on one side than on the other, the other network on both sides alike"
        )
    return "they are different networks: timm's batch norms have eps 1e-5, torchvision's 1e-3"


def legacy_difference(name: str) -> str:
    """What sets timm's legacy network (and Cadene's) apart from the newer one of this name."""
    differences = ["the legacy stem pools without padding"]
    if name in ("seresnet50", "seresnet101", "seresnet152"):
        differences.append("the legacy block strides in conv1, not in conv2")
    elif name in ("seresnet18", "seresnet34"):
        differences.append("the legacy block applies ReLU before the squeeze")
        differences.append("squeezes to C // 16 channels, not to a multiple of 8")
    return " and ".join(differences)


# timm's names of EfficientNet's modules

_OUTSIDE_BLOCKS = {
    "features.0.0": "conv_stem",
    "features.0.1": "bn1",
    "features.8.0": "conv_head",
    "features.8.1": "bn2",
    "classifier.1": "classifier",
}
# Stage 1 does not expand its channels: depthwise, squeeze-and-excitation, projection.
_STAGE_1 = {
    "0.0": "conv_dw",
    "0.1": "bn1",
    "1.fc1": "se.conv_reduce",
    "1.fc2": "se.conv_expand",
    "2.0": "conv_pw",
    "2.1": "bn2",
}
# The others: expansion, depthwise, squeeze-and-excitation, projection.
_LATER_STAGES = {
    "0.0": "conv_pw",
    "0.1": "bn1",
    "1.0": "conv_dw",
    "1.1": "bn2",
    "2.fc1": "se.conv_reduce",
    "2.fc2": "se.conv_expand",
    "3.0": "conv_pwl",
    "3.1": "bn3",
}


def timm_efficientnet_key(entry: str) -> str:
    """timm's key of an entry of torchvision's EfficientNet B0 to B7."""
    module, _, tensor = entry.rpartition(".")
    if module in _OUTSIDE_BLOCKS:
        return f"{_OUTSIDE_BLOCKS[module]}.{tensor}"
    stage, block, layer = re.fullmatch(r"features\.(\d)\.(\d+)\.block\.(.+)", module).groups()
    layer = (_STAGE_1 if stage == "1" else _LATER_STAGES)[layer]
    return f"blocks.{int(stage) - 1}.{block}.{layer}.{tensor}"


# What a checkpoint that does not load may be


def advice(state: Mapping[str, Any], own: Iterable[str], builder: str | None) -> str | None:
    """The way out for a state that does not fit a model with the keys ``own``, if one is seen.

    ``builder`` is the name of the function in cvkernels.models that built the model, if known.
    """
    own = set(own)
    for entry, content in state.items():
        if isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values()):
            return (
                f"This is a training checkpoint, not a state dict; pass "
                f"cvkernels.models.read_checkpoint(checkpoint, entry={entry!r})."
            )
    if prefix := wrapper_prefix(state):
        return (
            f"Every key starts with {prefix!r}, the mark of a wrapped model "
            f"(DistributedDataParallel, torch.compile, an average of weights); pass "
            f"cvkernels.models.read_checkpoint(checkpoint, prefix={prefix!r})."
        )
    if "conv_stem.weight" in state and "features.0.0.weight" in own:
        return _advice_for_timm_efficientnet(builder)
    legacy = [any(key.startswith("layer0.conv1.") for key in keys) for keys in (state, own)]
    excites = [any(".0.se" in key for key in keys) for keys in (state, own)]
    if all(excites) and legacy[0] != legacy[1]:
        name = (builder or "").removeprefix("legacy_")
        name = name if name in _SENETS else "NAME"
        kinds = ("legacy SENets (timm's and Cadene's)", "newer SENets of timm's")
        theirs, ours = kinds if legacy[0] else kinds[::-1]
        return (
            f"These are weights of the {theirs}, and the model is one of the {ours}: different "
            f"networks ({legacy_difference(name)}). Load them into "
            f"cvkernels.models.{'legacy_' if legacy[0] else ''}{name}."
        )
    return None


def wrapper_prefix(state: Mapping[str, Any]) -> str:
    """What DistributedDataParallel and the like put in front of every key; "" if they did not."""
    keys = [key for key in state if key != "n_averaged"]
    if not keys:
        return ""
    prefix = re.match(r"(?:(?:module|_orig_mod|model)\.)*", keys[0]).group()
    return prefix if all(key.startswith(prefix) for key in keys) else ""


def _advice_for_timm_efficientnet(builder: str | None) -> str:
    name = builder if builder in BUILDERS["torchvision"] else "NAME"
    target = Network("torchvision", name)
    if name == "NAME" or name in BUILDERS["timm"]:
        return (
            f"These are timm's names; pass cvkernels.models.convert_checkpoint(state, "
            f"'timm/{name}', '{target}'), unless they are of timm's tf_ networks, which compute "
            f"something else."
        )
    source = Network("timm", name.replace("efficientnet_v2", "efficientnetv2"))
    return f"These are timm's names, and {source} cannot become {target}: " + (
        f"{refusal(source, target)}."
    )
