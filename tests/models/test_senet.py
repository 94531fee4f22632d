import sys

import pytest
import torch

import cvkernels
from cvkernels.nn import GlobalPool, SEModule
from tests.support.model_checks import (
    assert_same_gradients,
    assert_same_output,
    assert_same_state,
    build,
    builders,
    twins,
)
from tests.support.pairs import seen

timm = pytest.importorskip("timm")

FAMILIES = ["seresnet18", "legacy_seresnet18"]
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
    asked, create = [], timm.create_model

    def pretend(name, pretrained=False, **kwargs):
        asked.append(name)
        assert pretrained
        return build(create, model_name=name.partition(".")[0], seed=9, **kwargs)

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
    expected = build(builders(name)[1], seed=9, pretrained=True)
    published.clear()
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


def test_global_pool_shows_its_type():
    assert "pool_type='catavgmax'" in repr(GlobalPool("catavgmax"))
