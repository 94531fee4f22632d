"""What torchvision's own model tests check, for our builders and for patched stock models."""

import copy

import pytest
import torch
from torch import nn

import cvkernels
from tests.support.pairs import calibrated_pair, seen

torchvision = pytest.importorskip("torchvision")
models = torchvision.models

NETWORKS = ["googlenet", "resnet18", "resnet50", "densenet121", "efficientnet_b0"]


def twins(name, how, **kwargs):
    """(a network of ours, the stock one), of one state with norms that have seen data."""
    kwargs = {"num_classes": 50} | kwargs
    if name == "googlenet":
        kwargs |= {"init_weights": False}
    torch.manual_seed(0)
    stock = models.get_model(name, **kwargs)
    if how == "patched":
        ours = copy.deepcopy(stock)
        cvkernels.patch(ours)
    else:
        ours = cvkernels.create_model(name, **kwargs)
    ours, stock = calibrated_pair(ours, stock)
    return ours.eval(), stock.eval()


def close(actual, expected, tolerance):
    return torch.allclose(actual, expected, atol=tolerance, rtol=tolerance)


how = pytest.mark.parametrize("how", ["builder", "patched"])
name = pytest.mark.parametrize("name", NETWORKS)


@how
@name
def test_output_fx_autocast_and_backward_to_the_input(name, how):
    ours, stock = twins(name, how)
    x = seen().requires_grad_()
    out = ours(x)
    assert out.shape == (1, 50)
    assert close(out, stock(x), 1e-3)
    assert close(torch.fx.symbolic_trace(ours)(x), out, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        error, stocks = ((model(x).float() - out).abs().max() for model in (ours, stock))
    assert error <= max(0.1, 2 * stocks)
    out.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


@how
@pytest.mark.parametrize("dilate", [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
def test_dilated_resnet(dilate, how):
    dilate = [bool(d) for d in dilate]
    ours, _ = twins("resnet50", how, replace_stride_with_dilation=dilate)
    ours.avgpool, ours.fc = nn.Identity(), nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = ours(x)
    assert features.shape == (1, 2048 * (2 * 2 ** sum(dilate)) ** 2)


@how
def test_memory_efficient_densenet(how):
    efficient, _ = twins("densenet121", how, memory_efficient=True)
    plain, _ = twins("densenet121", how)
    x = seen()
    (out := efficient(x)).sum().backward()
    assert all(p.grad is not None for p in efficient.parameters())
    plain.load_state_dict(efficient.state_dict())
    (expected := plain(x)).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    assert close(out, expected, 1e-5)


@how
def test_googlenet_with_its_auxiliaries_removed_by_hand(how):
    ours, stock = twins("googlenet", how, transform_input=True)
    for model in (ours, stock):
        model.aux_logits = False
        model.aux1 = model.aux2 = None
    assert close(ours(seen()), stock(seen()), 1e-3)
    out = ours.train()(seen(2))
    assert isinstance(out, torch.Tensor) and out.shape == (2, 50)
