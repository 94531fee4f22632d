from functools import partial

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models import efficientnet
from cvkernels.models.registry import get_builder
from cvkernels.nn import FusedMBConvConfig, MBConv, MBConvConfig, SqueezeExcitation
from tests.support.model_checks import (
    assert_same_error,
    assert_same_output,
    assert_same_state,
    build,
    twins,
)
from tests.support.numerics import assert_matches_module
from tests.support.pairs import image, seen

torchvision = pytest.importorskip("torchvision")
stock_module = pytest.importorskip("torchvision.models.efficientnet")

# The weights' crop size, which the model carries.
RESOLUTIONS = {
    "efficientnet_b0": 224,
    "efficientnet_b1": 240,
    "efficientnet_b2": 288,
    "efficientnet_b3": 300,
    "efficientnet_b4": 380,
    "efficientnet_b5": 456,
    "efficientnet_b6": 528,
    "efficientnet_b7": 600,
    "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_l": 480,
}
SMALL = ["efficientnet_b0", "efficientnet_v2_s"]


# The networks


def test_stochastic_depth_draws_in_the_residual_blocks_alone():
    ours = build(cvkernels.models.efficientnet_b0, dropout=0.0).train()
    blocks = [m for m in ours.modules() if isinstance(m, MBConv)]
    drawing = [m for m in blocks if m.use_res_connect and m.stochastic_depth.p > 0]
    x = image(4)
    torch.manual_seed(1)
    ours(x)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    for _ in drawing:
        torch.empty(4, 1, 1, 1).bernoulli_(0.5)
    assert 0 < len(drawing) < len(blocks) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 3, 65, 65), (3, 3, 96, 131), (0, 3, 64, 64)], ids=str)
def test_any_size_matches_stock(shape):
    ours, stock = twins("efficientnet_b0")
    x = torch.randn(shape)
    with torch.no_grad():
        actual, expected = ours(x), stock(x)
    assert torch.allclose(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_every_linear_shortcut_is_fused(name):
    rows = cvkernels.explain(twins(name)[0], seen()).rows
    adds = sum(row.op in ("aten.add", "aten.add_") for row in rows)
    # V2's first stage has blocks of one convolution, whose SiLU stands before the shortcut.
    assert adds == {"efficientnet_b0": 0, "efficientnet_v2_s": 2}[name]


@pytest.mark.parametrize("part", ["features.2.1.block.1", "features.2.1.block.2.fc1"])
def test_a_watched_squeeze_is_computed_apart(part):
    ours = twins("efficientnet_b0")[0]
    ours.get_submodule(part).register_forward_hook(lambda *_: None)
    with torch.no_grad():
        rows = cvkernels.explain(ours, seen()).rows
    assert not any(r.op == "excite" for r in rows if r.layer.startswith("features.2.1"))
    assert any(r.op == "excite" for r in rows if r.layer.startswith("features.2.0"))


def test_verify_agrees():
    report = cvkernels.verify(twins("efficientnet_b0")[0], seen())
    assert report.rows[-1].ok and {row.layer for row in report.rows} >= {"features.1.0.block.0.0"}


def test_a_block_of_other_parts_runs_them():
    """A replaced projection or squeeze is called, not bypassed."""
    ours, stock = twins("efficientnet_b0")
    for model in (ours, stock):
        block = model.features[2][1].block
        block[3] = nn.Sequential(block[3], nn.Tanh())
        block[2].fc1 = nn.Sequential(block[2].fc1)
    assert_same_output(ours, stock, seen())


# Compound scaling


def test_resolution_is_the_weights_crop_size():
    for name, resolution in RESOLUTIONS.items():
        enum = getattr(torchvision.models, get_builder(name).weights_enum)
        assert enum.DEFAULT.transforms().crop_size == [resolution]
        with torch.device("meta"):
            assert get_builder(name)().resolution == resolution
    assert cvkernels.models.EfficientNet([MBConvConfig(1, 3, 1, 32, 16, 1)], 0.2).resolution is None


def test_any_point_of_the_compound_rule():
    ours = build(efficientnet, width=1.2, depth=1.4, resolution=300, dropout=0.3)
    assert_same_state(ours, build(cvkernels.models.efficientnet_b3))
    assert (ours.resolution, ours.classifier[0].p) == (300, 0.3)
    half = efficientnet(0.5, 0.5, 128, num_classes=5, norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
    assert half.features[0][0].out_channels == 16 and half.features[0][1].eps == 1e-3
    assert [len(stage) for stage in half.features[1:8]] == [1, 1, 1, 2, 2, 2, 1]
    assert half.eval()(image(1, 128)).shape == (1, 5)


@pytest.mark.parametrize("width", [0.35, 1.0, 1.1, 1.3, 2.0])
def test_configurations_scale_as_torchvisions(width):
    for depth in (0.5, 1.0, 2.2):
        arguments = (6, 5, 2, 24, 40, 3, width, depth)
        ours, stock = MBConvConfig(*arguments), stock_module.MBConvConfig(*arguments)
        ours, stock = vars(ours), vars(stock)
        assert (ours.pop("block"), stock.pop("block").__name__) == (MBConv, "MBConv")
        assert ours == stock
    fused = FusedMBConvConfig(4, 3, 2, 24, 48, 4)
    assert vars(fused) | {"block": None} == vars(
        stock_module.FusedMBConvConfig(4, 3, 2, 24, 48, 4, block=None)
    ) | {"block": None}


def test_squeeze_excitation_matches_stock_with_other_activations():
    stock = torchvision.ops.SqueezeExcitation(12, 5, nn.GELU, nn.Hardsigmoid)
    ours = SqueezeExcitation(12, 5, nn.GELU, nn.Hardsigmoid)
    ours.load_state_dict(stock.state_dict())
    assert_matches_module(ours, stock, torch.randn(3, 12, 5, 7))
    assert torch.allclose(ours(torch.ones(12, 4, 4)), stock(torch.ones(12, 4, 4)))


# Errors


@pytest.mark.parametrize("setting", [[], ["conv"], iter([1])], ids=["empty", "strings", "iterator"])
def test_wrong_settings_raise_torchvisions_errors(setting):
    assert_same_error(
        cvkernels.models.EfficientNet,
        torchvision.models.EfficientNet,
        inverted_residual_setting=setting,
        dropout=0.1,
    )


def test_illegal_stride_is_refused():
    with pytest.raises(ValueError, match="illegal stride value"):
        MBConv(MBConvConfig(1, 3, 3, 8, 8, 1), 0.0, nn.BatchNorm2d)
