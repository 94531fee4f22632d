"""Which convolutions stay in float32, so that a network in int8 keeps what it computes.

The signal-to-noise ratio of outputs is ``10 * log10(sum(y ** 2) / sum((z - y) ** 2))`` in decibels,
y being those of the network in float32 and z those with bytes. The noise of single convolutions
adds up, about: those that alone make the most of it go first, until the rest keeps to the limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cvkernels.freeze.graph import Graph, Node, Op, TensorSpec
from cvkernels.freeze.ops import Conv
from cvkernels.freeze.plan import Plan
from cvkernels.freeze.progress import progress
from cvkernels.freeze.quantise.calibration import Calibration
from cvkernels.freeze.quantise.rewrite import quantised, why_not
from cvkernels.functional import DerivedWeights

# Images that the search runs on, of those given, spread over them.
IMAGES = 16


def decibels(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The signal-to-noise ratio of outputs; infinite where they are equal."""
    signal = sum(y.double().square().sum().item() for y in exact)
    noise = sum(
        (z.double() - y.double()).square().sum().item() for z, y in zip(outputs, exact, strict=True)
    )
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class Guard:
    """Runs graphs on a few of the images, and compares them with the one in float32."""

    def __init__(self, graph: Graph, found: Calibration, images: list[Tensor]) -> None:
        self.graph, self.found = graph, found
        step = max(1, len(images) // IMAGES)
        self.images = torch.cat(images[::step][:IMAGES])
        self._caches: dict[Op, DerivedWeights] = {}
        self.exact = self._run(graph)

    def _run(self, graph: Graph) -> list[Tensor]:
        spec = TensorSpec(tuple(self.images.shape), self.images.dtype)
        outputs = Plan(graph, spec, self.images.device, self._caches, {})(self.images)
        return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]

    def measure(self, floats: Mapping[Node, str]) -> tuple[Graph, float]:
        """The graph whose convolutions in ``floats`` stay so, and its decibels."""
        graph = quantised(self.graph, self.found, floats)
        return graph, decibels(self._run(graph), self.exact)

    def search(self, tolerance: float) -> tuple[Graph, float]:
        """The graph that keeps ``tolerance`` decibels, and its own; its notes say what stays in
        float32, and why."""
        convs = [node for node in self.graph.nodes if isinstance(node.op, Conv)]
        able = [node for node in convs if not why_not(node)]
        graph, reached = self.measure({})
        if reached >= tolerance or not able:
            return graph, reached
        noise: dict[Node, float] = {}
        with progress("guard", len(able)) as advance:
            for node in able:
                _, alone = self.measure({other: "" for other in able if other is not node})
                noise[node] = 0.0 if alone == math.inf else 10 ** (-alone / 10)
                advance()
        order = sorted(able, key=lambda node: -noise[node])
        allowed, floats = 10 ** (-tolerance / 10), 0
        while reached < tolerance and floats < len(order):
            floats += 1
            while sum(noise[node] for node in order[floats:]) > allowed:
                floats += 1
            graph, reached = self.measure({node: _cost(noise[node]) for node in order[:floats]})
            # What is left may make more noise together than the sum of its parts says.
            allowed *= 10 ** (min(0.0, reached - tolerance) / 10)
        return graph, reached


def _cost(noise: float) -> str:
    alone = -10 * math.log10(noise) if noise else math.inf
    return f"float32: alone in int8 it leaves the outputs {alone:.1f} dB"
