"""Initialisers that look for classes by name find in ours what they find in stock."""

import pytest
import torch
from torch import nn

import cvkernels
from tests.support.model_checks import builders, counterpart

SUBSTRINGS = ("Conv", "BatchNorm", "Norm", "Linear")


def found(model):
    """For each module, in order: its name, what its class name contains, its own parameters."""
    return [
        (
            name,
            [part for part in SUBSTRINGS if type(module).__name__.find(part) != -1],
            [own for own in ("weight", "bias") if getattr(module, own, None) is not None],
        )
        for name, module in model.named_modules()
    ]


def options_of(name):
    return {"init_weights": False} if name == "googlenet" else {}


@pytest.mark.parametrize("name", cvkernels.list_models())
def test_every_network(name):
    with torch.device("meta"):
        ours, stock = (builder(**options_of(name)) for builder in builders(name))
    expected = found(stock)
    assert found(ours) == expected
    cvkernels.patch(stock)
    assert found(stock) == expected


def weights_init(module):
    """As in PyTorch's DCGAN example."""
    name = module.__class__.__name__
    if name.find("Conv") != -1:
        nn.init.normal_(module.weight.data, 0.0, 0.02)
    elif name.find("BatchNorm") != -1:
        nn.init.normal_(module.weight.data, 1.0, 0.02)
        nn.init.constant_(module.bias.data, 0)


def guarded_init(module):
    name = module.__class__.__name__
    if "Conv" in name and getattr(module, "weight", None) is not None:
        nn.init.kaiming_uniform_(module.weight)
    if "Norm" in name and hasattr(module, "weight") and hasattr(module, "bias"):
        nn.init.uniform_(module.weight, 0.5, 1.5)
    if "Linear" in name:
        nn.init.xavier_uniform_(module.weight)


def outcome(model, initialise):
    """The state and the next random number, behind what the initialiser raised."""
    torch.manual_seed(5)
    try:
        model.apply(initialise)
        raised = ""
    except AttributeError as error:
        raised = str(error)
    return raised, model.state_dict(), torch.rand(1)


@pytest.mark.parametrize("initialise", [weights_init, guarded_init])
@pytest.mark.parametrize("how", ["drop_in", "patched"])
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "efficientnet_b0"])
def test_initialisers_draw_the_same_numbers(name, how, initialise):
    """Stock's GoogLeNet and EfficientNet have "Conv" in names of modules without a weight."""
    stock = builders(name)[1](**options_of(name)).eval()
    ours = counterpart(stock, name, how, **options_of(name))
    (raised, state, drawn), (stock_raised, stock_state, stock_drawn) = (
        outcome(model, initialise) for model in (ours, stock)
    )
    assert raised == stock_raised
    assert bool(raised) == (initialise is weights_init and name in ("googlenet", "efficientnet_b0"))
    assert torch.equal(drawn, stock_drawn)
    assert all(torch.equal(state[key], value) for key, value in stock_state.items())
