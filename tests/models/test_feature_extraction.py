"""torchvision's feature extractor takes stock's node names of drop-in and patched networks."""

import pytest
import torch

from tests.support.model_checks import calibrated, counterpart

torchvision = pytest.importorskip("torchvision")
extraction = pytest.importorskip("torchvision.models.feature_extraction")


@pytest.mark.few(4)
@pytest.mark.parametrize("how", ["drop_in", "patched"])
@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "googlenet", "efficientnet_b0", "efficientnet_v2_s"]
)
@torch.no_grad()
def test_every_name_of_stock(name, how):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    stock = calibrated(getattr(torchvision.models, name), **options)
    ours = counterpart(stock, name, how, **options)
    _, names = extraction.get_graph_node_names(stock)
    x = torch.randn(1, 3, 64, 64)
    expected = extraction.create_feature_extractor(stock, names)(x)
    found = extraction.create_feature_extractor(ours, names)(x)
    assert found.keys() == expected.keys()
    for node, value in expected.items():
        if isinstance(value, torch.Tensor):
            scale = value.abs().max().item()
            torch.testing.assert_close(
                found[node], value, rtol=1e-4, atol=1e-4 * scale, check_stride=True
            )
        else:
            assert found[node] == value, node
