"""Checkpoints and frozen files spoiled at random: the right weights, or one error that says why."""

import copy
import io
import pickle
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cvkernels
from cvkernels.models import load_checkpoint, read_checkpoint


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


class Code:
    def __reduce__(self):
        return (pytest.fail, ("the checkpoint's code ran",))


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(0)
    return Small().eval()


def wrapped(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


NO_TENSORS = (3, "x", None, [0.0], {"a": torch.ones(1)}, 1.5)
KEYS = sorted(Small().state_dict())


@st.composite
def spoiled(draw, state):
    """What of a state dict is saved, and whether it still is the network's."""
    state, key = copy.copy(dict(state)), draw(st.sampled_from(KEYS))
    how = draw(st.sampled_from((
        "nothing", "missing", "renamed", "more", "shape", "dtype", "prefix", "some prefixes",
        "nested", "no tensor", "code", "no dict", "keys",
    )))  # fmt: skip
    if how == "missing":
        del state[key]
    elif how == "renamed":
        state[key + draw(st.sampled_from(("_", ".x", "weight")))] = state.pop(key)
    elif how == "more":
        state[draw(st.sampled_from(("fc2.weight", "", "n_averaged", "conv")))] = torch.ones(2)
    elif how == "shape":
        state[key] = draw(st.sampled_from((state[key][None], torch.ones(0), torch.ones(9, 9))))
    elif how == "dtype":
        state[key] = state[key].to(draw(st.sampled_from((torch.float64, torch.float16))))
    elif how == "prefix":
        state = wrapped(state, draw(st.sampled_from(("module.", "_orig_mod.", "model.x."))))
    elif how == "some prefixes":
        state["module." + key] = state.pop(key)
    elif how == "nested":
        entry = draw(st.sampled_from(("state_dict", "model", "model_ema", "weights", 3)))
        state = {entry: state, "epoch": draw(st.sampled_from((1, torch.ones(1), "x")))}
    elif how == "no tensor":
        state[key] = draw(st.sampled_from(NO_TENSORS))
    elif how == "code":
        state[key] = Code()
    elif how == "no dict":
        state = draw(st.sampled_from(([1], torch.ones(2), 3, None, "x")))
    elif how == "keys":
        state[draw(st.sampled_from((3, None, 2.5)))] = torch.ones(1)
    return how, state


def contents(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_loads_or_says_why(source, good, errors=(ValueError, RuntimeError)):
    """All of the weights are loaded, or none; True where they are."""
    model = Small().eval()
    before = contents(model)
    try:
        load_checkpoint(model, source)
    except errors as error:
        assert str(error).strip()
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        return False
    for key, value in good.state_dict().items():
        allowed = 1e-3 if value.is_floating_point() else 0
        torch.testing.assert_close(model.state_dict()[key], value, rtol=allowed, atol=allowed)
    return True


@given(data=st.data())
def test_spoiled_state_dicts(good, tmp_path_factory, data):
    how, state = data.draw(spoiled(good.state_dict()), label="state")
    path = tmp_path_factory.getbasetemp() / "spoiled.pth"
    torch.save(state, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    loads = assert_loads_or_says_why(path, good)
    assert loads or how not in ("nothing", "dtype")
    if isinstance(state, dict) and how != "code":
        assert assert_loads_or_says_why(state, good) in (loads, False)
    with_prefix = {"prefix": "module."} if data.draw(st.booleans()) else {}
    entry = {"entry": "model_ema"} if data.draw(st.booleans()) else {}
    try:
        found = read_checkpoint(path, **with_prefix, **entry)
    except ValueError as error:
        assert "checkpoint" in str(error)
    else:
        assert all(isinstance(value, torch.Tensor) for value in found.values())


def damaged(draw, content: bytes) -> bytes:
    """The file cut short, or with bytes that are not as they were."""
    how = draw(st.sampled_from(("cut", "flipped", "zeros", "front", "twice", "empty")))
    if how == "empty":
        return b""
    place = draw(st.integers(0, len(content) - 1))
    if how == "cut":
        return content[:place]
    if how == "zeros":
        return content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :]
    if how == "front":
        return content[place:]
    if how == "twice":
        return content[:place] + content
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        changed[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@given(data=st.data())
def test_damaged_files(good, tmp_path_factory, zipped, data):
    saved = io.BytesIO()
    torch.save(good.state_dict(), saved, _use_new_zipfile_serialization=zipped)
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(damaged(data.draw, saved.getvalue()))
    model = Small()
    before = contents(model)
    try:
        load_checkpoint(model, path)
    except (ValueError, RuntimeError) as error:
        assert str(error).strip()
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def _pickled(content) -> bytes:
    return pickle.dumps(content)


def _zip(**members: bytes) -> bytes:
    saved = io.BytesIO()
    with zipfile.ZipFile(saved, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return saved.getvalue()


OTHER_FILES = {
    "code": lambda: _pickled(Code()), "a pickle": lambda: _pickled({"fc.bias": [1.0]}),
    "text": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "no data.pkl": lambda: _zip(archive__version=b"3\n"), "an empty zip": lambda: _zip(),
    "code in a zip": lambda: _zip(archive__data_pkl=b"", archive__version=b"3\n"),
    "zeros": lambda: bytes(4096),
}  # fmt: skip


@pytest.mark.parametrize("make", OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_other_files(good, tmp_path, make):
    (tmp_path / "other.pth").write_bytes(make())
    assert not assert_loads_or_says_why(tmp_path / "other.pth", good, ValueError)
    with pytest.raises(ValueError, match="other.pth"):
        cvkernels.load_frozen(tmp_path / "other.pth")


@pytest.fixture(scope="module")
def frozen_file(good):
    saved = io.BytesIO()
    frozen = cvkernels.freeze(good, torch.randn(1, 3, 8, 8))
    frozen.save(saved)
    return saved.getvalue()


@given(data=st.data())
def test_damaged_frozen_files(good, frozen_file, tmp_path_factory, data):
    """Refused when it is loaded, or a network that runs: torch.load checks no sums."""
    path = tmp_path_factory.getbasetemp() / "damaged.frozen"
    path.write_bytes(damaged(data.draw, frozen_file))
    try:
        frozen = cvkernels.load_frozen(path)
    except ValueError as error:
        assert "damaged.frozen" in str(error)
        return
    assert frozen(torch.randn(1, 3, 8, 8)).shape == (1, 2)


NO_VALUES = {
    "sparse": lambda t: t.to_sparse(), "on the meta device": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "change"), NO_VALUES.items(), ids=NO_VALUES.keys())
def test_no_entry_is_loaded_beside_one_that_cannot_be(good, kind, change):
    state = dict(good.state_dict())
    state["fc.weight"] = change(state["fc.weight"])
    model = Small()
    before = contents(model)
    with pytest.raises(RuntimeError, match=f"model is unchanged:\n.*fc.weight is .*{kind}"):
        load_checkpoint(model, state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_frozen_file_that_names_methods_is_refused(frozen_file, tmp_path):
    """Methods of methods reach any code, and plain types can name them."""
    content = torch.load(io.BytesIO(frozen_file), weights_only=True)
    attrs = dict(kind="method", target="__class__", args=(), kwargs={}, writes_first=False)
    content["nodes"].append({"op": "call", "layer": "", "inputs": [0], "attrs": attrs})
    torch.save(content, tmp_path / "crafted.pt")
    with pytest.raises(ValueError, match="crafted.pt is damaged: it calls code"):
        cvkernels.load_frozen(tmp_path / "crafted.pt")
