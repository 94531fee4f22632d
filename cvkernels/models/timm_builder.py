"""Builders that are called as timm's, and the weights that timm publishes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvkernels.models.checkpoints import Checkpoint, given_checkpoint, load_checkpoint
from cvkernels.models.registry import register_builder

_USE_TIMM = "build the model with timm.create_model, and cvkernels.patch it"
# What timm takes and these builders do not, with the way out; a value that asks for nothing passes.
REFUSED = {
    "features_only": f"{_USE_TIMM}, or call model.forward_intermediates",
    "out_indices": "call model.forward_intermediates(x, indices)",
    "pretrained_cfg": "pass the tag as weights, such as weights='a1_in1k'",
    "pretrained_cfg_overlay": "load the weights with timm and pass the state dict as weights",
    "checkpoint_path": "pass the path as weights",
    "cache_dir": "load the weights with timm and pass the state dict as weights",
    "scriptable": "TorchScript is not supported; use torch.export, or timm's model",
    "device": "build the model under 'with torch.device(...)', or move it with .to(device)",
    "dtype": "convert the model with .to(dtype)",
    "aa_layer": _USE_TIMM,
    "avg_down": _USE_TIMM,
    "block_args": _USE_TIMM,
    "drop_block_rate": _USE_TIMM,
    "replace_stem_pool": _USE_TIMM,
}
# What timm takes and every model here is anyway.
NEEDLESS = ("exportable", "no_jit")


def timm_model_builder(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make a public builder ``name(pretrained=False, *, weights=None, progress=True, **kwargs)``.

    ``weights`` is None, a tag of timm's for this network or its full name ("a1_in1k",
    "seresnet50.a1_in1k"), "DEFAULT" (what ``pretrained=True`` means too) for the tag that timm
    prefers, a path to a checkpoint, or a state dict. A tag is downloaded through timm on this
    request, with timm's progress bar whatever ``progress`` says; as in timm, ``in_chans`` adapts
    the first convolution, and another ``num_classes`` keeps the new classifier as it was
    initialised. Keywords that are None are taken as not given.
    """

    @functools.wraps(build)
    def builder(
        pretrained: bool = False, *, weights: Any = None, progress: bool = True, **kwargs: Any
    ) -> nn.Module:
        name = build.__name__
        kwargs = {k: v for k, v in kwargs.items() if v is not None and k not in NEEDLESS}
        for key in REFUSED.keys() & kwargs.keys():
            if kwargs.pop(key):
                raise TypeError(f"{name}() does not support {key}=: {REFUSED[key]}")
        if pretrained and weights is None:
            weights = "DEFAULT"
        source = resolve_timm(weights, name)
        model = build(**kwargs)
        if isinstance(source, TimmPretrained):
            load_checkpoint(model, source.load_for(model))
            model.pretrained_cfg = model.default_cfg = source.config.to_dict()
        elif source is not None:
            load_checkpoint(model, source.load(progress), builder=name)
        return model

    signature = inspect.signature(builder, follow_wrapped=False)
    builder.__signature__ = signature.replace(return_annotation=nn.Module)
    return register_builder(builder)


class TimmPretrained(NamedTuple):
    """Weights that timm publishes: their full name, and timm's description of them."""

    name: str
    config: Any

    def load_for(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The weights for ``model``'s input channels; its own classifier if the classes differ."""
        import timm

        # Building timm's model must not move the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            pretrained = timm.create_model(self.name, pretrained=True, in_chans=model.in_chans)
        state = pretrained.state_dict()
        if model.num_classes == self.config.num_classes:
            return state
        head = f"{self.config.classifier}."
        own = {k: v for k, v in model.state_dict().items() if k.startswith(head)}
        return {k: v for k, v in state.items() if not k.startswith(head)} | own


def resolve_timm(weights: Any, architecture: str) -> TimmPretrained | Checkpoint | None:
    """What a timm builder's ``weights=`` argument names.

    Raises:
        ImportError: it names weights of timm's, and timm cannot be imported.
        RuntimeError: timm has no such weights, or none at all for this network (as in timm).
        ValueError: it names another network's weights.
        TypeError: it is no kind of weights.
    """
    if weights is None or (checkpoint := given_checkpoint(weights)) is not None:
        return None if weights is None else checkpoint
    if not isinstance(weights, str):
        raise TypeError(
            f"{architecture}: weights must be a tag of timm's, a path to a checkpoint or a state "
            f"dict, got {type(weights).__name__}"
        )
    network, _, tag = weights.rpartition(".")
    if network not in ("", architecture):
        raise ValueError(
            f"{architecture}: weights={weights!r} are {network}'s; pass a tag alone, or "
            f"'{architecture}.{tag}'"
        )
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"weights={weights!r} is a name of timm's, and timm cannot be imported ({error}); "
            f"install it (pip install timm), or pass the path of a checkpoint or a state dict"
        ) from error
    published = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if not published:
        raise RuntimeError(
            f"timm publishes no weights for {architecture}; pass the path of a checkpoint or a "
            f"state dict"
        )
    if tag == "DEFAULT":
        tag = timm.models.get_pretrained_cfg(architecture).tag
    if tag not in published:
        raise RuntimeError(
            f"Invalid pretrained tag ({tag}) for {architecture}; timm has {', '.join(published)}"
        )
    name = f"{architecture}.{tag}"
    return TimmPretrained(name, timm.models.get_pretrained_cfg(name))
