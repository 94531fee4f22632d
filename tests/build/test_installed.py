"""What an installed package does everywhere: each op, and a network of each family in each state.

`.ci/matrix` runs it under every Python and torch, with and without the compiled part; the reference
is plain PyTorch there as here.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cvkernels
from cvkernels import backend, extension
from tests.support.cases.every_op import PLANNED, calls_on
from tests.support.numerics import assert_all_close_as_eager

pytestmark = pytest.mark.fast

FAMILIES = {
    "densenet": cvkernels.models.densenet121,
    "efficientnet": cvkernels.models.efficientnet_b0,
    "googlenet": lambda **options: cvkernels.models.googlenet(aux_logits=False, **options),
    "resnet": cvkernels.models.resnet18,
    "senet": cvkernels.models.seresnet50,
}
# How much larger the largest error of sixteen logits may be: of so few it is half chance.
CHANCE = 4.0


@pytest.fixture(scope="module", params=FAMILIES)
def network(request):
    torch.manual_seed(0)
    model = FAMILIES[request.param](num_classes=4).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model, torch.randn(4, 3, 64, 64)


def references(model, x):
    """By plain PyTorch, in float32 and in float64."""
    with backend.use("reference"), torch.no_grad():
        return model(x), copy.deepcopy(model).double()(x.double())


@pytest.mark.parametrize("op", PLANNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op(op, dtype, memory_format):
    x = torch.randn(2, 8, 7, 5).to(dtype).contiguous(memory_format=memory_format)
    call = calls_on(x)[op]
    eager, actual = call(backend="reference"), call()
    outputs = [value if isinstance(value, tuple) else (value,) for value in (actual, eager)]
    for ours, theirs in zip(*outputs, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


def test_compiled_ops_are_taken_where_they_are_installed():
    call = calls_on(torch.randn(2, 8, 7, 5))["max_pool"]
    assert call.plan().backend == ("native" if extension.has("cpu") else "reference")


def test_live_network_follows_its_weights(network):
    model, x = network
    model = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        next(model.parameters()).mul_(-0.5)  # a tensor changes, then a dict of a module
        written = model(x)
        norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        norm.weight = nn.Parameter(norm.weight * -1)
        assert not torch.equal(before, written) and not torch.equal(written, model(x))
        assert_all_close_as_eager(model(x), *references(model, x), CHANCE)


def test_frozen_network_is_saved_and_loaded(network, tmp_path):
    model, x = network
    frozen = cvkernels.freeze(model, x)
    assert_all_close_as_eager(frozen(x), *references(model, x), CHANCE)
    frozen.save(tmp_path / "frozen.cvk")
    assert torch.equal(cvkernels.load_frozen(tmp_path / "frozen.cvk")(x), frozen(x))


def test_gradients_as_by_plain_pytorch(network):
    model, x = network
    target = torch.arange(len(x)) % 4

    def gradients(chosen):
        trained = copy.deepcopy(model).train()
        torch.manual_seed(1)  # of dropout
        with backend.use(chosen):
            F.cross_entropy(trained(x), target).backward()
        return torch.cat([parameter.grad.flatten() for parameter in trained.parameters()])

    expected = gradients("reference")
    # One activation near 0 that rounds to the other side moves them by half a hundredth.
    assert (gradients("auto") - expected).norm() <= 0.02 * expected.norm()
