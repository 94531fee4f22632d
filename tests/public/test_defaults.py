"""PyTorch's default device and dtype are those of new tensors, and not of what networks compute."""

import copy

import pytest
import torch

import cvkernels
from tests.support.pairs import assert_equal
from tests.support.training_nets import BLOCKS, image, training_pair


@pytest.fixture
def with_other_defaults():
    """Calls a function where tensors are made without memory, and floats in float64."""

    def run(function, *args):
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                return function(*args)
        finally:
            torch.set_default_dtype(torch.float32)

    return run


def results(model, x):
    """Of a training step, in evaluation, and frozen."""
    y = model.train()(x)
    grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    model.eval()
    with torch.no_grad():
        return [y.detach(), *grads, model(x), cvkernels.freeze(model, x)(x)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_they_do_not_matter(name, layout, with_other_defaults):
    model = training_pair(name, torch.float32)[0]
    x = image(name, torch.float32).contiguous(memory_format=layout)
    found = with_other_defaults(results, copy.deepcopy(model), x)
    assert all(t.device == x.device and t.dtype == x.dtype for t in found)
    assert_equal(found, results(model, x), 0)
