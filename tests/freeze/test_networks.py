"""freeze: the networks of each family, ours, stock and patched; and ops of other models."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import cvkernels
from tests.support.model_checks import calibrated, twins
from tests.support.numerics import assert_matches_module
from tests.support.pairs import image

OURS = ("resnet18", "googlenet", "densenet121", "seresnet18", "legacy_seresnet18")
TORCHVISION = ("resnet18", "googlenet", "densenet121", "efficientnet_b0")
TIMM = ("seresnet18", "densenet121", "efficientnet_b0")


def options(name):
    return {"init_weights": False, "transform_input": True} if name == "googlenet" else {}


@pytest.mark.parametrize("name", OURS)
def test_our_networks(name, device):
    model = calibrated(getattr(cvkernels.models, name), num_classes=10, **options(name))
    model.to(device)
    frozen = cvkernels.freeze(model, image(2, device=device))
    with cvkernels.backend.use("reference"):
        assert_matches_module(frozen, model, image(2, device=device), grad=False)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_and_patched_ones(name, device):
    models = pytest.importorskip("torchvision").models
    model = calibrated(getattr(models, name), num_classes=10, **options(name)).to(device)
    x = image(2, device=device)
    assert_matches_module(cvkernels.freeze(model, x), model, x, grad=False)
    stock = copy.deepcopy(model)
    cvkernels.patch(model)
    assert_matches_module(cvkernels.freeze(model, x), stock, x, grad=False)


@pytest.mark.parametrize("name", TIMM)
def test_timms_networks(name, device):
    timm = pytest.importorskip("timm")
    model = calibrated(timm.create_model, model_name=name, num_classes=10).to(device)
    x = image(2, device=device)
    frozen = cvkernels.freeze(model, x)
    assert_matches_module(frozen, model, x, grad=False)
    assert not [node for node in frozen.graph.nodes if node.op.name == "call"]


class Pair(NamedTuple):
    mean: Tensor
    features: Tensor


class Branches(nn.Module):
    """Concatenations, additions and in-place ops that no network of ours has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2, padding=1, count_include_pad=False)

    def forward(self, x):
        a = self.conv(x)
        b = a + 1
        self.relu(a)  # what follows reads the result
        c = torch.cat([a, self.other(a), a, b, x], 1)
        d = torch.cat([c, b.sigmoid()], 1)
        gated = b * a.mean((2, 3), keepdim=True)
        e = self.pool(torch.cat([d, gated + self.other(b)], 1))
        return Pair(e.mean((-2, -1)), torch.cat([e, e], 1))


def test_branches_and_in_place_ops():
    model = Branches().eval()
    x = image(2, size=9)
    before = x.clone()
    frozen = cvkernels.freeze(model, x)
    assert cvkernels.verify(frozen).ok and cvkernels.verify(frozen, image(3, size=12)).ok
    assert type(frozen(x)) is Pair and torch.equal(x, before)
    with torch.no_grad():
        kept = frozen(x)
        copied = [part.clone() for part in kept]
        frozen(image(2, size=9))
    assert all(map(torch.equal, kept, copied)), "a later call wrote into an earlier result"


def test_means_over_other_axes_are_calls():
    class Means(nn.Module):
        def forward(self, x):
            return x.mean(1), x.mean((1, 2)), x.mean()

    assert cvkernels.verify(cvkernels.freeze(Means().eval(), image(2))).ok


def test_children_that_cannot_be_traced_or_are_watched_run_as_they_are():
    class Sorting(nn.Module):
        def forward(self, x):
            return x.flip(1) if x.sum() > 0 else x

    seen = []
    model = nn.Sequential(calibrated(cvkernels.models.resnet18, num_classes=10), Sorting()).eval()
    model[0].layer1[0].conv1.register_forward_hook(lambda *args: seen.append(1))
    x = image(2)
    frozen = cvkernels.freeze(model, x)
    count = len(seen)
    assert_matches_module(frozen, model, x, grad=False)
    assert len(seen) > count
    # The hook may write the convolution's input, which the shortcut reads: it gets a copy.
    layers = {row.layer for row in frozen.report().rows if row.note == "called as it is"}
    assert layers == {"0.layer1.0.conv1", "1"}


def test_ours_and_stock_are_captured_alike():
    ours, stock = twins("resnet18")
    x = image(2)
    frozen = [cvkernels.freeze(model.eval(), x) for model in (ours, stock)]
    ops = [sorted((node.op.name, node.layer) for node in one.graph.nodes) for one in frozen]
    assert ops[0] == ops[1]
    assert torch.equal(frozen[0](x), frozen[1](x))
