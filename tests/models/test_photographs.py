"""Trained weights and real images: lower precision recognises what float32 does."""

import copy

import pytest
import torch

import cvkernels
from tests.support.numerics import assert_close_as_eager
from tests.support.photographs import photographs, trained_network


@pytest.fixture(scope="module")
def network():
    return trained_network()


@pytest.fixture(scope="module")
def images():
    return photographs()


@pytest.fixture(scope="module")
def exact(network, images):
    with torch.no_grad():
        return copy.deepcopy(network).double()(images.double())


def test_the_network_knows_the_photographs(exact):
    """ImageNet's numbers of a tiger cat, espresso, a moped, a missile and a daisy."""
    expected = {282, 967, 665, 657, 985}
    assert expected <= set(exact[:8].argmax(1).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["frozen", "patched"])
def test_classes_and_errors(network, images, exact, how, dtype):
    """The classes are float64's where stock's own error cannot change them; the error of the
    logits is within the rule."""
    x = images.to(dtype)
    stock = copy.deepcopy(network).to(dtype)
    with torch.no_grad():
        eager = stock(x)
    if how == "frozen":
        ours = cvkernels.freeze(network, images, dtype=dtype)(images).to(dtype)
    else:
        cvkernels.patch(stock)
        with torch.no_grad():
            ours = stock(x)
    assert_close_as_eager(ours, eager, exact)
    first, second = exact.topk(2).values.unbind(1)
    certain = first - second > 2 * (eager.double() - exact).abs().amax(1)
    assert certain.sum() >= 8
    assert torch.equal(ours.argmax(1)[certain], exact.argmax(1)[certain])
