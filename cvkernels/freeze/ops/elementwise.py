"""Ops that compute each element by itself, and the linear layer."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels.freeze.graph import Node, Op, Run, Step, TensorSpec, promoted
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.work import GPU, Work, product
from cvkernels.ops.dense_concat import op as dense_concat

if TYPE_CHECKING:
    from cvkernels.freeze.steps import Site

ACTS = {"relu": torch.relu, "relu6": F.relu6, "silu": F.silu, "sigmoid": torch.sigmoid}


class _Append(Op, runs_plans=True, writes=True, placeable=True):
    """Writes x into the memory of its value by dense_concat, normed or as it is."""

    def appended(self, site: Site, bn: BatchNormParams | None, relu: bool) -> Run:
        (x,) = site.inputs
        append = site.plan(dense_concat.plan, site.like(site.out), site.like(x), 0, bn, relu)
        return site.written(lambda env, y: append(y, env[x]))


class Affine(_Append, name="affine"):
    """``x * scale + shift`` with a scale and a shift for each channel; then a ReLU if ``relu``."""

    scale: Tensor
    shift: Tensor
    relu: bool = False

    def build(self, site: Site) -> Run:
        return self.appended(site, BatchNormParams(self.scale, self.shift), self.relu)


class Copy(_Append, name="copy"):
    """A copy of x in a slice of a buffer, where the step that computes x cannot write to it."""

    def build(self, site: Site) -> Run:
        return self.appended(site, None, False)


class Act(Op, name="act", placeable=True):
    """The activation that :data:`ACTS` has under this name, applied to x."""

    act: str

    def build(self, site: Site) -> Run:
        activate, (x,) = ACTS[self.act], site.inputs
        return site.computed(lambda env: activate(env[x]))


class _Broadcast(Op):
    """A function of two tensors whose shapes are broadcast."""

    function: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def infer(self, node: Node, inputs: list, device: torch.device) -> TensorSpec:
        return promoted(super().infer(node, inputs, device), inputs)

    def shape(self, node: Node, a: tuple, b: tuple) -> tuple:
        # torch.broadcast_shapes would import the symbolic shapes, which takes half a second.
        sizes = list(itertools.zip_longest(reversed(a), reversed(b), fillvalue=1))
        node.check(all(m == n or 1 in (m, n) for m, n in sizes), "maps of one shape", (a, b))
        return tuple(n if m == 1 else m for m, n in reversed(sizes))

    def build(self, site: Site) -> Run:
        (a, b), function = site.inputs, self.function
        return site.computed(lambda env: function(env[a], env[b]))


class Add(_Broadcast, name="add", placeable=True, function=operator.add):
    """a + b."""


class Mul(_Broadcast, name="mul", function=operator.mul):
    """a * b."""


class Linear(Op, name="linear"):
    """A fully connected layer on x, [N, C]."""

    weight: Tensor
    bias: Tensor | None

    def shape(self, node: Node, x: tuple) -> tuple:
        features, channels = self.weight.shape
        node.check(x[-1] == channels, f"{channels} features", x)
        return (*x[:-1], features)

    def work(self, step: Step, gpu: GPU) -> tuple[Work, ...]:
        features, channels = self.weight.shape
        rows = step.inputs[0].value.shape[0]
        return (product(rows, features, channels, self.weight.dtype.itemsize, gpu),)

    def build(self, site: Site) -> Run:
        (x,), weight, bias = site.inputs, self.weight, self.bias
        return site.computed(lambda env: F.linear(env[x], weight, bias))
