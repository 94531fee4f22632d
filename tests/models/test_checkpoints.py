import argparse

import pytest
import torch

import cvkernels
from cvkernels.models import load_checkpoint, read_checkpoint, resnet18, resnet34


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


# read_checkpoint


@pytest.fixture
def training_checkpoint(model):
    """What torchvision's reference scripts save: args, and an average with wrapped names."""
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for parameter in averaged.parameters():
        parameter.data.add_(1)
    return {
        "model": model.state_dict(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="resnet18", lr=0.1, opt=None, output_dir="."),
        "model_ema": averaged.state_dict(),
    }


@pytest.mark.parametrize("how", ["path", "string", "content"])
def test_an_entry_of_a_training_checkpoint(tmp_path, training_checkpoint, model, how):
    path = tmp_path / "training.pth"
    torch.save(training_checkpoint, path)
    source = {"path": path, "string": str(path), "content": training_checkpoint}[how]
    assert_unchanged(model, read_checkpoint(source))
    assert_unchanged(model, read_checkpoint(source, entry="model"))
    average = read_checkpoint(source, entry="model_ema", prefix="module.")
    loaded = resnet18(weights=average, num_classes=5)
    assert torch.equal(loaded.conv1.weight, model.conv1.weight + 1)
    assert "n_averaged" not in average


def test_a_training_checkpoint_loads(tmp_path, training_checkpoint, model):
    torch.save(training_checkpoint, tmp_path / "training.pth")
    loaded = resnet18(weights=tmp_path / "training.pth", num_classes=5)
    assert_unchanged(loaded, model.state_dict())


def test_timms_training_checkpoint(model):
    """timm saves "state_dict" and "state_dict_ema"; its averages have the model's own names."""
    average = {key: value + 1 for key, value in model.state_dict().items()}
    saved = {"arch": "resnet18", "state_dict": model.state_dict(), "state_dict_ema": average}
    assert read_checkpoint(saved) is saved["state_dict"]
    assert read_checkpoint(saved, entry="state_dict_ema") is average


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_a_prefix_is_stripped_on_request(model, prefix):
    wrapped = model
    for name in reversed(prefix.split(".")[:-1]):
        wrapped = torch.nn.ModuleDict({name: wrapped})
    state = wrapped.state_dict()
    assert next(iter(state)) == f"{prefix}conv1.weight"
    stripped = read_checkpoint(state, prefix=prefix)
    assert list(stripped) == list(model.state_dict())
    assert stripped._metadata == model.state_dict()._metadata
    assert_unchanged(resnet18(weights=stripped, num_classes=5), stripped)
    way_out = rf"starts with '{prefix}'.*read_checkpoint\(checkpoint, prefix='{prefix}'\)"
    with pytest.raises(RuntimeError, match=way_out):
        load_checkpoint(model, state)


def test_a_compiled_models_checkpoint_loads(model):
    state = torch.compile(model, backend="eager").state_dict()
    assert_unchanged(model, read_checkpoint(state, prefix="_orig_mod."))


def test_a_prefix_that_some_keys_lack_is_refused(model):
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state["conv1.bias"] = torch.zeros(64)
    with pytest.raises(
        ValueError, match="1 key.s. of 123 that do not start with 'module.': conv1.bias"
    ):
        read_checkpoint(state, prefix="module.")
    with pytest.raises(ValueError, match=r"122 key.* of 122 .*: conv1.weight, bn1.weight, .*\.$"):
        read_checkpoint(model.state_dict(), prefix="module.")
    with pytest.raises(ValueError, match="prefix must end in a dot, got 'module'"):
        read_checkpoint(state, prefix="module")


def test_an_entry_that_is_not_there_shows_what_is(tmp_path, training_checkpoint):
    path = tmp_path / "training.pth"
    torch.save(training_checkpoint, path)
    with pytest.raises(
        ValueError, match="training.pth' has no state dict under 'ema'; .* 'model', 'model_ema'$"
    ):
        read_checkpoint(path, entry="ema")
    with pytest.raises(ValueError, match="under 'epoch'; it has one under 'model'"):
        read_checkpoint(training_checkpoint, entry="epoch")
    with pytest.raises(ValueError, match="under 'model'; it has none under any key"):
        read_checkpoint({"epoch": 3}, entry="model")
    with pytest.raises(ValueError, match="checkpoint holds a dict, not a state dict"):
        read_checkpoint(training_checkpoint, entry="optimizer")


def test_a_training_checkpoint_taken_for_a_state_dict_is_told(training_checkpoint, model):
    with pytest.raises(RuntimeError, match=r"read_checkpoint\(checkpoint, entry='model'\)"):
        load_checkpoint(model, training_checkpoint)


def test_a_value_that_is_no_tensor_is_named(model):
    with pytest.raises(RuntimeError, match=r"fc.bias is a list, the model's has \[5\]"):
        load_checkpoint(model, model.state_dict() | {"fc.bias": [0.0] * 5})


def test_objects_beside_the_weights_are_named(tmp_path, model):
    path = tmp_path / "training.pth"
    torch.save({"model": model.state_dict(), "output_dir": tmp_path}, path)
    with pytest.raises(
        ValueError, match=r"cannot be read safely, it holds pathlib.*weights_only=False\) and save"
    ):
        read_checkpoint(path)


def test_reading_leaves_the_allowed_types_as_they_were(tmp_path, training_checkpoint):
    path = tmp_path / "training.pth"
    torch.save(training_checkpoint, path)
    before = set(torch.serialization.get_safe_globals())  # torch lists a set, in no order
    read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals()
