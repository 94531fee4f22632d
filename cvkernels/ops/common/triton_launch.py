"""Launches of Triton kernels that are planned once and then cost the host little.

Triton's ``kernel[grid](...)`` looks at every argument of every call to find the compiled kernel for
it. A :class:`Launch` knows what is fixed, looks at the rest alone, and calls the launcher of the
compiled kernel that Triton returned before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from cvkernels.ops.common import triton_cache, triton_fence
from cvkernels.ops.common.launches import Launched, collected
from cvkernels.ops.common.norm import BatchNormParams

# Parameters of NVIDIA's launcher of compiled kernels, from Triton 3.6 on: some versions name the
# four in the middle, others take them along with the kernel's own arguments.
_FIRST = ["gridX", "gridY", "gridZ", "stream", "function"]
_MIDDLE = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]


INTERPRETED = bool(knobs.runtime.interpret)
triton_fence.install()
if not INTERPRETED:
    triton_cache.install()


def activation(act: str, dtype: torch.dtype) -> str:
    """How a kernel computes ``act`` for an output of ``dtype``, which it rounds to.

    SiLU is "silu_tanh" for bfloat16, by an instruction for tanh that errs by 2^-11: up to
    2^-12 |y|, a quarter of what rounding y to bfloat16 costs. float16 has no room for that:
    "silu_exp2" errs by 2^-21. "silu" is as exact as float32; it is the interpreter's, too, which
    has no such instructions.
    """
    if act != "silu" or INTERPRETED:
        return act
    return {torch.bfloat16: "silu_tanh", torch.float16: "silu_exp2"}.get(dtype, act)


def has_dependent_launch(capability: tuple[int, int]) -> bool:
    """Whether kernels may start while the launch before them ends (programmatic dependent launch).

    GPUs can from compute capability 9.0 on; the interpreter has no such thing.
    """
    return capability >= (9, 0) and not INTERPRETED


def norm_operands(bn: BatchNormParams | None) -> tuple[Tensor | float | None, ...]:
    """The five operands that a kernel takes for a batch norm, or for none."""
    return (None, None, None, None, 0.0) if bn is None else (*bn[:4], float(bn.eps))


class _Compiled(NamedTuple):
    """A compiled kernel, loaded on a device, and what its launcher takes."""

    run: Callable[..., None] | None  # None: not a launcher that this file knows
    function: Any
    metadata: Any
    launch_metadata: Callable[..., Any]
    device_cache: Any  # Triton's own of the device: the kernel is dropped with it


class Launch:
    """``kernel[grid](*operands, *fixed, **meta)`` of operands that each call gives.

    The operands are the kernel's first parameters: tensors, floats and None, the first one a tensor
    on the device to launch on. ``fixed`` are the sizes and strides that follow them; ``meta`` are
    the constants, which come last, and Triton's options. An empty grid launches nothing.

    A kernel is compiled for its operands' dtypes, for which of them are None, and for which start
    at multiples of 16 bytes. The first call of a kind on a device goes through Triton, and so does
    every call under its interpreter or with a launcher that this file does not know; the others
    call the compiled kernel's launcher. Of Triton's settings they follow its launch hooks alone.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], fixed: tuple, meta: dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.fixed, self.meta = kernel, grid, fixed, meta
        triton_fence.kernels.add(kernel.__name__)
        self._empty = 0 in grid
        self._grid = (*grid, 1, 1)[:3]
        constants = tuple(meta[name] for name in kernel.arg_names if name in meta)
        self._last = (*fixed, *constants)
        # The interpreter's kernels have no such cache.
        self._device_caches: Any = getattr(kernel, "device_caches", None)
        self._compiled: dict[tuple, _Compiled | None] = {}

    def warmup(self, *operands: Tensor | float | None) -> Any:
        """The kernel that Triton compiles for operands, which may be on the meta device."""
        return self.kernel.warmup(*operands, *self.fixed, grid=self.grid, **self.meta)

    def __call__(self, *operands: Tensor | float | None) -> None:
        if self._empty:
            return
        if collected.found is not None:
            collected.found.append(Launched(self, operands))
            return
        if self._device_caches is None:
            self._by_triton(operands)
            return
        device = operands[0].get_device()  # type: ignore[union-attr]
        if device == driver.active.get_current_device():
            self._launch(device, operands)
        else:
            with torch.cuda.device(device):
                self._launch(device, operands)

    def _launch(self, device: int, operands: tuple) -> None:
        # comprehensions: they take half the time of one loop that appends
        values = [o if o is None or o.__class__ is float else o.data_ptr() for o in operands]
        kinds = [o.__class__ if o is None or o.__class__ is float else o.dtype for o in operands]
        ends = 0
        for value in values:
            if value.__class__ is int:
                ends |= value
        if ends & 15:
            kinds += [value.__class__ is int and value & 15 == 0 for value in values]
        kind = (device, *kinds)
        compiled = self._compiled.get(kind)
        device_cache = self._device_caches.get(device)
        if compiled is None or compiled.device_cache is not device_cache:
            returned = self._by_triton(operands)
            self._compiled[kind] = _known(returned, self._device_caches[device])
            return
        run, function, metadata, launch_metadata, _ = compiled
        if run is None or self.kernel.pre_run_hooks:
            self._by_triton(operands)
            return
        stream = driver.active.get_current_stream(device)
        runtime = knobs.runtime
        before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
        about = None
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            about = launch_metadata(self.grid, stream, *operands, *self._last)
        else:
            before = after = None
        run(*self._grid, stream, function, metadata, about, before, after, *values, *self._last)

    def _by_triton(self, operands: tuple) -> Any:
        return self.kernel[self.grid](*operands, *self.fixed, **self.meta)


def _known(compiled: Any, device_cache: Any) -> _Compiled:
    """What to launch the kernel with that Triton returned, by the names its launcher gives."""
    parts: list[Any] = [
        getattr(compiled, name, None)
        for name in ("function", "packed_metadata", "metadata", "launch_metadata", "run")
    ]
    function, packed, metadata, launch_metadata, run = parts
    # Kernels for other targets are specialised on more than alignment.
    if run is not None and metadata.target.backend == "cuda":
        *names, last = inspect.signature(run).parameters
        if names not in (_FIRST, _FIRST + _MIDDLE) or last != "args":
            run = None
    else:
        run = None
    return _Compiled(run, function, packed, launch_metadata, device_cache)
