import sys

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.models.timm_builder import REFUSED
from cvkernels.nn import GlobalPool, SEModule
from tests.support.model_checks import (
    assert_eval_is_pure,
    assert_every_norm_is_fused,
    assert_same_gradients,
    assert_same_output,
    assert_same_state,
    assert_trains_like,
    build,
    builders,
    fresh_twins,
    twins,
)
from tests.support.numerics import assert_matches_module
from tests.support.pairs import calibrated_pair, seen

timm = pytest.importorskip("timm")

# One network of every block type: numerics by the rule. test_every_builder has the outputs of all.
SMALL = [
    "seresnet18", "seresnet50", "seresnext50_32x4d", "legacy_seresnet18", "legacy_seresnet50",
    "legacy_seresnext50_32x4d",
]  # fmt: skip
FAMILIES = ["seresnet18", "legacy_seresnet18"]
# A network's blocks, stem and shortcuts, in four blocks instead of fifty.
SHORT = {"layers": (1, 1, 1, 1)}


# The networks


@pytest.mark.parametrize("name", [*SMALL, "senet154", "legacy_senet154"])
def test_eval_and_training_match_stock_down_to_the_random_numbers(name, device):
    layers = (1, 1, 1, 1) if "154" in name else (2, 1, 1, 1)
    ours, stock = twins(name, device, layers=layers)
    assert_eval_is_pure(ours, stock, seen(2, device))
    assert_every_norm_is_fused(ours, seen(1, device))
    assert_trains_like(ours.train(), stock.train(), seen(4, device))


KEYWORDS = {
    "classes-channels": ("seresnet18", {"num_classes": 7, "in_chans": 1}),
    "no-classifier": ("seresnet18", {"num_classes": 0, "global_pool": ""}),
    "max": ("seresnet18", {"global_pool": "max"}),
    "avgmax": ("seresnet18", {"global_pool": "avgmax"}),
    "catavgmax": ("legacy_seresnet18", {"global_pool": "catavgmax", "num_classes": 5}),
    "drops": ("seresnet18", {"drop_rate": 0.4, "drop_path_rate": 0.5}),
    "stride-8": ("seresnet50", {"output_stride": 8}),
    "stride-16-basic": ("seresnet18", {"output_stride": 16}),
    "stride-16-senet154": ("senet154", {"output_stride": 16}),
    "act": ("seresnet18", {"act_layer": nn.SiLU}),
    "act-by-name": ("seresnet18", {"act_layer": "relu6", "norm_layer": "batchnorm2d"}),
    "no-zero-init": ("seresnet50", {"zero_init_last": False}),
    "tiered-stem": ("seresnet18", {"stem_type": "deep_tiered", "stem_width": 32}),
    "legacy": ("legacy_seresnet18", {"drop_rate": 0.0, "in_chans": 4, "num_classes": 3}),
    "nones": ("seresnet18", {"global_pool": None, "drop_path_rate": None, "features_only": None}),
}


@pytest.mark.parametrize(("name", "kwargs"), KEYWORDS.values(), ids=KEYWORDS.keys())
def test_keyword_arguments_match_stock(name, kwargs):
    ours, stock = fresh_twins(name, **SHORT, **kwargs)
    assert_same_state(ours, stock)
    assert ours.feature_info == stock.feature_info
    ours, stock = calibrated_pair(ours, stock)
    x = seen(4, channels=kwargs.get("in_chans", 3))
    assert_matches_module(ours.eval(), stock.eval(), x, grad=False)
    assert_trains_like(ours.train(), stock.train(), x)


# timm's methods


@pytest.mark.parametrize("name", FAMILIES)
def test_methods_are_timms(name):
    ours, stock = twins(name)
    x = seen()
    with torch.no_grad():
        features, expected = ours.forward_features(x), stock.forward_features(x)
        assert torch.allclose(features, expected, atol=1e-3)
        for pre_logits in (True, False):
            actual = ours.forward_head(expected, pre_logits=pre_logits)
            assert torch.equal(actual, stock.forward_head(expected, pre_logits=pre_logits))
        for kwargs in ({}, {"indices": 2}, {"indices": [0, -2], "stop_early": True}):
            last, taken = ours.forward_intermediates(x, **kwargs)
            stock_last, stock_taken = stock.forward_intermediates(x, **kwargs)
            for mine, theirs in zip([last, *taken], [stock_last, *stock_taken], strict=True):
                assert torch.allclose(mine, theirs, atol=1e-3)
        assert len(ours.forward_intermediates(x, 3, intermediates_only=True)) == 3
    assert ours.get_classifier() is getattr(ours, ours.get_classifier(name_only=True))
    for arguments in ((5,), (5, "catavgmax"), (0, "")):
        for model in (ours, stock):
            torch.manual_seed(4)
            model.reset_classifier(*arguments)
        assert_same_state(ours, stock)
        assert ours.head_hidden_size == stock.head_hidden_size
        assert_same_output(ours, stock, x)


def test_gradient_checkpointing_changes_nothing_but_memory():
    ours, stock = (model.train() for model in twins("seresnet18"))
    ours.set_grad_checkpointing()
    assert_same_gradients(ours, stock, seen(4))


@pytest.mark.parametrize(
    "kwargs",
    [{"indices": 6}, {"indices": 0}, {"indices": [5]}, {"output_fmt": "NLC"}],
    ids=["many", "none", "beyond", "layout"],
)
def test_wrong_features_are_refused(kwargs):
    ours = build(cvkernels.models.seresnet18)
    with pytest.raises(ValueError, match="must be"):
        ours.forward_intermediates(seen(), **kwargs)


def test_squeeze_widths_are_timms():
    for channels in (8, 64, 96, 200, 256, 2048):
        torch.manual_seed(0)
        ours = SEModule(channels)
        torch.manual_seed(0)
        assert_same_state(ours, timm.layers.SEModule(channels))


# Builders and weights


def test_builders_are_called_as_timms():
    assert type(cvkernels.models.seresnet18(False)) is cvkernels.models.SEResNet
    assert type(cvkernels.models.legacy_seresnet18(exportable=True)) is cvkernels.models.LegacySENet
    with pytest.raises(ValueError, match="did you mean .*legacy_seresnet50"):
        cvkernels.create_model("legacy_seresnet51")


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_from_a_file_or_a_state_dict(name, tmp_path):
    trained = build(builders(name)[1], seed=7)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    for weights in (tmp_path / "trained.pth", trained.state_dict()):
        assert_same_state(cvkernels.create_model(name, weights=weights), trained)
    with pytest.raises(RuntimeError, match="the model is unchanged"):
        cvkernels.create_model(name, weights=trained.state_dict(), num_classes=3)


@pytest.fixture
def published(monkeypatch):
    """timm's pretrained networks without the network: seed 9 for every name; what was asked for."""
    asked = []

    def pretend(name, pretrained=False, **kwargs):
        asked.append(name)
        assert pretrained
        return build(builders(name.partition(".")[0])[1], seed=9, **kwargs)

    monkeypatch.setattr(timm, "create_model", pretend)
    return asked


@pytest.mark.parametrize(
    ("name", "kwargs", "full_name"),
    [
        ("seresnet50", {"weights": "a2_in1k"}, "seresnet50.a2_in1k"),
        ("seresnet50", {"weights": "seresnet50.ra2_in1k"}, "seresnet50.ra2_in1k"),
        ("seresnet50", {"weights": "DEFAULT"}, "seresnet50.a1_in1k"),
        ("legacy_seresnet18", {"pretrained": True}, "legacy_seresnet18.in1k"),
    ],
)
def test_weights_by_timms_names(name, kwargs, full_name, published):
    expected = build(builders(name)[1], seed=9)
    ours = cvkernels.create_model(name, **kwargs)
    assert_same_state(ours, expected)
    assert published == [full_name]
    assert ours.pretrained_cfg["tag"] == full_name.partition(".")[2]
    assert ours.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_other_classes_keep_the_new_classifier(published):
    fresh = build(cvkernels.models.legacy_seresnet18, num_classes=5)
    state = torch.get_rng_state()
    ours = build(cvkernels.models.legacy_seresnet18, num_classes=5, pretrained=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ours.last_linear.weight, fresh.last_linear.weight)
    assert not torch.equal(ours.layer0.conv1.weight, fresh.layer0.conv1.weight)
    headless = cvkernels.create_model("legacy_seresnet18", num_classes=0, pretrained=True)
    assert torch.equal(headless.layer0.conv1.weight, ours.layer0.conv1.weight)


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("seresnet50", "bogus", RuntimeError, r"Invalid pretrained tag \(bogus\) .* a1_in1k, "),
        ("seresnet50", "seresnet101.a1_in1k", ValueError, "are seresnet101's; pass a tag alone"),
        ("seresnet18", "DEFAULT", RuntimeError, "timm publishes no weights for seresnet18"),
        ("seresnet18", 3, TypeError, "weights must be a tag of timm's, .* got int"),
        ("seresnet18", "missing.pth", FileNotFoundError, "missing.pth"),
    ],
)
def test_wrong_weights_say_what_there_is(name, weights, error, message):
    with pytest.raises(error, match=message):
        cvkernels.create_model(name, weights=weights)
    if error is RuntimeError:
        with pytest.raises(RuntimeError):
            timm.create_model(f"{name}.{weights}".removesuffix(".DEFAULT"), pretrained=True)


def test_names_need_timm_and_paths_do_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm.*, or pass the path of a checkpoint"):
        cvkernels.models.seresnet50(weights="a1_in1k")
    state = cvkernels.models.seresnet18().state_dict()
    cvkernels.models.seresnet18(weights=state)


@pytest.mark.parametrize("keyword", REFUSED)
def test_what_is_not_supported_is_refused_by_name(keyword):
    with pytest.raises(TypeError, match=rf"seresnet18\(\) does not support {keyword}=: \w+"):
        cvkernels.models.seresnet18(**{keyword: True})


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("seresnet18", {"output_stride": 4}, ValueError, "output_stride must be 8, 16 or 32"),
        ("seresnet18", {"global_pool": "fast"}, ValueError, "global_pool must be 'avg'"),
        ("seresnet18", {"act_layer": "bogus"}, ValueError, "act_layer must be one of relu"),
        ("seresnet18", {"stem_type": "wide"}, ValueError, "stem_type must be"),
        ("seresnet18", {"cardinality": 2}, ValueError, "SEBottleneck supports both"),
        ("seresnet50", {"depth": 3}, TypeError, "unexpected keyword argument 'depth'"),
        ("legacy_seresnet18", {"act_layer": nn.SiLU}, TypeError, "argument 'act_layer'"),
    ],
)
def test_wrong_options_are_refused(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        cvkernels.create_model(name, **kwargs)


def test_global_pool_shows_its_type():
    assert "pool_type='catavgmax'" in repr(GlobalPool("catavgmax"))
