"""Every builder's outputs and input gradients, in eval and training, are its stock counterpart's.

In float64, where a rounding is too small for any depth to amplify. The fused float32 paths are
compared by the families' own tests and by test_patch.
"""

import pytest
import torch
from model_checks import Concatenated, calibrate

import cvkernels

# The compound rule at any point has no stock builder.
BUILDERS = [name for name in cvkernels.list_models() if name != "efficientnet"]


def stock_builder(name):
    models = pytest.importorskip("torchvision").models
    if hasattr(models, name):
        return getattr(models, name)
    return getattr(pytest.importorskip("timm").models, name)


def output_and_gradient(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    out = Concatenated(model)(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_and_input_gradients_are_the_stock_models(name):
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    stock = stock_builder(name)(num_classes=10, **kwargs)
    calibrate(stock)
    with torch.device("meta"):
        ours = cvkernels.create_model(name, num_classes=10, **kwargs)
    ours.to_empty(device="cpu").load_state_dict(stock.state_dict())
    ours, stock = (model.double().requires_grad_(False) for model in (ours, stock))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for train, images in ((False, x[:1]), (True, x)):
        results = [output_and_gradient(model.train(train), images) for model in (ours, stock)]
        for actual, expected in zip(*results, strict=True):
            assert expected.abs().max() > 0
            assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    for key, value in stock.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], value, rtol=1e-6, atol=1e-9), key
