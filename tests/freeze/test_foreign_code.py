"""Frozen models whose forward is other people's: views, writes in place, sizes, wrappers."""

import threading
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import cvkernels
from tests.support.pairs import calibrate
from tests.support.random_networks import attempt, check_frozen


class Net(nn.Module):
    """``function(self, conv(x))``."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.other = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8))
        self.bn = nn.BatchNorm2d(8)
        self.function = function

    def forward(self, x):
        return self.function(self, self.conv(x))


def writes_a_chunk(net, f):
    first, _ = f.chunk(2, 1)
    first.mul_(3)
    return f


def writes_a_channel(net, f):
    f[:, 3].mul_(30)
    return net.other(f)


def writes_a_part_of_an_unbound_map(net, f):
    f.unbind(1)[0].add_(1)
    return net.other(f)


def writes_both_parts(net, f):
    a, b = f.split([3, 5], 1)
    b.relu_()
    a.sigmoid_()
    return net.other(f) * 2


def adds_to_a_map_in_use(net, h):
    k = h
    h += net.other(h)
    return k * h


def subtracts_from_a_map_in_use(net, h):
    k = h.view(h.shape[0], -1)
    h -= 1
    h *= 2
    return k + 1


def activates_a_viewed_map(net, f):
    v = f.view(f.size(0), -1)
    f.relu_()
    return v


def activates_a_flattened_map(net, f):
    return F.relu(f.flatten(1), inplace=True), f


def activates_a_transposed_map(net, f):
    t = f.transpose(1, 2)
    F.relu(f, inplace=True)
    return t + 1, f


def activates_far_behind_a_view(net, f):
    v = f.view(f.size(0), 8, -1)
    y = net.bn(net.other(f))
    f.relu_()
    return y.mean(), v, net.other(f)


def writes_a_permuted_map(net, f):
    torch.einsum("nchw->nhwc", f).mul_(2)
    return net.other(f)


def writes_a_detached_map(net, f):
    f.detach().zero_()
    return net.bn(f)


def writes_what_a_conversion_returns(net, f):
    f.float().relu_()
    f.round().add_(1)
    return net.other(f)


def writes_out(net, f):
    g = net.other(f)
    torch.add(f, g, out=g)
    return g * f


def writes_a_stack_alone(net, f):
    return torch.stack(f.chunk(2, 1), 1).flatten(1, 2).add_(f), f


def adds_a_shortcut_in_place(net, f):
    out = net.bn(net.other(f))
    out += f
    return F.relu_(out)


def takes_sizes(net, f):
    b, c, h, w = f.shape
    return net.bn(f).view(b, c, h * w).softmax(-1), f.reshape(b, c, h * w)


def computes_with_sizes(net, f):
    count = f.size(0)
    before = count
    count += 1
    return f * before + count + f / f.numel()


def mean_of_one_axis(net, f):
    return f.mean(1, keepdim=True), f.mean(3).mean(2), f.flatten(2).mean(-1), f.mean(-1)


def pools_the_whole_map(net, f):
    sizes = F.avg_pool2d(f, f.size()[2:]), F.avg_pool2d(f, (f.size(-2), f.size(-1)))
    return *sizes, F.max_pool2d(f, f.shape[2:])


def generalised_mean(net, f):
    return F.avg_pool2d(f.clamp(min=1e-6).pow(3), (f.size(-2), f.size(-1))).pow(1 / 3)


def concatenates_chunks(net, f):
    a, b = torch.split(f, 4, 1)
    return torch.cat(f.chunk(2, 1), 1), torch.cat([b, a], 1)


def concatenates_two_dtypes(net, f):
    return torch.cat([f, f.double()], 1), f + f.double(), (f > 0) * f


def views_across_channels(net, f):
    b, c, h, w = f.shape
    return net.other(f).view(b, c * h, w), net.other(f).view(b, -1, 2), net.bn(f)


def expands(net, f):
    return f.mean((2, 3), keepdim=True).expand_as(f) + f


FUNCTIONS = [
    function
    for function in list(globals().values())
    if isinstance(function, types.FunctionType) and function.__code__.co_varnames[:1] == ("net",)
]


def tuple_of(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_frozen_as_stock(model, *images, **options):
    """Later calls too, which repeat what the first one recorded."""
    frozen = cvkernels.freeze(model, images[0], **options)
    for image in (*images, images[0]):
        given = image.clone()
        with torch.no_grad():
            expected = model(image.clone())
        for ours, stock in zip(tuple_of(frozen(given)), tuple_of(expected), strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
            assert ours.is_contiguous() or not stock.is_contiguous()
        assert torch.equal(given, image)


def images():
    return torch.randn(2, 3, 12, 12), torch.randn(3, 3, 9, 14)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_what_a_forward_does_with_its_maps(function):
    model = Net(function).eval()
    nn.init.uniform_(model.bn.running_mean)
    assert_frozen_as_stock(model, *images())


def head():
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.mark.parametrize("place", [0, 1, 2, 3, 5])
def test_a_forward_of_one_module_alone(place):
    model = head()
    part, forward = model[place], type(model[place]).forward
    part.forward = lambda x: 0.5 * forward(part, x)
    assert_frozen_as_stock(model, *images())


def test_a_forward_put_on_a_class(monkeypatch):
    def of_the_batch(self, x):
        return F.batch_norm(x, x.mean((0, 2, 3)), x.var((0, 2, 3)), self.weight, self.bias)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", of_the_batch)
    assert_frozen_as_stock(head(), *images())


class Reads(nn.Module):
    """A part, and what it was given, which a hook on the part may have written."""

    def __init__(self, part):
        super().__init__()
        self.conv, self.part = nn.Conv2d(3, 8, 3), part

    def forward(self, x):
        f = self.conv(x)
        g = f.view_as(f)
        return self.part(g) + f, g


@pytest.mark.parametrize("part", [nn.Identity(), nn.ReLU(), nn.ReLU(True), nn.Conv2d(8, 8, 1)])
@pytest.mark.parametrize("written", ["input", "output"])
def test_a_hook_that_writes(part, written):
    model = Reads(part).eval()

    def hook(module, args, out):
        (args[0] if written == "input" else out).mul_(2)

    handle = part.register_forward_hook(hook)
    assert_frozen_as_stock(model, *images())
    handle.remove()


class TwoDepthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1)
        self.parts = nn.ModuleList(
            nn.Conv2d(16, 16, k, padding=k // 2, groups=16) for k in (3, 5, 7)
        )

    def forward(self, x):
        x = self.first(x)
        return torch.cat([part(x) for part in self.parts], 1)


def test_depthwise_convolutions_into_one_concatenation():
    assert_frozen_as_stock(TwoDepthwise().eval(), *images())


class Normalised(nn.Module):
    """With a buffer, a parameter and numbers made of them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.net, self.scale = head(), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.net((x - self.mean) / (self.mean + 0.5)) * self.scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_buffers_and_parameters_have_the_dtype(dtype):
    model, x = Normalised().eval(), images()[0]
    y = cvkernels.freeze(model, x, dtype=dtype)(x.to(dtype))
    assert y.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(y.float(), model(x), rtol=0.03, atol=0.03)
    assert_frozen_as_stock(model, x)


class AnyNumber(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.net, self.function = head(), function

    def forward(self, *images):
        return self.function(self, images)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, images: self.net(images[0]),
        lambda self, images: self.net(*images),
        lambda self, images: torch.cat([self.net(x) for x in images]),
    ],
)
def test_a_forward_of_any_number_of_images(function):
    assert_frozen_as_stock(AnyNumber(function).eval(), *images())


class AnyNumberAndOptions(AnyNumber):
    def forward(self, *images, doubled=True, **options):
        return self.function(self, images) * (2 if doubled else 1)


def test_a_forward_of_any_number_of_images_and_options():
    model = AnyNumberAndOptions(lambda self, images: self.net(images[0])).eval()
    assert_frozen_as_stock(model, *images())


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, torch.compile])
def test_what_wraps_a_network(wrap):
    model, x = head(), images()[0]
    frozen = cvkernels.freeze(wrap(model).eval(), x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_a_process_group_wraps():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model, x = head(), images()[0]
        frozen = cvkernels.freeze(nn.parallel.DistributedDataParallel(model).eval(), x)
    finally:
        torch.distributed.destroy_process_group()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnetaa34d", "efficientnet_cc_b0_4e", "mixnet_s"])
def test_timms_networks_at_another_size(name):
    model = pytest.importorskip("timm").create_model(name, num_classes=10)
    model = calibrate(model.eval(), only_norms=True)
    frozen = cvkernels.freeze(model, torch.randn(1, 3, 64, 64))
    for size in ((64, 64), (48, 64), (96, 64)):
        assert_as_stock(frozen, model, torch.randn(2, 3, *size))


@torch.no_grad()
def assert_as_stock(frozen, model, x):
    """The same values, or an error where stock raises one."""
    expected, found = attempt(model, x), attempt(frozen, x)
    if isinstance(expected, Exception):
        assert isinstance(found, Exception), f"stock raises {expected}"
    else:
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_a_dynamically_quantised_layer():
    model = torch.ao.quantization.quantize_dynamic(head(), {nn.Linear})
    assert_frozen_as_stock(model, *images())


@pytest.mark.parametrize(
    "draw",
    [torch.randn_like, lambda x: torch.rand(x.shape), lambda x: F.dropout(x, 0.5, True)],
)
def test_random_numbers_are_drawn_in_each_call(draw):
    frozen = cvkernels.freeze(Net(lambda net, f: f + draw(f)).eval(), images()[0])
    x = images()[0]
    assert not torch.equal(frozen(x), frozen(x))


class WritesByTheData(nn.Module):
    """Which torch.fx cannot see through."""

    def forward(self, x):
        if x.sum() > -1e9:
            x.relu_()
        return x.flip(1)


def watched(module, hook):
    module.register_forward_hook(hook)
    return module


def with_forward(module, forward):
    module.forward = forward
    return module


WRITERS = {
    "hook": lambda: watched(nn.SiLU(True), lambda module, args, out: out * 2),
    "returning-hook": lambda: watched(nn.Conv2d(8, 8, 1), lambda module, args, out: args[0]),
    "forward": lambda: with_forward(nn.ReLU(True), lambda x: F.relu_(x).flip(1)),
    "other-shape": lambda: with_forward(nn.ReLU(True), lambda x: F.relu_(x).flatten(1)),
    "untraceable": WritesByTheData,
}


@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
def test_a_module_that_writes_what_it_does_not_return(make):
    net = Net(lambda net, f: (f.flatten(1), net.child(f).add_(1), net.other(f)))
    net.child = make()
    assert_frozen_as_stock(net.eval(), *images())
    net.function = lambda net, f: net.child(net.other(f).relu())
    assert_frozen_as_stock(net, *images())


class DrawsByTheData(nn.Module):
    def forward(self, x):
        return x + torch.rand(1) if x.sum() > 1e9 - torch.rand(1) else x


@pytest.mark.parametrize(
    "child",
    [
        torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(True))),
        torch.jit.trace(nn.Conv2d(8, 8, 1), torch.ones(1, 8, 4, 4)),
        DrawsByTheData(),
    ],
    ids=["scripted", "traced", "draws"],
)
def test_a_child_that_cannot_be_traced(child):
    net = Net(lambda net, f: net.other(net.child(f)))
    net.child = child
    assert_frozen_as_stock(net.eval(), *images())


def test_an_untraceable_module_that_writes_the_image():
    assert_frozen_as_stock(nn.Sequential(WritesByTheData(), head()).eval(), *images())


class Counts(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.count = count

    def forward(self, x):
        self.count(self)
        return x * self.calls


def count_by_operator(module):
    module.calls += 1


def test_what_a_forward_keeps_is_no_stand_in():
    def keeps(net, f):
        net.features = f
        return net.other(f)

    model = Net(keeps).eval()
    assert_frozen_as_stock(model, *images())
    del model.features
    cvkernels.freeze(model, images()[0])
    assert not hasattr(model, "features")


class Assigns(nn.Module):
    def forward(self, x):
        x[:, 0] = 0
        return x


class HoldsALock(WritesByTheData):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class RefusesBlankImages(nn.Module):
    def forward(self, x):
        if not x.any():
            raise ValueError("a blank image")
        return x


def inside(child):
    """``child`` as module "1.block" of a network."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(OrderedDict(block=child))).eval()


class OfMaps(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, f):
        return self.function(f)


class OfTwo(nn.Module):
    def forward(self, x, y):
        return x + y


ITS_PART = "or freeze the part (of the model )?around it"
# The model, and what its error says: the module, what of it, and the way out.
REFUSED = {
    "noise": (
        inside(OfMaps(lambda f: f + torch.randn(1, 8, 1, 1))),
        "OfMaps.forward at '1.block' draws random numbers", "rand_like.*" + ITS_PART,
    ),
    "noise-of-a-buffer": (
        inside(Counts(lambda module: F.dropout(module.calls, 0.5, True))),
        "Counts.forward at '1.block' draws random numbers", "rand_like.*" + ITS_PART,
    ),
    "iadd": (
        inside(Counts(count_by_operator)),
        "Counts.forward at '1.block' writes '1.block.calls' in place", "compute a new value.*",
    ),
    "add_": (
        inside(Counts(lambda module: module.calls.add_(1))),
        "Counts.forward at '1.block' writes '1.block.calls' in place", "compute a new value.*",
    ),
    "copy": (
        inside(HoldsALock()),
        "HoldsALock.forward at '1.block' is called as it is .*symbolically traced.*lock",
        "give the module a __deepcopy__, " + ITS_PART,
    ),
    "zeros": (
        inside(RefusesBlankImages()),
        r"layer '1.block' calls RefusesBlankImages, .*zeros of shape \[2, 8, 12, 12\], and that "
        "raises ValueError: a blank image", "around the layer",
    ),
    "size": (
        inside(OfMaps(lambda f: f.view(-1, 7, 3))),
        "layer '1.block' calls reshape, .*RuntimeError: shape", "give images of a size",
    ),
    "channels": (
        inside(nn.Conv2d(9, 8, 1)), r"layer '1.block' \(conv\) takes 9 channels", "give images",
    ),
    "setitem": (Assigns(), "Assigns.forward cannot be captured: .*item assignment", ITS_PART),
    "data": (
        Net(lambda net, f: setattr(net.other.weight, "data", f) or f),
        "Net.forward cannot be captured: an assignment to .data", ITS_PART,
    ),
    "iterates": (
        Net(lambda net, f: sum(row for row in net.bn(f))),
        "Net.forward cannot be captured: .*iterated", "move that into a child.*" + ITS_PART,
    ),
    "two": (OfTwo(), "forward takes y besides", "wrap the model in a module"),
    "scripted": (torch.jit.script(head()), "it is scripted", "before scripting it, or wrap it"),
    "training": (
        inside(nn.Dropout()).requires_grad_(False), "its module '1.block' is in training mode",
        "call model.eval",
    ),
    "device": (
        inside(nn.Conv2d(8, 8, 1, device="meta")), "cpu \\('0.weight'\\), meta \\('1.block.weight'",
        "move one with .to()",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "what", "way_out"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_the_module_and_the_way_out_and_changes_nothing(model, what, way_out):
    model = model.eval()
    if "training" in what:
        model.get_submodule("1.block").train()
    x = images()[0]

    def facts():
        modules = [dict(module.__dict__) for module in model.modules()]  # hooks and flags, too
        torch.manual_seed(1)
        try:
            return modules, model(x.clone()).detach()
        except (RuntimeError, TypeError) as error:
            return modules, str(error)

    before = facts()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(2)
    drawn = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"(?s){what}.*;.*{way_out}"):
        cvkernels.freeze(model, x)
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, state[name])
        if name.endswith("calls"):
            tensor.zero_()  # The model itself has written it.
    assert str(facts()) == str(before)


@pytest.mark.tens_of_networks(30)
def test_random_networks(tens):
    for seed in range(10 * tens, 10 * tens + 10):
        check_frozen(seed)
