"""The five questions: which networks answer each, and how their outcomes are shown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.depth import networks
from benchmarks.depth.trial import Outcome, Trial
from cvkernels.models import googlenet

DEPTHS = {1: 8, 3: 20, 5: 32, 9: 56}  # blocks per stage: layers


@dataclass(frozen=True)
class Question:
    """What is asked, by which paper, and its trials, each with seed 0."""

    name: str
    title: str
    text: str
    trials: Callable[[], list[Trial]]
    gradients: bool = False  # drawn by layer, too

    def with_seeds(self, seeds: Sequence[int], epochs: int | None) -> list[Trial]:
        return [
            replace(trial, seed=seed, epochs=epochs or trial.epochs)
            for trial in self.trials()
            for seed in seeds
        ]


def _depth() -> list[Trial]:
    blocks = {"plain": networks.plain_block, "residual": networks.residual_block}
    return [
        Trial("a", f"{kind}-{layers}", networks.staged, {"block": block, "blocks": count})
        for kind, block in blocks.items()
        for count, layers in DEPTHS.items()
    ]


def _inception(norms: bool) -> nn.Module:
    """GoogLeNet for ten classes; without norms as in 2014, with He et al.'s initialisation."""
    model = googlenet(num_classes=networks.CLASSES, init_weights=True)
    if not norms:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if hasattr(module, "bn"):
                module.bn = nn.Identity()
    return model


def _auxiliary() -> list[Trial]:
    return [
        Trial(
            "b", f"{'with' if norms else 'without'} norms, {'with' if weight else 'without'} heads",
            _inception, {"norms": norms}, epochs=4, rate=0.05 if norms else 0.005, auxiliary=weight,
        )
        for norms in (True, False)
        for weight in (0.3, 0.0)
    ]  # fmt: skip


def _concatenation() -> list[Trial]:
    trials = []
    for layers in (2, 4):
        budget = networks.parameters(networks.dense(layers))
        trials += [
            Trial("c", f"concatenation, {6 * layers + 4} layers", networks.dense,
                  {"layers": layers}),
            Trial("c", f"addition, {6 * layers + 2} layers", networks.residual_of,
                  {"budget": budget, "blocks": layers}),
        ]  # fmt: skip
    return trials


def _gates() -> list[Trial]:
    blocks = {"without SE": networks.residual_block, "with SE": networks.se_block}
    return [
        Trial("d", f"{layers} layers, {kind}", networks.staged, {"block": block, "blocks": count})
        for count, layers in ((1, 8), (3, 20))
        for kind, block in blocks.items()
    ]


# Blocks, width of the first stage, size of the images: about four times the base's operations.
SCALED = {
    "base": (1, 6, 16),
    "width x 2": (1, 12, 16),
    "depth x 4": (4, 6, 16),
    "resolution x 2": (1, 6, 32),
    "all three": (2, 7, 18),
}


def _compound() -> list[Trial]:
    return [
        Trial(
            "e", label, networks.staged,
            {"block": networks.residual_block, "blocks": blocks,
             "widths": (width, 2 * width, 4 * width)},
            size=size,
        )
        for label, (blocks, width, size) in SCALED.items()
    ]  # fmt: skip


QUESTIONS = (
    Question(
        "a", "Does a network get better with depth?",
        "Plain stacks of 3x3 convolutions, norm and ReLU against the same layers with shortcuts, "
        "after He et al. 2016, arXiv:1512.03385, section 4.2.", _depth, True,
    ),
    Question(
        "b", "What do auxiliary classifiers do for the lower half?",
        "GoogLeNet (Szegedy et al. 2015, arXiv:1409.4842) with its two auxiliary losses, weighed "
        "0.3, and without them; with batch norm, as it is built today, and without, as in 2014.",
        _auxiliary, True,
    ),
    Question(
        "c", "Is it better to concatenate features or to add them?",
        "Dense blocks (Huang et al. 2017, arXiv:1608.06993) against residual ones of as many "
        "parameters, as near as whole channels come.", _concatenation,
    ),
    Question(
        "d", "What do gates per channel bring?",
        "Squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507) on and off in one residual "
        "network.", _gates,
    ),
    Question(
        "e", "Which way of scaling pays?",
        "Width, depth and resolution alone and together, about four times the base's operations, "
        "after Tan and Le 2019, arXiv:1905.11946.", _compound,
    ),
)  # fmt: skip


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean of the seeds, and their least and largest."""
    if len(values) == 1:
        return form(values[0])
    return f"{form(statistics.fmean(values))} ({form(min(values))} to {form(max(values))})"


def lower_half(gradients: Sequence[float]) -> float:
    """The norm of the gradient in the convolutions nearer to the image."""
    return torch.tensor(gradients[: len(gradients) // 2]).norm().item()


HEADER = (
    "network", "parameters", "Mflop", "loss, last epoch", "training error", "test error",
    "lower half's gradient, initial", "after an epoch", "seconds",
)  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """A row per label, over its seeds."""
    rows = []
    for label in dict.fromkeys(outcome.label for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.label == label]
        lower = {
            key: [lower_half(outcome.gradients[key]) for outcome in own] for key in own[0].gradients
        }
        rows.append(
            (
                label, f"{own[0].parameters:,}", f"{own[0].mflops:.1f}",
                spread([o.train_loss[-1] for o in own], "{:.3f}".format),
                spread([o.train_error for o in own], "{:.2%}".format),
                spread([o.test_error for o in own], "{:.2%}".format),
                *(spread(values, "{:.2g}".format) for values in lower.values()),
                f"{statistics.fmean(o.seconds for o in own):.0f}",
            )
        )  # fmt: skip
    return rows
