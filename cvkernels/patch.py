"""``patch``: the blocks of a torchvision or timm model swapped for ours, reversibly.

A swap changes the class of one instance and nothing else: parameters, buffers, hooks, children and
their names stay the objects they are. The new class derives from the stock class and from our
block, so ``isinstance`` keeps its answer, takes over what computes (``forward``) and leaves all
other methods the stock class's. It pickles by reference to this module.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import jit, nn

from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.sequential import FusedSequential
from cvkernels.swaps import SEQUENTIAL, SEQUENTIALS, SWAPS, Swap
from cvkernels.tables import text_table

QUANTISED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.intrinsic.", "torchao.")


class Replaced(NamedTuple):
    """A module that :func:`patch` swapped: its name in the model, its class, and ours."""

    name: str
    stock: str
    ours: str


class Left(NamedTuple):
    """A module that is left unchanged, and why."""

    name: str
    stock: str
    reason: str


class PatchReport:
    """What :func:`patch` replaced and what it left; prints as a table."""

    def __init__(self, replaced: list[Replaced], left: list[Left]) -> None:
        self.replaced = replaced
        self.left = left

    def __str__(self) -> str:
        rows = [(r.name, r.stock, f"now {r.ours}") for r in self.replaced]
        rows += [(r.name, r.stock, f"left: {r.reason}") for r in self.left]
        summary = f"{len(self.replaced)} module(s) replaced, {len(self.left)} left"
        return f"{text_table(('module', 'class', 'outcome'), rows)}\n{summary}"

    __repr__ = __str__


def patch(model: nn.Module) -> PatchReport:
    """Swap every block of ``model`` that cvkernels has for ours; :func:`restore` undoes it.

    Args:
        model: a torchvision or timm network, or any module that holds such blocks.

    Returns:
        A :class:`PatchReport`. Outputs, ``state_dict``, names, hooks and ``isinstance`` answers
        stay as they were. Patching again is harmless and finds nothing new.

    Raises:
        TypeError: model is scripted or holds quantised modules; it is unchanged.
        ValueError: model holds nothing that could be replaced; it is unchanged.
    """
    _refuse_what_has_no_python_blocks(model)
    sequentials = _sequentials(model)
    replaced: list[Replaced] = []
    left: list[Left] = []
    for name, module in list(model.named_modules()):
        ours, reason = _swap_of(module, name in sequentials)
        stock = _path(type(module))
        if ours is not None:
            module.__class__ = _class_of(stock)
            replaced.append(Replaced(name, stock, ours.__name__))
        elif reason:
            left.append(Left(name, stock, reason))
    if not replaced and not any(isinstance(module, FusedModule) for module in model.modules()):
        raise ValueError(
            f"patch: {type(model).__name__} holds no block that cvkernels has; it takes these of "
            f"torchvision's and timm's: {', '.join(sorted({k.split('.')[-1] for k in SWAPS}))}"
        )
    return PatchReport(replaced, left + _lone_convolutions(model))


def restore(model: nn.Module) -> nn.Module:
    """Give every patched module of ``model`` its stock class back, and return ``model``.

    The modules are then what they were before :func:`patch`; one that is not patched is unchanged.
    """
    for module in model.modules():
        if isinstance(module, _Patched):
            module.drop_derived_weights()
            module.__class__ = module.stock_class  # type: ignore[assignment]
    return model


class _Patched:
    """Marks a class that :func:`patch` gives to instances of ``stock_class``."""

    stock_class: type[nn.Module]
    drop_derived_weights: Callable[[], None]

    def __prepare_scriptable__(self: Any) -> nn.Module:
        # TorchScript compiles the stock forward, and puts prepared children into the tree it gets.
        return _stock_copy(self, {})


def _stock_copy(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """A tree of stock modules that shares its parameters, buffers and hooks with ``module``."""
    if id(module) not in copies:
        twin = copies[id(module)] = copy.copy(module)
        twin.__class__ = getattr(module, "stock_class", type(module))
        twin.__dict__["_modules"] = {
            name: child and _stock_copy(child, copies) for name, child in module._modules.items()
        }
    return copies[id(module)]


def _swap_of(module: nn.Module, is_sequential: bool) -> tuple[type | None, str]:
    """Our class for a module to swap, or None and why a block that looks like ours is left."""
    if isinstance(module, FusedModule):
        return None, ""
    path = _path(type(module))
    if path == SEQUENTIAL:
        return (FusedSequential if is_sequential else None), ""
    if path not in SWAPS:
        for base in type(module).__mro__[1:]:
            if _path(base) in SWAPS:
                return None, f"a subclass of {base.__name__} may have a forward of its own"
        return None, ""
    swap = SWAPS[path]
    if any(method in module.__dict__ for method in swap.methods):
        return None, "its forward is replaced on the instance"
    if swap.unless and getattr(module, swap.unless):
        return None, f"{swap.unless}={getattr(module, swap.unless)!r} is not fused"
    return _resolve(swap.ours), ""


def _sequentials(model: nn.Module) -> set[str]:
    """Names of the plain sequences to swap: those of known networks and blocks whose parts we fuse,
    and stages, which hold blocks of ours alone."""
    return {
        f"{name}.{child}".lstrip(".")
        for name, module in model.named_modules()
        for child, part in module.named_children()
        if child in SEQUENTIALS.get(_path(type(module)), ())
        or (_is_stage(part) and not _is_block(module))
    }


def _is_stage(module: nn.Module) -> bool:
    return (
        type(module) is nn.Sequential
        and len(module) > 0
        and all(_is_block(child) or _is_stage(child) for child in module)
    )


def _is_block(module: nn.Module) -> bool:
    """Whether it is a block of ours, or one that will be; networks are none."""
    kind = getattr(module, "stock_class", type(module))
    swap = SWAPS.get(_path(kind), Swap(kind.__module__))
    return swap.ours.startswith("cvkernels.nn.")


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _lone_convolutions(model: nn.Module) -> list[Left]:
    """Convolutions whose direct parent is no block of ours."""
    return [
        Left(f"{name}.{child}".lstrip("."), "torch.nn.Conv2d", "no block of cvkernels around it")
        for name, module in model.named_modules()
        if not isinstance(module, FusedModule)
        for child, conv in module.named_children()
        if isinstance(conv, nn.Conv2d)
    ]


def _refuse_what_has_no_python_blocks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"{type(module).__name__} at {name!r}" if name else type(module).__name__
        if isinstance(module, jit.ScriptModule):
            raise TypeError(
                f"patch: {where} is scripted and has no Python blocks; patch the model before "
                f"scripting it"
            )
        if type(module).__module__.startswith(QUANTISED):
            raise TypeError(
                f"patch: {where} is quantised, and cvkernels computes in floating point; patch the "
                f"model before quantising it"
            )


def _resolve(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@functools.cache
def _class_of(stock: str) -> type:
    """The class for patched instances of the class ``stock``."""
    stock_class = _resolve(stock)
    path, methods = SWAPS[stock][:2] if stock in SWAPS else (_path(FusedSequential), ("forward",))
    ours = _resolve(path)
    # pickle finds the class under this name through __getattr__ below.
    attributes = {method: getattr(ours, method) for method in methods} | {
        "__module__": __name__,
        "__qualname__": stock.replace(".", "__dot__"),
        "__doc__": f"{stock}, patched by cvkernels with {path}.",
        "stock_class": stock_class,
    }
    bases = (ours,) if issubclass(ours, stock_class) else (stock_class, ours)
    return type(stock_class.__name__, (_Patched, *bases), attributes)


def __getattr__(name: str) -> type:
    stock = name.replace("__dot__", ".")
    if stock != SEQUENTIAL and stock not in SWAPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class_of(stock)
