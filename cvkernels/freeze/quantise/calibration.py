"""What the values of a graph are on calibration images: their ranges, and means of channels.

A value gets the range that gives its bytes the smallest mean squared error on these images: a wide
one has large steps, and a narrow one cuts off what is outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cvkernels.freeze.graph import Graph, Node, TensorSpec
from cvkernels.freeze.ops import AvgPool, Conv, Mean
from cvkernels.freeze.plan import Plan
from cvkernels.freeze.progress import progress
from cvkernels.ops.quantised.quantisation import LEVELS

BINS = 2048
# Whatever PyTorch's defaults are.
_LIKE: Any = {"dtype": torch.float64, "device": "cpu"}
# Shares of the largest value that are tried as the end of a range.
SHARES = [share / 100 for share in range(20, 101)]


@dataclass
class Observed:
    """One value's smallest and largest number, how many lie in each of BINS parts between them, and
    the sum of the means of each channel."""

    low: float = 0.0
    high: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, **_LIKE))
    means: Tensor | None = None
    images: int = 0

    def widen(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())

    def count(self, x: Tensor) -> None:
        if self.low < self.high:
            self.counts += torch.histc(x, BINS, self.low, self.high)
        if x.dim() == 4:
            mean = x.mean((0, 2, 3), dtype=torch.float64)
            self.means = mean if self.means is None else self.means + mean
            self.images += 1

    @property
    def mean(self) -> Tensor:
        """Of each channel."""
        assert self.means is not None
        return self.means / self.images

    def range(self) -> tuple[float, float]:
        """From where to where its bytes reach."""
        low, high = self.low, self.high
        if not low < high:
            return low, high
        width = (high - low) / BINS
        centers = low + width * (torch.arange(BINS, **_LIKE) + 0.5)
        shares = torch.tensor(SHARES, **_LIKE)
        for _ in range(2):
            if self.high > 0:
                high = self._best(centers, low, shares * self.high, upper=True)
            if self.low < 0:
                low = self._best(centers, high, shares * self.low, upper=False)
        return low, high

    def _best(self, centers: Tensor, other: float, ends: Tensor, upper: bool) -> float:
        lows, highs = (torch.full_like(ends, other), ends)
        if not upper:
            lows, highs = highs, lows
        lows, steps = lows[:, None], ((highs - lows) / LEVELS)[:, None]
        bytes_ = ((centers - lows) / steps).round_().clamp_(0, LEVELS)
        errors = (bytes_ * steps + lows - centers).square_() @ self.counts
        return ends[errors.argmin()].item()


@dataclass
class Calibration:
    """``values`` of nodes, and ``operands`` that convolutions multiply, where these are others."""

    values: dict[Node, Observed]
    operands: dict[Node, Observed]
    images: int = 0

    def operand(self, conv: Node) -> Observed:
        return self.operands.get(conv) or self.values[conv.inputs[0]]


def calibrate(graph: Graph, images: list[Tensor]) -> Calibration:
    """Run the graph, in float32, on ``images`` [1, C, H, W]: once for ranges, once to count."""
    found = Calibration({}, {}, len(images))
    plans: dict[torch.Size, Plan] = {}
    with progress("calibrate", 2 * len(images)) as advance:
        for counts in (False, True):
            for image in images:
                if image.shape not in plans:
                    spec = TensorSpec(tuple(image.shape), torch.float32)
                    plans[image.shape] = Plan(graph, spec, image.device, {}, {})
                _observe(graph, plans[image.shape], image, found, counts)
                advance()
    return found


def _observe(graph: Graph, plan: Plan, image: Tensor, found: Calibration, counts: bool) -> None:
    for node, value, operand in _observed_values(graph, plan, image):
        for x, table in ((value, found.values), (operand, found.operands)):
            if x is not None:
                observed = table.setdefault(node, Observed())
                observed.count(x) if counts else observed.widen(x)


def _observed_values(
    graph: Graph, plan: Plan, image: Tensor
) -> Iterator[tuple[Node, Tensor, Tensor | None]]:
    """Each node whose value is to be known, its value, and what it multiplies if that is not x."""
    nodes = {step: node for node, step in plan.lowered.of.items()}
    index = plan.memory.index
    for step, env in plan.walk(image):
        node = nodes.get(step)
        if node is None or not isinstance(value := env[index[step]], Tensor):
            continue
        operand = None
        if isinstance(node.op, (Conv, AvgPool, Mean)) and node.op.input_affine is not None:
            scale, shift = (t.view(-1, 1, 1) for t in node.op.input_affine)
            operand = (env[index[step.inputs[0]]] * scale + shift).clamp_min_(0.0)
        elif isinstance(node.op, Conv) and (gate := step.role("gate")) is not None:
            gates = env[index[gate]]
            if node.role("gate") in plan.lowered.logits:
                gates = gates.sigmoid()
            operand = env[index[step.inputs[0]]] * gates[:, :, None, None]
        if value.is_floating_point():
            yield node, value, operand
