"""Builders by name, and what they share: weights, fixed arguments, old calling styles."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from cvkernels.models.checkpoints import Checkpoint, Pretrained, load_checkpoint, resolve

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


Finish = Callable[[nn.Module], None]


def _as_called(*, weights=None, progress=True, **kwargs) -> nn.Module:
    """How a builder is called; older ways are understood too."""


_SIGNATURE = inspect.signature(_as_called, eval_str=True)


def model_builder(
    weights_enum: str,
    *,
    prepare: Callable[[dict[str, Any], Pretrained | Checkpoint], Finish | None] | None = None,
    **fixed: Any,
) -> Callable:
    """Make a public builder ``name(*, weights=None, progress=True, **kwargs)`` of a function.

    ``weights`` is None, a member of torchvision's enum ``weights_enum`` or its name (downloaded on
    this request, with a progress bar unless ``progress=False``), a path to a checkpoint, or a state
    dict. ``fixed`` are constructor arguments that this network prescribes. ``prepare(kwargs,
    source)`` changes the constructor's arguments where there are weights, and may return what is to
    be done to the model after loading them.
    """

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        @functools.wraps(build)
        def builder(*args: Any, **kwargs: Any) -> nn.Module:
            weights, progress = _weights_and_progress(builder.__name__, args, kwargs)
            for name, value in fixed.items():
                prescribe(kwargs, name, value)
            source = resolve(weights, weights_enum)
            finish = prepare(kwargs, source) if prepare and source is not None else None
            if isinstance(source, Pretrained):
                prescribe(kwargs, "num_classes", source.num_classes)
            model = build(**kwargs)
            if source is not None:
                load_checkpoint(model, source.load(progress), builder=builder.__name__)
            if finish is not None:
                finish(model)
            return model

        builder.__signature__ = _SIGNATURE
        builder.weights_enum = weights_enum
        return register_builder(builder)

    return register


def register_builder(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Let :func:`list_models` and :func:`create_model` know a builder by its name."""
    _BUILDERS[builder.__name__] = builder
    return builder


def list_models() -> list[str]:
    """Names of all builders, sorted."""
    return sorted(_BUILDERS)


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """``cvkernels.models.<name>(**kwargs)``.

    Raises:
        ValueError: there is no such builder; the message lists the nearest names.
    """
    return get_builder(name)(**kwargs)


def get_builder(name: str) -> Callable[..., nn.Module]:
    if name not in _BUILDERS:
        import difflib

        near = difflib.get_close_matches(name, _BUILDERS, n=3) or list_models()
        raise ValueError(f"Unknown model {name}; did you mean {', '.join(near)}?")
    return _BUILDERS[name]


def prescribe(kwargs: dict[str, Any], name: str, value: Any) -> None:
    """Set ``kwargs[name]``, which the caller may leave out or give as this very value.

    Raises:
        ValueError: the caller gave another value.
    """
    if kwargs.setdefault(name, value) != value:
        raise ValueError(
            f"The parameter '{name}' expected value {value} but got {kwargs[name]} instead."
        )


def _weights_and_progress(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Take weights and progress out of the arguments, in the deprecated ways too."""
    if len(args) > 2:
        raise TypeError(f"{name}() takes at most 2 positional arguments, got {len(args)}")
    if args:
        warnings.warn(
            "Using 'weights' or 'progress' as positional parameter(s) is deprecated since 0.13 and "
            "may be removed in the future. Please use keyword parameter(s) instead.",
            stacklevel=3,
        )
    for key, value in zip(("weights", "progress"), args, strict=False):
        if key in kwargs:
            raise TypeError(f"{name}() got multiple values for argument '{key}'")
        kwargs[key] = value
    weights, progress = kwargs.pop("weights", None), kwargs.pop("progress", True)
    pretrained = kwargs.pop("pretrained", None)
    if isinstance(weights, bool):
        weights, pretrained = None, weights
    if pretrained is not None:
        equivalent = "IMAGENET1K_V1" if pretrained else None
        warnings.warn(
            "The parameter 'pretrained' is deprecated since 0.13 and may be removed in the future, "
            f"please use 'weights' instead; this call is equivalent to weights={equivalent!r}.",
            stacklevel=3,
        )
        weights = equivalent
    return weights, progress
