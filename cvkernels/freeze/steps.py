"""What each step of a plan calls: closures over all that does not change from call to call.

A step is a function of ``env``, the list of the values of one call. Values in the arena are there
from the start; a step writes into them, or puts a tensor of its own into its place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels import functional
from cvkernels.freeze.graph import Like, Node
from cvkernels.freeze.memory import Memory
from cvkernels.freeze.shapes import call
from cvkernels.functional import BatchNormParams, DerivedWeights
from cvkernels.ops.common import affine
from cvkernels.ops.common.activation import ACTIVATIONS
from cvkernels.ops.depthwise_conv_bn_act import native as depthwise_native
from cvkernels.ops.squeeze_excite.native import ACTS

Step = Callable[[list], None]
_ops = torch.ops.cvkernels
_ACT_FUNCTIONS = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


class Builder:
    """Builds the steps of one plan; ``caches`` keeps what backends derive from a node's weights."""

    def __init__(self, memory: Memory, caches: dict[Node, DerivedWeights]) -> None:
        self.memory = memory
        self.index = memory.index
        self.caches = caches

    def build(self, step: Node) -> Step | None:
        """The step's function; None where there is nothing to do."""
        if step.op in ("input", "cat", "sums", "scratch"):
            return None
        if step.op == "part" and self.memory.in_arena(step):
            return None
        own = getattr(self, f"_{step.op}_{step.attrs['backend']}", None)
        return (own or getattr(self, f"_{step.op}"))(step)

    def _cache(self, step: Node) -> DerivedWeights:
        cache = DerivedWeights(capacity=8, constant=True)
        return self.caches.setdefault(step.attrs["source"], cache)

    def _place(self, step: Node) -> tuple[int, int | None]:
        """The value's number, and the number of what ``out`` is for it, where it is written."""
        number = self.index[step]
        if self.memory.in_arena(step):
            return number, number
        if step in self.memory.place:  # over its input
            return number, self.index[self.memory.place[step][0]]
        return number, None

    def _inputs(self, step: Node) -> list[int]:
        return [self.index[source] for source in step.inputs]

    def _role(self, step: Node, name: str) -> int:
        """The number of the input that plays a role; of a value that is always None without one."""
        source = step.role(name)
        return len(self.index) if source is None else self.index[source]

    def _computed(self, step: Node, compute: Callable[[list], Tensor]) -> Step:
        """A step whose result is a tensor of its own, copied where it has a place."""
        number, out = self._place(step)
        value = self.memory.lowered.values[step]
        if out is None and isinstance(value, Like) and len(value.shape) == 4:

            def run(env: list) -> None:
                env[number] = compute(env).contiguous(memory_format=torch.channels_last)

        elif out is None:

            def run(env: list) -> None:
                env[number] = compute(env)
        else:

            def run(env: list) -> None:
                env[number].copy_(compute(env))

        return run

    def _conv(self, step: Node) -> Step:
        problem, cache = step.attrs["problem"], self._cache(step)
        convolve = step.attrs["implementation"].build(problem, step, cache)
        number, out = self._place(step)
        x, residual, gate = (self._role(step, name) for name in ("x", "residual", "gate"))
        if out is None:

            def run(env: list) -> None:
                env[number] = convolve(env[x], env[residual], env[gate], None)
        else:

            def run(env: list) -> None:
                convolve(env[x], env[residual], env[gate], env[number])

        return run

    def _conv_pool(self, step: Node) -> Step:
        problem, window = step.attrs["problem"], step.attrs["window"]
        convolve = step.attrs["implementation"].build(problem, step, self._cache(step))
        number, x, image = self.index[step], self._role(step, "x"), self._role(step, "image")
        pool = _ops.max_pool_out.default

        def run(env: list) -> None:
            between = env[image]
            for source, out in zip(env[x].split(1), env[number].split(1), strict=True):
                convolve(source, None, None, between)
                pool(between, *window, out)

        return run

    def _depthwise_native(self, step: Node) -> Step:
        problem, a = step.attrs["problem"], step.attrs
        bn = None if a["scale"] is None else BatchNormParams(a["scale"], a["shift"])
        packed, vectors = self._cache(step).get(
            "depthwise", [a["weight"]], lambda: depthwise_native.pack(a["weight"], a["bias"], bn)
        )
        options = (problem.R, problem.stride[0], *problem.padding, ACTIVATIONS.index(problem.act))
        number, x = self.index[step], self.index[step.inputs[0]]
        sums = self._sums(step)
        convolve = _ops.depthwise_conv_bn_act_native.default

        def run(env: list) -> None:
            convolve(env[x], packed, vectors, *options, env[number].permute(0, 2, 3, 1), env[sums])

        return run

    def _depthwise(self, step: Node) -> Step:
        problem, a, cache = step.attrs["problem"], step.attrs, self._cache(step)
        bn = None if a["scale"] is None else BatchNormParams(a["scale"], a["shift"])
        sums, (x,) = self._sums(step), self._inputs(step)

        def compute(env: list) -> Tensor:
            y = functional.depthwise_conv_bn_act(
                env[x], a["weight"], a["bias"], bn, stride=problem.stride, padding=problem.padding,
                dilation=problem.dilation, act=problem.act, squeeze=problem.squeeze, cache=cache,
            )  # fmt: skip
            if problem.squeeze:
                y, env[sums] = y
            return y

        return self._computed(step, compute)

    def _sums(self, step: Node) -> int:
        """The number of the depthwise convolution's sums, or of what is always None."""
        for other, number in self.index.items():
            if other.op == "sums" and other.inputs[0] is step:
                return number
        return len(self.index)

    def _affine_native(self, step: Node) -> Step:
        vectors = (step.attrs["scale"], step.attrs["shift"], None, None, 0.0, step.attrs["relu"])
        number, (x,) = self.index[step], self._inputs(step)
        write = _ops.dense_concat.default

        def run(env: list) -> None:
            write(env[number], env[x], 0, *vectors)

        return run

    def _affine(self, step: Node) -> Step:
        bn = BatchNormParams(step.attrs["scale"], step.attrs["shift"])
        number, (x,) = self.index[step], self._inputs(step)
        relu = step.attrs["relu"]

        def run(env: list) -> None:
            functional.dense_concat(env[number], env[x], 0, bn, relu)

        return run

    def _copy_native(self, step: Node) -> Step:
        number, (x,) = self.index[step], self._inputs(step)
        write = _ops.dense_concat.default

        def run(env: list) -> None:
            write(env[number], env[x], 0, *affine.NO_VECTORS, False)

        return run

    def _copy(self, step: Node) -> Step:
        number, (x,) = self.index[step], self._inputs(step)

        def run(env: list) -> None:
            env[number].copy_(env[x])

        return run

    def _max_pool_native(self, step: Node) -> Step:
        window, number, (x,) = step.attrs["window"], self.index[step], self._inputs(step)
        write = _ops.max_pool_out.default

        def run(env: list) -> None:
            write(env[x], *window, env[number])

        return run

    def _max_pool(self, step: Node) -> Step:
        window, number, (x,) = step.attrs["window"], self.index[step], self._inputs(step)

        def run(env: list) -> None:
            functional.max_pool(env[x], *window, out=env[number])

        return run

    def _avg_pool_native(self, step: Node) -> Step:
        number, (x,) = self.index[step], self._inputs(step)
        arguments, vectors = self._average(step), affine.NO_VECTORS
        if (norm := step.attrs["input_affine"]) is not None:
            vectors = (*norm, None, None, 0.0)
        write = _ops.avg_pool_out.default

        def run(env: list) -> None:
            write(env[x], *arguments, *vectors, env[number])

        return run

    def _avg_pool(self, step: Node) -> Step:
        number, (x,) = self.index[step], self._inputs(step)
        arguments, norm = self._average(step), step.attrs["input_affine"]
        bn = None if norm is None else BatchNormParams(*norm)

        def run(env: list) -> None:
            functional.avg_pool(env[x], *arguments, input_bn=bn, out=env[number])

        return run

    def _average(self, step: Node) -> tuple:
        """The window's options in the order of avg_pool's."""
        if step.op == "mean":
            size = self.memory.lowered.values[step.inputs[0]].shape[2:]
            return (size, size, (0, 0), False, True, None)
        kernel_size, stride, padding, _, ceil_mode = step.attrs["window"]
        options = (step.attrs["count_include_pad"], step.attrs["divisor"])
        return (kernel_size, stride, padding, ceil_mode, *options)

    def _mean_native(self, step: Node) -> Step:
        if step.attrs["input_affine"] is not None:
            return self._avg_pool_native(step)
        (x,) = self._inputs(step)
        shape = self.memory.lowered.values[step].shape
        squeeze = _ops.squeeze_native.default
        return self._computed(step, lambda env: squeeze(env[x]).view(shape))

    def _mean(self, step: Node) -> Step:
        if step.attrs["input_affine"] is not None:
            return self._avg_pool(step)
        (x,) = self._inputs(step)
        return self._computed(step, lambda env: env[x].mean((2, 3), keepdim=True))

    def _se_native(self, step: Node) -> Step:
        number, out = self._place(step)
        x, residual = (self._role(step, name) for name in ("x", "residual"))
        layers, acts = self._layers(step), (ACTS[step.attrs["act"]], ACTS[step.attrs["out_act"]])
        write = _ops.squeeze_excite_native_out.default

        def run(env: list) -> None:
            y = env[out]
            write(env[x], *layers, acts[0], env[residual], acts[1], y)
            env[number] = y

        return run

    def _se(self, step: Node) -> Step:
        number, out = self._place(step)
        x, residual = (self._role(step, name) for name in ("x", "residual"))
        layers, acts = self._layers(step), (step.attrs["act"], step.attrs["out_act"])

        def run(env: list) -> None:
            y = env[out]
            functional.squeeze_excite(env[x], *layers, acts[0], env[residual], acts[1], out=y)
            env[number] = y

        return run

    def _layers(self, step: Node) -> tuple:
        """The two layers, as matrices."""
        a = step.attrs
        return (a["weight1"].flatten(1), a["bias1"], a["weight2"].flatten(1), a["bias2"])

    def _excite_native(self, step: Node) -> Step:
        sums, layers = self._inputs(step)[0], self._layers(step)
        options = (ACTS[step.attrs["act"]], step.attrs["sigmoid"], step.attrs["count"])
        excite = _ops.excite_native.default
        return self._computed(step, lambda env: excite(env[sums], *layers, *options))

    def _excite(self, step: Node) -> Step:
        sums, layers, a = self._inputs(step)[0], self._layers(step), step.attrs
        sigmoid, count = a["sigmoid"], a["count"]
        return self._computed(
            step,
            lambda env: functional.excite(
                env[sums], *layers, a["act"], sigmoid=sigmoid, count=count
            ),
        )

    def _scale_native(self, step: Node) -> Step:
        (number, out), (x, gate) = self._place(step), self._inputs(step)
        write = _ops.se_scale_native_out.default

        def run(env: list) -> None:
            y = env[out]
            write(env[x], env[gate], None, 0, y)
            env[number] = y

        return run

    def _scale(self, step: Node) -> Step:
        (number, out), (x, gate) = self._place(step), self._inputs(step)

        def run(env: list) -> None:
            env[number] = functional.se_scale(env[x], env[gate], out=env[out])

        return run

    def _act(self, step: Node) -> Step:
        activate, (x,) = _ACT_FUNCTIONS[step.attrs["act"]], self._inputs(step)
        return self._computed(step, lambda env: activate(env[x]))

    def _add(self, step: Node) -> Step:
        a, b = self._inputs(step)
        return self._computed(step, lambda env: env[a] + env[b])

    def _mul(self, step: Node) -> Step:
        a, b = self._inputs(step)
        return self._computed(step, lambda env: env[a] * env[b])

    def _concat(self, step: Node) -> Step:
        parts = self._inputs(step)
        return self._computed(step, lambda env: torch.cat([env[part] for part in parts], 1))

    def _linear(self, step: Node) -> Step:
        (x,), weight, bias = self._inputs(step), step.attrs["weight"], step.attrs["bias"]
        return self._computed(step, lambda env: F.linear(env[x], weight, bias))

    def _part(self, step: Node) -> Step:
        number, (x,), start = self.index[step], self._inputs(step), step.attrs["start"]
        stop = start + step.attrs["channels"]

        def run(env: list) -> None:
            env[number] = env[x][:, start:stop]

        return run

    def _flatten(self, step: Node) -> Step:
        (x,) = self._inputs(step)
        return self._computed(step, lambda env: env[x].flatten(1))

    def _call(self, step: Node) -> Step:
        inputs, function = self._inputs(step), call(step)
        return self._computed(step, lambda env: function([env[source] for source in inputs]))
