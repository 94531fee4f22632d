import copy

import pytest
import torch
from torch import nn

import cvkernels
from tests.support.model_checks import (
    assert_eval_is_pure,
    assert_same_state,
    fresh_twins,
    twins,
)
from tests.support.numerics import assert_matches_module
from tests.support.pairs import image, seen

pytest.importorskip("torchvision")

# One of every kind of block; test_every_builder has the outputs of all.
BLOCKS = ["resnet18", "resnet50", "resnext50_32x4d"]


@pytest.mark.parametrize("name", BLOCKS)
def test_eval_output_and_input_gradient_match_stock(name, device):
    assert_eval_is_pure(*twins(name, device), seen(2, device), in_float32=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_train_output_and_input_gradient_match_stock(name, device):
    ours, stock = (model.train() for model in twins(name, device))
    exact, x = copy.deepcopy(stock).double(), image(4, device=device)
    assert_matches_module(ours, stock, x)
    exact(x.double())
    moved = []
    for key, value in stock.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            moved.append([model.state_dict()[key].double() for model in (ours, stock, exact)])
        else:
            assert torch.equal(ours.state_dict()[key], value), key
    # All together: what one deep channel errs by is a matter of luck.
    actual, eager, truth = (torch.cat(parts) for parts in zip(*moved, strict=True))
    assert (actual - truth).norm() <= 2 * (eager - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_classes": 7},
        {"zero_init_residual": True},
        {"replace_stride_with_dilation": [False, True, True]},
        {"norm_layer": lambda c: nn.GroupNorm(8, c)},
        {"groups": 4, "width_per_group": 16},
    ],
    ids=["num_classes", "zero_init", "dilated", "group_norm", "groups"],
)
def test_keyword_arguments_match_stock(kwargs):
    ours, stock = fresh_twins("resnet50", **kwargs)
    assert_same_state(ours, stock)
    x = image(2)
    assert_matches_module(ours.eval(), stock.eval(), x, grad=False)


def test_jit_script_is_refused_with_the_way_out():
    with pytest.raises(NotImplementedError, match="use torch.export or torch.jit.trace"):
        torch.jit.script(cvkernels.models.resnet18())


def test_train_drops_derived_weights():
    ours, _ = twins("resnet18")
    with torch.no_grad():
        ours.eval()(image())
        assert "_derived" in ours.layer1[0].__dict__
        ours.layer1[0].conv1.weight.data.mul_(0)
    ours.train()
    assert not any("_derived" in module.__dict__ for module in ours.modules())


def test_frozen_parameters_and_threads_do_not_matter():
    ours, stock = (model.requires_grad_(False) for model in twins("resnet18"))
    x = image(2)
    assert_matches_module(ours, stock, x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert_matches_module(ours, stock, x)
    finally:
        torch.set_num_threads(threads)


# Builders


def test_a_wrong_name_suggests_a_right_one():
    with pytest.raises(ValueError, match="Unknown model resnet17; did you mean .*resnet18"):
        cvkernels.create_model("resnet17")


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"groups": 2}, ValueError),
        ({"replace_stride_with_dilation": [True, False, False]}, NotImplementedError),
    ],
    ids=["groups", "dilation"],
)
def test_basic_block_refuses_what_it_cannot(kwargs, error):
    with pytest.raises(error):
        cvkernels.models.resnet18(**kwargs)


def test_deprecated_arguments_still_work():
    with pytest.warns(UserWarning, match="'pretrained' is deprecated"):
        cvkernels.models.resnet18(pretrained=False)
    with pytest.warns(UserWarning, match="positional"):
        cvkernels.models.resnet18(None, False)
    with pytest.raises(TypeError, match="multiple values for argument 'weights'"):
        cvkernels.models.resnet18(None, weights=None)
