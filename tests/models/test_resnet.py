import pytest
import torch

import cvkernels
from tests.support.model_checks import (
    twins,
)
from tests.support.numerics import assert_matches_module
from tests.support.pairs import image

pytest.importorskip("torchvision")


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


def test_deprecated_arguments_still_work():
    with pytest.warns(UserWarning, match="'pretrained' is deprecated"):
        cvkernels.models.resnet18(pretrained=False)
    with pytest.warns(UserWarning, match="positional"):
        cvkernels.models.resnet18(None, False)
    with pytest.raises(TypeError, match="multiple values for argument 'weights'"):
        cvkernels.models.resnet18(None, weights=None)
