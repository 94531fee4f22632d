import pytest
import torch

import cvkernels
from cvkernels.models import load_checkpoint, resnet18, resnet34


@pytest.fixture
def model():
    return resnet18(num_classes=5)


def copy_of(state):
    return {key: value.clone() for key, value in state.items()}


def assert_unchanged(model, before):
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("container", [None, "state_dict", "model"])
@pytest.mark.parametrize("how", ["weights-path", "weights-string", "load_checkpoint"])
def test_a_file_loads(tmp_path, model, how, container):
    path = tmp_path / "checkpoint.pth"
    state = model.state_dict()
    torch.save(state if container is None else {container: state, "epoch": torch.tensor(3)}, path)
    if how == "load_checkpoint":
        loaded = resnet18(num_classes=5)
        load_checkpoint(loaded, path)
    else:
        loaded = resnet18(weights=path if how == "weights-path" else str(path), num_classes=5)
    assert_unchanged(loaded, state)


def test_a_state_dict_loads(model):
    assert_unchanged(resnet18(weights=model.state_dict(), num_classes=5), model.state_dict())


def test_another_networks_checkpoint_names_the_keys(model):
    before = copy_of(model.state_dict())
    with pytest.raises(RuntimeError) as error:
        load_checkpoint(model, resnet34(num_classes=7).state_dict())
    message = str(error.value)
    assert "for ResNet; the model is unchanged" in message
    assert "unexpected key(s): layer1.2.conv1.weight" in message
    assert "fc.weight has shape [7, 512], the model's has [5, 512]" in message
    assert_unchanged(model, before)


def test_missing_keys_change_nothing(model):
    before = copy_of(model.state_dict())
    state = {key: value + 1 for key, value in before.items() if key != "layer4.1.bn2.weight"}
    with pytest.raises(RuntimeError, match=r"1 missing key\(s\): layer4.1.bn2.weight"):
        load_checkpoint(model, state)
    assert_unchanged(model, before)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "object"])
def test_a_damaged_file_changes_nothing(tmp_path, model, damage):
    path = tmp_path / "damaged.pth"
    torch.save(model.state_dict(), path)
    content = path.read_bytes()
    if damage == "object":
        torch.save({"fc.weight": 3}, path)
    else:
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "garbage": b"x" * 999}.get(damage, b"")
        )
    before = copy_of(model.state_dict())
    with pytest.raises(ValueError, match="checkpoint .*damaged.pth"):
        load_checkpoint(model, path)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="checkpoint .*damaged.pth"):
        resnet18(weights=path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (pytest.fail, ("the checkpoint's code ran",))

    path = tmp_path / "payload.pth"
    torch.save({"fc.weight": Payload()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        resnet18(weights=path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        resnet18(weights=tmp_path / "nowhere.pth")


def test_norms_that_count_no_batches_load(model):
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_checkpoint(model, state)


def test_names_need_torchvision(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        ImportError, match="weights='IMAGENET1K_V1' is a name of torchvision's.*pip install"
    ):
        cvkernels.models.resnet18(weights="IMAGENET1K_V1")
