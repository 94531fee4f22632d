"""Every builder computes what its stock counterpart does.

In eval, float32 and fused; and, but for the largest networks, in float64, where a rounding is too
small for any depth to amplify: outputs and input gradients in eval and training, and statistics.
The largest repeat the blocks of others. The rule of the tolerance, and the
gradients of parameters, are the families' own tests', on one network of each kind of block.
"""

import pytest
import torch

import cvkernels
from tests.support.model_checks import Concatenated, builders
from tests.support.pairs import calibrated_pair, seen

# The compound rule at any point has no stock builder.
BUILDERS = [name for name in cvkernels.list_models() if name != "efficientnet"]
LARGE = 26_000_000  # parameters


def output_and_gradient(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    out = Concatenated(model)(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), x.grad


@pytest.mark.few(3)
@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_and_input_gradients_are_the_stock_models(name, monkeypatch):
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    stock = builders(name)[1](num_classes=10, **kwargs).requires_grad_(False)
    with torch.device("meta"):
        ours = cvkernels.create_model(name, num_classes=10, **kwargs).requires_grad_(False)
    ours, stock = calibrated_pair(ours.to_empty(device="cpu"), stock)
    with torch.no_grad():
        actual, expected = ours(seen()), stock(seen())
    # Of the largest output: the deepest networks amplify rounding beyond an absolute 1e-4.
    assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()
    if sum(parameter.numel() for parameter in stock.parameters()) > LARGE:
        return
    # From here on only PyTorch's own operations run, and filling memory takes a fifth of the time.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    ours, stock = (model.double() for model in (ours, stock))
    # Norms over two values amplify roundings: DenseNet's last maps are of one pixel at 48.
    size = 64 if "densenet" in name else 48
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for train, images in ((False, x[:1, :, :32, :32]), (True, x)):
        results = [output_and_gradient(model.train(train), images) for model in (ours, stock)]
        for actual, expected in zip(*results, strict=True):
            assert expected.abs().max() > 0
            assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    for key, value in stock.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], value, rtol=1e-6, atol=1e-9), key
