"""A call of each op on one map, for what all ops promise alike."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cvkernels import functional
from tests.support.cases.conv_bn_act import make_bn
from tests.support.cases.squeeze_excite import Map, make_layers

OPS = sorted(set(functional.__all__) - {"BatchNormParams", "DerivedWeights"})


@dataclass(frozen=True)
class OpCall:
    """``op(*arguments, **options)``; a plan for it is run with the arguments at ``places``."""

    op: str
    arguments: tuple
    options: dict = field(default_factory=dict)
    places: tuple[int, ...] = (0,)

    def __call__(self, **options):
        """What the op returns; where it writes into its first argument, into a copy."""
        first, *others = self.arguments
        first = first.clone() if self.op == "dense_concat" else first
        return getattr(functional, self.op)(first, *others, **self.options, **options)

    def plan(self, **options):
        return getattr(functional, self.op).plan(*self.arguments, **self.options, **options)

    @property
    def data(self) -> tuple[Tensor, ...]:
        return tuple(self.arguments[place] for place in self.places)

    def map(self, function) -> OpCall:
        """The call with ``function`` of its data."""
        arguments = [
            function(argument) if place in self.places else argument
            for place, argument in enumerate(self.arguments)
        ]
        return replace(self, arguments=tuple(arguments))

    def on_other_data(self) -> OpCall:
        """With other numbers, laid out as these."""
        return self.map(torch.randn_like)


def calls_on(x: Tensor) -> dict[str, OpCall]:
    """By op, a call on x."""
    N, C, H, W = x.shape
    kind = {"dtype": x.dtype, "device": x.device}
    layers = make_layers(Map(N, C, 6, H, W), x.dtype, x.device)
    gate, residual = torch.randn(N, C, **kind), torch.randn_like(x)
    bn, taps = make_bn(C, device=x.device), torch.randn(C, 1, 3, 3, **kind)
    nhwc = x.stride(1) == 1 and C > 1
    buffer = torch.zeros(N, C + 3, H, W, **kind)
    buffer = buffer.contiguous(memory_format=torch.channels_last) if nhwc else buffer
    pointwise = (torch.randn(5, C, 1, 1, **kind), None, make_bn(5, device=x.device))
    calls = (
        OpCall("squeeze", (x,)),
        OpCall("excite", (gate, *layers, "silu"), {"sigmoid": True}),
        OpCall("se_scale", (x, gate, residual, "silu"), places=(0, 1, 2)),
        OpCall("squeeze_excite", (x, *layers, "silu", residual, "relu"), places=(0, 6)),
        OpCall("max_pool", (x, 3, 2, 1, 1, True)),
        OpCall("avg_pool", (x, (3, 1), 1, (1, 0)), {"input_bn": bn}),
        OpCall("dense_concat", (buffer, x, 2, bn, True), places=(0, 1)),
        OpCall("conv_bn_act", (x, *pointwise), {"act": "silu"}),
        OpCall("depthwise_conv_bn_act", (x, taps), {"padding": 1, "act": "relu6", "squeeze": True}),
    )
    return {call.op: call for call in calls}


PLANNED = sorted(calls_on(torch.zeros(1, 8, 5, 5)))
