"""What a call runs in beside its arguments: instruction sets, threads, PyTorch's defaults."""

import contextlib

import pytest
import torch

from cvkernels import extension


def each_instruction_set(*names):
    """A fixture: the compiled ops limited to each of these sets that the processor has."""

    @pytest.fixture(params=names)
    def instruction_set(request):
        if request.param not in extension.instruction_sets():
            pytest.skip(f"the processor has no {request.param}")
        with extension.limited_to(request.param):
            yield request.param

    return instruction_set


def assert_bits_do_not_depend_on_threads(run):
    """``run()`` gives the same tensors on any number of threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(list(run()))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@contextlib.contextmanager
def other_defaults():
    """Tensors are made without memory, and floats in float64, unless told otherwise."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
