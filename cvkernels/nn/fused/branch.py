"""What a residual block computes, as data: its layers, its gate, its shortcut and their join.

A block declares its branch once. :meth:`FusedBlock.forward` runs it: module by module where
something watches them, else as one op a layer; and where every op has a plan that lasts, the plans
in a row are kept, and are what later calls run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from cvkernels import record
from cvkernels.nn.fused.caller_layout import in_layout_of_input, like_input
from cvkernels.nn.fused.match import fused_act
from cvkernels.nn.fused.module import FusedModule, Step, run_step
from cvkernels.nn.fused.plan_cache import guard_of
from cvkernels.nn.fused.watched import why_altered, why_watched

Activation = nn.Module | Callable[[Tensor], Tensor] | None


class Layer(NamedTuple):
    """``behind(act(between(norm(conv(x)))))``; all but the convolution may be absent.

    ``owner`` is the module that is called to run the layer stock's way, where there is one.
    """

    conv: nn.Module
    norm: nn.Module | None = None
    act: Activation = None
    between: nn.Module | None = None
    behind: nn.Module | None = None
    owner: nn.Module | None = None

    def as_modules(self, x: Tensor) -> Tensor:
        if self.owner is not None:
            return self.owner(x)
        for module in (self.conv, self.norm, self.between, self.act, self.behind):
            if module is not None:
                x = module(x)
        return x

    def why_not_bare(self) -> str:
        """Why more than a convolution, its norm and its activation has to run."""
        for place in (self.between, self.behind):
            if place is not None and type(place) is not nn.Identity:
                return f"{type(place).__name__} stands in the layer"
        return why_altered(self.between, self.behind, self.owner)


class Branch(NamedTuple):
    """``act(drop(steps(x)) + shortcut(x))``.

    A step that is no :class:`Layer` is a squeeze-and-excitation module. ``adds`` says whether there
    is a shortcut: ``downsample(x)``, or x itself where ``downsample`` is None. ``in_place`` says
    whether stock adds it in place, which a hook on the last module can tell, and
    ``shortcut_first`` whether it computes the shortcut before the last step. ``body`` is the module
    whose call runs all steps, where there is one; with no steps named it is called.
    """

    steps: tuple[Layer | nn.Module, ...]
    adds: bool = False
    downsample: nn.Module | None = None
    drop: nn.Module | None = None
    act: nn.Module | None = None
    in_place: bool = True
    shortcut_first: bool = False
    body: nn.Module | None = None


class FusedBlock(FusedModule):
    """A block that runs the :class:`Branch` it declares."""

    def branch(self) -> Branch:
        raise NotImplementedError

    @in_layout_of_input
    def forward(self, x: Tensor) -> Tensor:
        plans = self.plans_of(x, self)
        if plans is not None and (run := plans.get(x)) is not None:
            return run(self, x)
        branch = self.branch()
        if plans is None or (guard := guard_of(x, self._bypassed(branch))) is None:
            return _Walk(self, branch, False).run(x)
        walk = _Walk(self, branch, True)
        y = walk.run(x)
        if walk.lasting:
            plans.keep(guard, walk.replay(), x)
        return y

    def _bypassed(self, branch: Branch) -> list[nn.Module]:
        """All modules but the shortcut's, which is called."""
        called = () if branch.downsample is None else branch.downsample.modules()
        called = {id(module) for module in called}
        return [module for module in self.modules() if id(module) not in called]


def drops(module: nn.Module | None) -> bool:
    """Whether stochastic depth may drop an image now, as far as is known of its class."""
    if module is None or type(module) is nn.Identity:
        return False
    probability = getattr(module, "drop_prob", getattr(module, "p", None))
    known = type(module).__module__ in ("timm.layers.drop", "cvkernels.nn.stochastic_depth")
    known = known or type(module).__module__ == "torchvision.ops.stochastic_depth"
    return not known or probability is None or (module.training and probability > 0.0)


class _Walk:
    """One pass over a branch: it chooses each step for the data that reaches it, and runs it."""

    def __init__(self, block: FusedModule, branch: Branch, lasting: bool) -> None:
        self.block, self.branch = block, branch
        # Whether all steps so far hold for other data like this.
        self.lasting = lasting
        self.steps: list[Step] = []
        self.shortcut: tuple = ()
        self.watched = ""
        # Whether an op of this walk made the map at hand, so that nothing else holds it.
        self.fresh = False

    def run(self, x: Tensor) -> Tensor:
        branch, parts, y = self.branch, list(self.branch.steps), x
        self.watched = why_watched(x)
        if branch.body is not None and (self.watched or not parts or why_altered(branch.body)):
            self.lasting = False
            return self._add_modules(x, branch.body(x)) if branch.adds else branch.body(x)
        while parts:
            part = parts.pop(0)
            gated = len(parts) > 1 and self._gates(y, part, *parts[:2])
            excitation, last = (parts.pop(0), parts.pop(0)) if gated else (None, part)
            reason = "" if parts or not branch.adds else self._why_not_joined(y, last)
            if not parts and branch.adds and not reason:
                return self._join(x, y, part, excitation, last)
            shortcut = None
            if branch.adds and branch.shortcut_first and not parts:
                shortcut = self._shortcut(x)
            made = self._apply(y, part, excitation, last)
            y = like_input(x, made)
            # What repeats the steps would hand the next one the map as it was made.
            self.lasting = self.lasting and y is made
        return self._add_modules(x, y, reason, shortcut) if branch.adds else y

    def replay(self) -> Callable[[FusedBlock, Tensor], Tensor]:
        """What repeats this walk on data like its own, and checks no more than the shortcut.

        Called with the block, which it does not hold: the block holds it.
        """
        downsample, expected = self.branch.downsample, self.shortcut
        *runs, last = [step.run for step in self.steps]

        def alone(block: FusedBlock, x: Tensor) -> Tensor:
            for run in runs:
                x = run(x)
            return last(x)

        def joined(block: FusedBlock, x: Tensor) -> Tensor:
            y = x
            for run in runs:
                y = run(y)
            if downsample is None:
                return last(y, x)
            shortcut = downsample(x)
            if _kind(shortcut) == expected:
                return last(y, shortcut)
            return _Walk(block, block.branch(), False).run(x)

        return joined if self.branch.adds else alone

    def _done(self, step: Step, fresh: bool = False) -> None:
        self.steps.append(step)
        self.lasting = self.lasting and step.lasting
        self.fresh = fresh

    def _gates(self, x: Tensor, *parts: Layer | nn.Module) -> bool:
        """Whether these are a depthwise layer, squeeze-and-excitation of it, and a projection."""
        depthwise, excitation, project = parts
        if self.watched or not isinstance(depthwise, Layer) or not isinstance(project, Layer):
            return False
        if not hasattr(excitation, "takes_sums") or depthwise.why_not_bare():
            return False
        return not project.why_not_bare() and excitation.takes_sums(x, depthwise, project)

    def _apply(
        self, x: Tensor, part: Layer | nn.Module, excitation: nn.Module | None,
        last: Layer | nn.Module, residual: Tensor | None = None, act: nn.Module | None = None,
    ) -> Tensor:  # fmt: skip
        """``part`` alone, or with the excitation and projection behind it; ends with act."""
        if excitation is not None:
            project = last if act is None else last._replace(act=act)
            y, step = excitation.run_gated(self.block, x, part, project, residual, self.lasting)
            self._done(step)
            return y
        if not isinstance(part, Layer):
            self._done(Step(part, "", part, lasting=True))
            return part(x)
        if reason := self.watched or part.why_not_bare():
            step = Step(part.conv, reason, part.as_modules)
            self._done(step)
            return run_step(step, x)
        layer = part if act is None else part._replace(act=act)
        step = self.block.layer_step(
            x, layer.conv, layer.norm, layer.act, residual, lasting=self.lasting
        )
        self._done(step, fresh=not step.reason)
        return run_step(step, x, residual)

    def _why_not_joined(self, x: Tensor, last: Layer | nn.Module) -> str:
        """Why the shortcut is not added, and the activation applied, by the last step's op."""
        drop, act = self.branch.drop, self.branch.act
        if self.watched:
            return self.watched
        if drops(drop):
            return f"{type(drop).__name__} may drop images"
        if reason := why_altered(drop):
            return reason
        if not isinstance(last, Layer):
            added = getattr(last, "why_not_added", None)
            return f"{type(last).__name__} is not fused" if added is None else added(x, act)
        if fused_act(last.norm, last.act)[0] is not None:
            return "the activation stands before the shortcut"
        # Hooks would see when the shortcut is computed, and whether the sum is one in place.
        inside = () if last.norm is None else last.norm.children()  # of timm's, an activation
        return last.why_not_bare() or why_altered(last.conv, last.norm, *inside)

    def _join(
        self, x: Tensor, y: Tensor, part: Layer | nn.Module, excitation: nn.Module | None,
        last: Layer | nn.Module,
    ) -> Tensor:  # fmt: skip
        """The last step with the shortcut, as one op."""
        shortcut = self._shortcut(x)
        self.shortcut = _kind(shortcut)
        act = self.branch.act
        if isinstance(last, Layer):
            return self._apply(y, part, excitation, last, shortcut, act)
        step = last.added_step(y, shortcut, act, self.fresh, self.lasting)
        self._done(step)
        return run_step(step, y, shortcut)

    def _add_modules(
        self, x: Tensor, y: Tensor, reason: str = "", shortcut: Tensor | None = None
    ) -> Tensor:
        """The end of the stock forward: what drops images, the shortcut and the activation."""
        self.lasting = False
        branch = self.branch

        def end() -> Tensor:
            out = y if branch.drop is None else branch.drop(y)
            added = self._shortcut(x) if shortcut is None else shortcut
            if branch.in_place:
                out += added
            else:
                out = out + added
            return out if branch.act is None else branch.act(out)

        if (recorder := record.active()) is None:
            return end()
        with recorder.fallback(reason):
            return end()

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.branch.downsample is None else self.branch.downsample(x)


def _kind(tensor: Tensor) -> tuple:
    return type(tensor), tensor.shape, tensor.dtype, tensor.stride()
