import copy
import functools
import importlib
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

import cvkernels
from cvkernels.models import GoogLeNetOutputs, googlenet, googlenet_loss
from cvkernels.models.googlenet import BasicConv2d, Inception, InceptionAux, _GoogLeNetOutputs
from tests.support.model_checks import (
    assert_same_state,
    build,
    fresh_twins,
    twins,
)
from tests.support.numerics import assert_matches_module
from tests.support.pairs import calibrate, image, pair

torchvision = pytest.importorskip("torchvision")
# In both packages the builder hides the module of its name.
our_module = importlib.import_module("cvkernels.models.googlenet")
stock_module = pytest.importorskip("torchvision.models.googlenet")

NAME = "googlenet"
PLAIN = {"init_weights": False}


def test_default_initialisation_warns_and_is_torchvisions():
    with pytest.warns(FutureWarning, match="init_weights=True"):
        assert_same_state(*fresh_twins(NAME))


@pytest.mark.parametrize("size", [15, 33, 50])
def test_odd_sizes_match_stock(size, device):
    """ceil_mode: the last window of a pool runs over the edge."""
    ours, stock = twins(NAME, device, **PLAIN)
    assert_matches_module(ours, stock, image(2, size, device), grad=False)


def test_custom_blocks_are_built_and_match_stock():
    def blocks(module):
        class Convolution(module.BasicConv2d):
            def forward(self, x):
                return super().forward(x) * 2

        return [Convolution, module.Inception, module.InceptionAux]

    ours = build(googlenet, blocks=blocks(our_module), **PLAIN)
    stock = build(torchvision.models.googlenet, blocks=blocks(stock_module), **PLAIN)
    calibrate(stock)
    ours.load_state_dict(stock.state_dict())
    assert_matches_module(ours.eval(), stock.eval(), image(2), grad=False)


def test_blocks_that_are_not_ours_run_as_modules():
    blocks = [stock_module.BasicConv2d, stock_module.Inception, stock_module.InceptionAux]
    ours = build(googlenet, blocks=blocks, **PLAIN).eval()
    theirs = build(torchvision.models.googlenet, **PLAIN).eval()
    assert_matches_module(ours, theirs, image(2), grad=False)


# The auxiliary classifiers


def test_training_returns_the_named_tuple():
    model = build(googlenet, num_classes=5, **PLAIN).train()
    outputs = model(image(2))
    assert type(outputs) is GoogLeNetOutputs is _GoogLeNetOutputs
    assert outputs._fields == ("logits", "aux_logits2", "aux_logits1")
    assert [out.shape for out in outputs] == [(2, 5)] * 3
    again = pickle.loads(pickle.dumps(outputs))
    assert type(again) is GoogLeNetOutputs and torch.equal(again.logits, outputs.logits)
    assert isinstance(model.eval()(image()), torch.Tensor)


def test_auxiliary_classifiers_do_not_run_in_eval():
    model = build(googlenet, **PLAIN).eval()
    model.aux1.register_forward_hook(lambda *_: pytest.fail("aux1 ran"))
    model.aux2.register_forward_hook(lambda *_: pytest.fail("aux2 ran"))
    model(image())


@pytest.mark.parametrize("how", ["builder", "patched"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_auxiliary_classifiers_removed_by_hand(training, how):
    ours, stock = twins(NAME, **PLAIN)
    if how == "patched":
        ours, stock = pair(stock)
    for model in (ours, stock):
        model.aux_logits = False
        model.aux1 = None
        model.aux2 = None
        model.train(training)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert len(ours.state_dict()) == 344
    assert_matches_module(ours, stock, image(4))


def test_aux_logits_alone_chooses_what_training_returns():
    ours, stock = (model.train() for model in twins(NAME, **PLAIN))
    for model in (ours, stock):
        model.aux_logits = False
    assert_matches_module(ours, stock, image(4))


def test_every_convolution_runs_fused(device):
    ours, _ = twins(NAME, device, **PLAIN)
    rows = cvkernels.explain(ours, image(device=device)).rows
    # Of the 57, three per block read one input and are one.
    assert sum(row.op == "conv_bn_act" for row in rows) == 57 - 9 * 2
    assert sum(row.op == "max_pool" for row in rows) == 13
    assert not [row for row in rows if row.backend == "reference"]


# Builder


@pytest.fixture
def no_download(monkeypatch):
    """torchvision's weights without the network."""
    state = calibrate(torchvision.models.googlenet(init_weights=False)).state_dict()
    enum = torchvision.models.GoogLeNet_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda *args, **kwargs: copy.copy(state))


WEIGHT_CALLS = {
    "plain": {},
    "keep_aux": dict(aux_logits=True),
    "own_scale": dict(transform_input=False),
    "dropout": dict(dropout=0.4),
    "init": dict(init_weights=False),
}


@pytest.mark.parametrize("kwargs", WEIGHT_CALLS.values(), ids=WEIGHT_CALLS.keys())
def test_weights_build_what_torchvision_builds(kwargs, no_download):
    models, texts = [], []
    for module in (cvkernels.models, torchvision.models):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            models.append(module.googlenet(weights="IMAGENET1K_V1", **kwargs).eval())
        texts.append([str(warning.message) for warning in caught])
    ours, stock = models
    assert texts[0] == texts[1]
    assert list(ours.state_dict()) == list(stock.state_dict())
    for attribute in ("aux_logits", "transform_input"):
        assert getattr(ours, attribute) == getattr(stock, attribute)
    assert (ours.aux1 is None) == (stock.aux1 is None)
    assert_matches_module(ours, stock, image(2), grad=False)


def test_a_checkpoint_prescribes_nothing(tmp_path):
    trained = build(googlenet, num_classes=3, aux_logits=False, **PLAIN)
    path = tmp_path / "trained.pth"
    torch.save(trained.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = googlenet(weights=path, num_classes=3, aux_logits=False)
    assert not loaded.transform_input and loaded.aux1 is None
    x = image()
    assert torch.equal(loaded.eval()(x), trained.eval()(x))
    with pytest.raises(RuntimeError, match=r"20 missing key\(s\): aux1.conv.conv.weight"):
        googlenet(weights=path, num_classes=3)


# The blocks alone


@pytest.mark.parametrize(
    ("ours", "arguments", "channels"),
    [
        (BasicConv2d, (3, 8), 3),
        (Inception, (6, 4, 3, 5, 2, 4, 3), 6),
        (InceptionAux, (6, 10), 6),
    ],
    ids=["BasicConv2d", "Inception", "InceptionAux"],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_blocks_match_stock(ours, arguments, channels, training):
    options = {"kernel_size": 3} if ours is BasicConv2d else {}
    torch.manual_seed(0)
    block = ours(*arguments, **options).train(training)
    torch.manual_seed(0)
    stock = getattr(stock_module, ours.__name__)(*arguments, **options)
    assert list(block.state_dict()) == list(stock.state_dict())
    x = torch.randn(2, channels, 14, 14)
    assert_matches_module(block, stock.train(training), x)


@pytest.mark.parametrize("make", [googlenet, torchvision.models.googlenet], ids=["ours", "stock"])
def test_loss_weighs_auxiliary_classifiers(make):
    model = build(make, num_classes=10, **PLAIN).train()
    outputs, target = model(image(2, 64)), torch.tensor([3, 7])
    losses = [F.cross_entropy(logits, target) for logits in outputs]
    assert torch.equal(
        googlenet_loss(outputs, target), losses[0] + 0.3 * losses[1] + 0.3 * losses[2]
    )
    smoothed = functools.partial(F.cross_entropy, label_smoothing=0.1)
    mixed = torch.softmax(torch.randn(2, 10), 1)
    expected = (
        smoothed(outputs[0], mixed) + smoothed(outputs[1], mixed) + smoothed(outputs[2], mixed)
    )
    torch.testing.assert_close(googlenet_loss(outputs, mixed, smoothed, 1.0), expected)


def test_loss_without_auxiliary_logits_is_that_of_the_logits():
    logits, target = torch.randn(4, 10), torch.arange(4)
    expected = F.cross_entropy(logits, target)
    for outputs in (logits, GoogLeNetOutputs(logits, None, None)):
        assert torch.equal(googlenet_loss(outputs, target), expected)
    with pytest.raises(TypeError, match="outputs must be a tensor or GoogLeNetOutputs, got tuple"):
        googlenet_loss((logits, logits, logits), target)
