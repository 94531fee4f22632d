import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models import resnet18
from cvkernels.ops.conv_bn_act import native
from cvkernels.verify import rounding


@pytest.fixture
def model(device):
    return resnet18(num_classes=10).eval().to(device)


@pytest.fixture
def example(device):
    return torch.randn(3, 3, 64, 64, device=device)


def test_every_layer_and_the_output_are_compared(model, example):
    verification = cvkernels.verify(model, example)
    layers = [row.layer for row in verification.rows]
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert set(convolutions) | {"maxpool", "avgpool", "fc", "output"} == set(layers)
    assert verification.ok and verification.top1_agreement == 1.0
    assert all(0 < row.stock <= row.allowed for row in verification.rows)


def test_it_changes_nothing(model, example):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cvkernels.verify(model, example)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    from torch.nn.modules import module

    assert not module._global_forward_hooks


@pytest.mark.skipif(torch.cuda.is_available(), reason="breaks the CPU backend")
@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_kernel_fails_by_name(model, example, monkeypatch, wrong):
    fold = native.fold

    def damaged(weight, bias, bn, dtype):
        folded, shift = fold(weight, bias, bn, dtype)
        if weight is model.layer3[0].conv2.weight:
            shift = shift + wrong
        return folded, shift

    monkeypatch.setattr(native, "fold", damaged)
    verification = cvkernels.verify(model, example)
    failing = [row.layer for row in verification.rows if not row.ok]
    assert not verification.ok and failing[0] == "layer3.0.conv2"
    assert "FAILS" in str(verification)


def test_training_mode_and_meta_examples_are_refused(model, example):
    with pytest.raises(ValueError, match="call model.eval"):
        cvkernels.verify(model.train(), example)
    with pytest.raises(ValueError, match="holds no data"):
        cvkernels.verify(model.eval(), example.to("meta"))


@pytest.mark.parametrize(("precision", "expected"), [("tf32", 2.0**-10), ("ieee", 2.0**-23)])
def test_a_rounding_is_that_of_tf32_where_convolutions_may_compute_in_it(precision, expected):
    class OnGpu(torch.Tensor):
        is_cuda = True

    x, before = torch.ones(2), torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        assert rounding(x.as_subclass(OnGpu)) == expected
        assert rounding(x) == 2.0**-23
        assert rounding(x.bfloat16().as_subclass(OnGpu)) == 2.0**-7
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
