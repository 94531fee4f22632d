"""The guard of a kept plan in C++: it sees each change, and none where nothing counts changed."""

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.fast

_C = pytest.importorskip("cvkernels._C")


def block():
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


def guard_of(modules):
    entries = [(m, ("training", "stride") if hasattr(m, "stride") else (), ("forward", "weight"))
               for m in modules]  # fmt: skip
    code = [(type(m), "forward") for m in modules] + [(torch.nn.functional, "conv2d")]
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    return _C.Guard(entries, code, [t for t in tensors if t.is_floating_point()])


class OtherConv(nn.Conv2d):
    pass


def cut(tensor):
    tensor.data = tensor.data[:4]


def transpose(weight):
    weight.data = weight.data.transpose(2, 3)


CHANGES = {
    "a class": lambda conv, bn, block: setattr(conv, "__class__", OtherConv),
    "an option": lambda conv, bn, block: setattr(conv, "stride", (2, 2)),
    "a forward of the instance": lambda conv, bn, block: setattr(conv, "forward", bn.forward),
    "a hook": lambda conv, bn, block: bn.register_forward_hook(lambda *_: None),
    "a backward hook": lambda conv, bn, block: bn.register_full_backward_hook(lambda *_: None),
    "a child": lambda conv, bn, block: block.__setitem__(2, nn.Identity()),
    "one child more": lambda conv, bn, block: block.append(nn.Identity()),
    "a parameter": lambda conv, bn, block: setattr(bn, "weight", nn.Parameter(torch.ones(8))),
    "no parameter": lambda conv, bn, block: setattr(conv, "bias", None),
    "a buffer": lambda conv, bn, block: setattr(bn, "running_mean", torch.ones(8)),
    "a tensor for a parameter": lambda conv, bn, block: (
        delattr(conv, "weight"), setattr(conv, "weight", torch.ones(8, 4, 3, 3)),
    ),
    "all attributes": lambda conv, bn, block: setattr(
        conv, "__dict__", {**conv.__dict__, "stride": (2, 2)}
    ),
    "a version": lambda conv, bn, block: conv.weight.detach().add_(1),
    "memory": lambda conv, bn, block: setattr(bn.bias, "data", bn.bias.data.clone()),
    "a size": lambda conv, bn, block: cut(conv.weight),
    "a vector's size": lambda conv, bn, block: cut(bn.weight),
    "strides": lambda conv, bn, block: transpose(conv.weight),
    "swapped tensors": lambda conv, bn, block: torch.utils.swap_tensors(bn.weight, bn.bias),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_change_is_seen(change):
    model = block()
    guard = guard_of(list(model.modules()))
    assert guard.holds() and guard.holds()
    change(*model[:2], model)
    assert not guard.holds() and not guard.holds()


def test_what_does_not_count_is_looked_through_once_more():
    model = block()
    guard = guard_of(list(model.modules()))
    assert guard.holds()
    model[0].note = "an attribute that no op reads"
    model[1].train().eval()
    assert guard.holds() and guard.holds()


@pytest.mark.parametrize(
    ("owner", "name"), [(nn.Conv2d, "forward"), (torch.nn.functional, "conv2d")], ids=str
)
def test_replaced_code_is_seen_until_it_is_put_back(monkeypatch, owner, name):
    model = block()
    guard = guard_of(list(model.modules()))
    assert guard.holds()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, lambda *_: None)
        assert not guard.holds()
    assert guard.holds() and guard.holds()


def test_a_base_class_counts(monkeypatch):
    class Own(nn.ReLU):
        pass

    act = Own()
    guard = guard_of([act])
    assert guard.holds()
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x)
    assert not guard.holds()
