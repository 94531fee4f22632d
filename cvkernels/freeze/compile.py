"""Compiles all Triton kernels of a plan in parallel, before its first call."""

from __future__ import annotations

import functools

from cvkernels.freeze.plan import Plan
from cvkernels.freeze.progress import progress


def compile_launches(plan: Plan) -> int:
    """Compile the plan's Triton kernels, on CUDA also load them; how many distinct ones it has.

    Raises:
        RuntimeError: one does not compile; the message names its layer.
    """
    launched = plan.launches()
    if not launched:
        return 0
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.common.triton_compile import compile_all

    device = plan.device if plan.on_cuda else None
    return compile_all(launched, device, functools.partial(progress, "compile"))
