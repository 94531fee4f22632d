"""timm's names, 40 of distinct blocks: patched and frozen, they compute what stock does.

``python -m tests.support.timm_names --frozen`` checks all of them.
"""

import copy

import pytest
import torch

import cvkernels
from tests.support.numerics import assert_matches_module
from tests.support.pairs import calibrate

pytest.importorskip("timm")
from tests.support.timm_names import (  # noqa: E402 - it imports timm
    RIGHT,
    build,
    check_frozen,
    check_patched,
    check_planned,
    timm_names,
)

SHORT = {"layers": (1, 1, 1, 1)}
# Stages of repeated blocks are short where the constructor lets them be.
NAMES = {
    "resnet10t": {},
    "resnet50_gn": SHORT,
    "resnet50s": SHORT,
    "resnet50t": SHORT,
    "resnetaa34d": SHORT,
    "resnetaa50d": SHORT,
    "resnetblur18": {},
    "resnetblur50d": SHORT,
    "resnetrs50": SHORT,
    "resnext50_32x4d": SHORT,
    "wide_resnet50_2": SHORT,
    "ecaresnet26t": SHORT,
    "ecaresnet50d_pruned": {},
    "seresnetaa50d": SHORT,
    "seresnext26d_32x4d": SHORT,
    "senet154": SHORT,
    "test_resnet": {},
    "legacy_seresnext26_32x4d": SHORT,
    "legacy_senet154": SHORT,
    "densenetblur121d": {"block_config": (2, 2, 2, 2)},
    "efficientnet_b0_gn": {},
    "efficientnet_b1_pruned": {},
    "efficientnet_blur_b0": {},
    "efficientnet_cc_b0_4e": {},
    "efficientnet_es": {},
    "efficientnet_lite0": {},
    "test_efficientnet": {},
    "test_efficientnet_evos": {},
    "test_efficientnet_ln": {},
    "fbnetc_100": {},
    "gc_efficientnetv2_rw_t": {},
    "mixnet_s": {},
    "mnasnet_small": {},
    "mobilenet_edgetpu_v2_xs": {},
    "mobilenetv1_100": {},
    "mobilenetv2_035": {},
    "semnasnet_050": {},
    "tf_mixnet_s": {},
    "tf_efficientnetv2_b0": {},
    "tinynet_e": {},
}


@pytest.mark.few(5)
@pytest.mark.parametrize(("name", "options"), NAMES.items(), ids=NAMES)
def test_patched_and_frozen_are_stock(name, options, monkeypatch):
    stock, x = build(name, **options), torch.randn(2, 3, 64, 64)
    # Filling memory takes a fifth of the time, and in float64 only PyTorch's operations run.
    with monkeypatch.context() as unfilled:
        unfilled.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        assert check_patched(stock, x) == {"training": RIGHT, "eval": RIGHT}
    calibrate(stock, x, only_norms=True)
    ours = copy.deepcopy(stock)
    cvkernels.patch(ours)
    assert_matches_module(ours, stock, x, grad=False)
    assert check_frozen(stock, x) == RIGHT


@pytest.mark.parametrize("name", ["resnetrs420", "senet154", "densenet264d", "efficientnet_l2"])
def test_the_largest_are_planned(name):
    assert name in timm_names()
    assert check_planned(name).startswith(f"{RIGHT}: planned")
