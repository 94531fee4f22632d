"""Every kind of block and every keyword: state, outputs and training beside stock's.

``test_every_builder`` has the outputs of all builders.
"""

from functools import partial
from typing import NamedTuple

import pytest
from torch import nn

from tests.support.model_checks import (
    TINY_DENSENET,
    assert_eval_is_pure,
    assert_every_norm_is_fused,
    assert_same_gradients,
    assert_same_state,
    assert_trains_like,
    fresh_twins,
    twins,
)
from tests.support.pairs import seen


class Network(NamedTuple):
    """``in_float32``: it bears the tolerance rule on the input's gradient. Deeper networks amplify
    stock's own rounding a thousandfold, and are compared in float64."""

    builder: str
    kwargs: dict
    in_float32: bool = True


def networks(builder, in_float32=True, **rows):
    return {f"{builder}-{key}": Network(builder, kw, in_float32) for key, kw in rows.items()}


def group_norm(channels):
    return nn.GroupNorm(8, channels)


# A network's blocks, stem and shortcuts, in four blocks instead of fifty.
SHORT = {"layers": (1, 1, 1, 1)}
PLAIN = {"init_weights": False}
NETWORKS = {
    **networks(
        "googlenet",
        truncated_normal=dict(init_weights=True),
        plain=PLAIN,
        no_aux=dict(PLAIN, aux_logits=False),
        classes=dict(init_weights=True, num_classes=7),
        dropout=dict(PLAIN, dropout=0.5, dropout_aux=0.1),
        transform_input=dict(PLAIN, transform_input=True),
    ),
    **networks("resnet18", plain={}),
    **networks(
        "resnet50",
        plain={},
        num_classes={"num_classes": 7},
        zero_init={"zero_init_residual": True},
        dilated={"replace_stride_with_dilation": [False, True, True]},
        group_norm={"norm_layer": group_norm},
        groups={"groups": 4, "width_per_group": 16},
    ),
    **networks("resnext50_32x4d", plain={}),
    **networks("densenet121", plain={}),
    **networks(
        "DenseNet",
        classes=dict(TINY_DENSENET, num_classes=7),
        bn_size=dict(TINY_DENSENET, bn_size=2),
        growth_rate=dict(TINY_DENSENET, growth_rate=12),
        three_blocks=dict(TINY_DENSENET, block_config=(2, 1, 2)),
        dropout=dict(TINY_DENSENET, drop_rate=0.2),
        memory_efficient=dict(TINY_DENSENET, memory_efficient=True),
        memory_efficient_dropout=dict(TINY_DENSENET, memory_efficient=True, drop_rate=0.2),
    ),
    **networks(
        "efficientnet_b0",
        num_classes={"num_classes": 7},
        probabilities={"dropout": 0.6, "stochastic_depth_prob": 0.5},
        group_norm={"norm_layer": group_norm},
        batch_norm={"norm_layer": partial(nn.BatchNorm2d, eps=1e-2, momentum=0.2)},
    ),
    **networks("efficientnet_b0", False, plain={}),
    **networks("efficientnet_v2_s", False, plain={}),
    **{
        name: Network(name, {"layers": (2, 1, 1, 1)}, False)
        for name in (
            "seresnet18", "seresnet50", "seresnext50_32x4d", "legacy_seresnet18",
            "legacy_seresnet50", "legacy_seresnext50_32x4d",
        )
    },
    **networks(
        "seresnet18",
        False,
        channels=dict(SHORT, num_classes=7, in_chans=1),
        no_classifier=dict(SHORT, num_classes=0, global_pool=""),
        max=dict(SHORT, global_pool="max"),
        avgmax=dict(SHORT, global_pool="avgmax"),
        drops=dict(SHORT, drop_rate=0.4, drop_path_rate=0.5),
        stride_16=dict(SHORT, output_stride=16),
        act=dict(SHORT, act_layer=nn.SiLU),
        act_by_name=dict(SHORT, act_layer="relu6", norm_layer="batchnorm2d"),
        tiered_stem=dict(SHORT, stem_type="deep_tiered", stem_width=32),
        nones=dict(SHORT, global_pool=None, drop_path_rate=None, features_only=None),
    ),
    **networks(
        "seresnet50",
        False,
        stride_8=dict(SHORT, output_stride=8),
        no_zero_init=dict(SHORT, zero_init_last=False),
    ),
    **networks(
        "legacy_seresnet18",
        False,
        pool=dict(SHORT, global_pool="catavgmax", num_classes=5),
        channels=dict(SHORT, drop_rate=0.0, in_chans=4, num_classes=3),
    ),
    **networks("senet154", False, plain=SHORT, stride_16=dict(SHORT, output_stride=16)),
    **networks("legacy_senet154", False, plain=SHORT),
}  # fmt: skip
each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def images(network, count, device):
    return seen(count, device, channels=network.kwargs.get("in_chans", 3))


@each_network
def test_state_of_one_seed(network):
    ours, stock = fresh_twins(network.builder, **network.kwargs)
    assert_same_state(ours, stock)
    assert getattr(ours, "feature_info", None) == getattr(stock, "feature_info", None)


@pytest.mark.few(6)
@each_network
def test_eval(network, device):
    ours, stock = twins(network.builder, device, **network.kwargs)
    assert_eval_is_pure(ours, stock, images(network, 2, device), network.in_float32)


@pytest.mark.few(3)
@each_network
def test_training(network, device):
    kwargs = dict(network.kwargs)
    # Stock's counts the batches of norm1 twice, in the forward pass and in the backward pass.
    kwargs.pop("memory_efficient", None)
    ours, stock = (model.train() for model in twins(network.builder, device, **kwargs))
    assert_trains_like(ours, stock, images(network, 4, device), network.in_float32)


def test_memory_efficient_parameter_gradients(device):
    kwargs = dict(TINY_DENSENET, memory_efficient=True)
    ours, stock = (model.train() for model in twins("DenseNet", device, **kwargs))
    assert_same_gradients(ours, stock, seen(4, device))


FUSED = ["efficientnet_b0-plain", "efficientnet_v2_s-plain"] + [
    name
    for name, network in NETWORKS.items()
    if network.builder.startswith(("se", "legacy_se")) and "act" not in name
]


@pytest.mark.parametrize("name", FUSED)
def test_every_norm_is_fused(name, device):
    network = NETWORKS[name]
    ours, _ = twins(network.builder, device, **network.kwargs)
    assert_every_norm_is_fused(ours, images(network, 1, device))
