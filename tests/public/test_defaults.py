"""PyTorch's default device and dtype are those of new tensors, and not of what networks compute."""

import copy

import pytest
import torch

import cvkernels
from tests.support.pairs import assert_equal
from tests.support.surroundings import other_defaults
from tests.support.training_nets import BLOCKS, image, training_pair


def results(model, x):
    """Of a training step, in evaluation, and frozen."""
    y = model.train()(x)
    grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    model.eval()
    with torch.no_grad():
        return [y.detach(), *grads, model(x), cvkernels.freeze(model, x)(x)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_they_do_not_matter(name, layout):
    model = training_pair(name, torch.float32)[0]
    x = image(name, torch.float32).contiguous(memory_format=layout)
    with other_defaults():
        found = results(copy.deepcopy(model), x)
    assert all(t.device == x.device and t.dtype == x.dtype for t in found)
    assert_equal(found, results(model, x), 0)
