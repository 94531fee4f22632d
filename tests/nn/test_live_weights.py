"""A live network never answers with an old weight, nor past code that its owner replaced.

Each test warms a network's caches, makes one change to it and to its stock twin, and compares the
next answers. A change that does not show in stock's answer proves nothing, so it must show there.
"""

import contextlib
import copy
import functools
import gc
import json
import re
import traceback
import types
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cvkernels
from tests.support.model_checks import calibrated

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

# Of the largest logit: what rounding may cost, and what a change must make of stock's answer.
ROUNDING, VISIBLE = 1e-4, 1e-3


class Family(NamedTuple):
    """Stock's builders of a network, and the modules that people shard one by one."""

    stock: object
    patched: object
    sharded: str
    options: dict = {}


FAMILIES = {
    "googlenet": Family(
        torchvision.models.googlenet,
        torchvision.models.googlenet,
        r"inception\w+|conv\d",
        {"aux_logits": False, "init_weights": False},
    ),
    "resnet18": Family(torchvision.models.resnet18, torchvision.models.resnet18, r"layer\d\.\d"),
    "densenet121": Family(
        torchvision.models.densenet121,
        torchvision.models.densenet121,
        r"features\.(denseblock|transition)\d",
    ),
    "seresnet18": Family(timm.models.seresnet18, timm.models.seresnet18, r"layer\d\.\d"),
    "efficientnet_b0": Family(
        torchvision.models.efficientnet_b0,
        timm.models.efficientnet_b0,
        r"features\.\d\.\d|blocks\.\d\.\d",
    ),
}
CASES = {f"{name}-{how}": (name, how) for name in FAMILIES for how in ("drop_in", "patched")}


@functools.cache
def originals(name, how):
    """(ours, stock) of one state, never called in eval; copied for each test."""
    family = FAMILIES[name]
    options = {"num_classes": 50, **family.options}
    stock = calibrated(family.patched if how == "patched" else family.stock, **options)
    for norm in stock.modules():
        if isinstance(norm, nn.BatchNorm2d):
            # A channel that hardly varied would amplify any change, and rounding with it.
            norm.running_var.clamp_(min=norm.running_var.mean().item())
    if how == "patched":
        ours = copy.deepcopy(stock)
        cvkernels.patch(ours)
    else:
        ours = getattr(cvkernels.models, name)(**options).eval()
        ours.load_state_dict(stock.state_dict())
    return ours, stock


def largest(tensor):
    return tensor.detach().abs().max().item()


class Twins:
    """A network of ours and stock's with the same weights; ``check`` compares their answers."""

    def __init__(self, name, how, context=torch.no_grad, warm=True):
        self.name = name
        self.ours, self.stock = map(copy.deepcopy, originals(name, how))
        self.both = self.ours, self.stock
        self.x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        self.context, self.last = context, None
        self.last = self.answer(self.stock)
        for _ in range(3 if warm else 0):
            actual = self.answer(self.ours)
        if warm:
            self.compare(actual, self.last, "before the change", changed=False)

    def answer(self, model):
        with self.context():
            return model(self.x)

    def check(self, label, changed=True):
        """Ours answers as stock does; ``changed``, and stock not as it last did."""
        self.compare(*map(self.answer, self.both), label, changed)

    def compare(self, actual, expected, label, changed=True):
        scale = largest(expected)
        shown = largest(expected - self.last) / scale
        assert not changed or shown > VISIBLE, f"{label}: stock's answer moved by {shown:.1e} only"
        error, stale = largest(actual - expected) / scale, largest(actual - self.last) / scale
        kind = "the old answer" if stale <= ROUNDING else "neither the old answer nor the new one"
        if error > ROUNDING:
            # A change may make stock's own answer amplify rounding; nothing else may explain ours.
            exact = self.exact()
            stocks, ours = largest(expected - exact) / scale, largest(actual - exact) / scale
            assert ours <= 4 * stocks and stale > 10 * ours, f"{label}: off by {error:.1e}, {kind}"
        self.last = expected

    def exact(self):
        """Stock's answer in float64."""
        stock = copy.deepcopy(self.stock).double()
        for module in stock.modules():
            for name, value in module.__dict__.items():
                if isinstance(value, torch.Tensor):
                    module.__dict__[name] = value.double()
        with self.context():
            return stock(self.x.double())

    def written(self, write, label, *args):
        """``write`` both twins in turn, each with the same random numbers."""
        for model in self.both:
            torch.manual_seed(5)
            write(model, *args)
        self.check(label)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture
def twins(case):
    return Twins(*case)


def names_of(model, kinds):
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def convs_of(model):
    """The name of one convolution of each kind: of kernel, stride, depthwise or not, with bias."""
    kinds = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            kind = conv.kernel_size, conv.stride, conv.groups == 1, conv.bias is None
            kinds.setdefault(kind, []).append(name)
    return [names[len(names) // 2] for names in kinds.values()]


def norms_of(model):
    """The names of the first norm, one in the middle and the last."""
    names = names_of(model, nn.BatchNorm2d)
    return names[0], names[len(names) // 2], names[-1]


def trained(model, kinds):
    return [
        parameter
        for module in model.modules()
        if isinstance(module, kinds)
        for parameter in module.parameters(recurse=False)
    ]


# Optimisers


OPTIMISERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=3e-3, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=3e-3),
    "adamw": functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
}
# Vectors of order 1 need larger steps than weights do, to show.
STEPPED = {nn.BatchNorm2d: 10, nn.Conv2d: 0.5}


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS.keys())
def test_optimiser_steps(optimiser, implementation, twins):
    for kind, larger in STEPPED.items():
        parts = [trained(model, kind) for model in twins.both]
        made = [optimiser(part, **{implementation: True}) for part in parts]
        for optimiser_made in made:
            optimiser_made.param_groups[0]["lr"] *= larger
        for index in range(2):
            for ours, stock in zip(*parts, strict=True):
                stock.grad = torch.randn_like(stock)
                ours.grad = stock.grad.clone()
            for optimiser_made in made:
                optimiser_made.step()
            twins.check(f"step {index} of {kind.__name__}")


# Written past the version counter


def copied(weight, channel=None):
    weight.data.copy_(weight + 0.5 * weight.std() * torch.randn_like(weight))


def one_filter(weight, channel):
    weight.data[channel].add_(1)


def one_input_channel(weight, channel):
    weight.data[:, channel % weight.shape[1]].add_(1)


def numpy_view(weight, channel):
    view = weight.detach().numpy()
    view[...] = view[::-1].copy()


def numpy_filter(weight, channel):
    weight.detach().numpy()[channel] += 1


CONV_WRITES = {
    write.__name__: write
    for write in (copied, one_filter, one_input_channel, numpy_view, numpy_filter)
}


def shown_channel(twins, write, tensor):
    """The first channel in which ``write`` shows: in some, ReLU gives zeros before and after."""
    before = tensor.detach().clone()
    for channel in range(len(tensor)):
        write(tensor, channel)
        moved = largest(twins.answer(twins.stock) - twins.last) / largest(twins.last)
        tensor.data.copy_(before)
        if moved > 2 * VISIBLE:
            return channel
    raise AssertionError("the change shows in no channel")


def check_written(twins, write, path):
    """``write`` the tensor of that name past the version counter, and put it back."""
    module, _, name = path.rpartition(".")
    tensors = [getattr(model.get_submodule(module), name) for model in twins.both]
    before, original = tensors[1].detach().clone(), twins.last
    channel = shown_channel(twins, write, tensors[1])
    for tensor in tensors:
        torch.manual_seed(5)
        write(tensor, channel)
    twins.check(path)
    for tensor in tensors:
        tensor.data.copy_(before)
    twins.last = original


@pytest.mark.parametrize("write", CONV_WRITES.values(), ids=CONV_WRITES.keys())
def test_convolution_weights_written(write, twins):
    for name in convs_of(twins.stock):
        check_written(twins, write, f"{name}.weight")


def test_convolution_biases_written(twins):
    for name in convs_of(twins.stock):
        if twins.stock.get_submodule(name).bias is not None:
            twins.written(
                lambda model, name=name: model.get_submodule(name).bias.data.sub_(3), name
            )


VECTORS = "weight", "bias", "running_mean", "running_var"


def whole_vector(vector, channel):
    vector.data.mul_(1.5).add_(0.5)


def one_element(vector, channel):
    vector.data[channel].add_(20)


def numpy_vector(vector, channel):
    view = vector.detach().numpy()
    view += 1


VECTOR_WRITES = {write.__name__: write for write in (whole_vector, one_element, numpy_vector)}


@pytest.mark.parametrize("write", VECTOR_WRITES.values(), ids=VECTOR_WRITES.keys())
def test_norms_written(write, twins):
    for name in norms_of(twins.stock):
        for vector in VECTORS:
            check_written(twins, write, f"{name}.{vector}")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("by", ["copy", "pointer"])
def test_an_average_swapped_in_and_out(by, context, case):
    twins = Twins(*case, context)
    torch.manual_seed(3)
    average = {
        name: parameter.detach() + 0.2 * parameter.std(correction=0) * torch.randn_like(parameter)
        for name, parameter in twins.stock.named_parameters()
        if parameter.dim() > 1 or "bias" not in name
    }
    for index in range(2):
        kept = []
        for model in twins.both:
            kept.append({})
            for name, value in average.items():
                parameter = model.get_parameter(name)
                if by == "copy":
                    kept[-1][name] = parameter.data.clone()
                    parameter.data.copy_(value)
                else:
                    kept[-1][name], parameter.data = parameter.data, value.clone()
        twins.check(f"in, {index}")
        for model, values in zip(twins.both, kept, strict=True):
            for name, value in values.items():
                parameter = model.get_parameter(name)
                if by == "copy":
                    parameter.data.copy_(value)
                else:
                    parameter.data = value
        twins.check(f"out, {index}")


@pytest.mark.parametrize("kind", ["one_weight", "every_weight"])
def test_refresh_after_single_weights(kind, twins):
    """One weight of a filter is the one change that may go unseen, until it is announced."""

    def write(model):
        names = names_of(model, nn.Conv2d)
        for name in names[len(names) // 2 :][:1] if kind == "one_weight" else names:
            flat = model.get_submodule(name).weight.data.view(-1)
            flat[len(flat) // 2 + 1] += 30

    for model in twins.both:
        write(model)
    cvkernels.refresh(twins.ours)
    twins.check("refreshed")


# Another process


def learn(received, done):
    """Multiply what is received, until there is no more."""
    torch.set_num_threads(1)
    while (tensors := received.get()) is not None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.mul_(-0.7)
        del tensors, tensor
        done.put(True)


@pytest.fixture(scope="module")
def learner():
    """What has another process write the tensors of this one that it is given."""
    context = torch.multiprocessing.get_context("spawn")
    received, done = context.SimpleQueue(), context.Queue()
    process = context.Process(target=learn, args=(received, done), daemon=True)
    process.start()

    def write(tensors):
        received.put(tensors)
        assert done.get(timeout=120)

    yield write
    received.put(None)
    process.join(60)


@pytest.mark.parametrize("warm", [True, False], ids=["warm_before", "shared_before"])
def test_another_process_writes(warm, learner, case):
    twins = Twins(*case, warm=warm)
    twins.ours.share_memory()
    twins.check("shared", changed=False)
    twins.check("shared", changed=False)
    convs = [f"{name}.weight" for name in convs_of(twins.stock)]
    norms = [f"{name}.{vector}" for name in norms_of(twins.stock) for vector in ("weight", "bias")]
    statistics = [f"{norms_of(twins.stock)[1]}.{vector}" for vector in ("running_mean",)]
    for index, names in enumerate((convs, norms, statistics)):
        state = twins.ours.state_dict(keep_vars=True)
        learner([state[name].detach() for name in names])
        twins.stock.load_state_dict(twins.ours.state_dict())
        twins.check(f"written by another process, {index}")


# Sharded


UPDATES = 12
# What a patched block does with its parameters does not depend on who gathers them.
SHARDED = {
    f"{key}-{parts}": (*case, parts)
    for key, case in CASES.items()
    for parts in (("blocks",) if case[1] == "patched" else ("blocks", "whole"))
}


def shard(model, pattern, parts, mesh):
    """Each block, or only the whole; parameters are dropped after each forward."""
    if parts == "blocks":
        for name, module in model.named_modules():
            if re.fullmatch(pattern, name):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def sharded_errors(name, how, parts, mesh):
    """What went wrong in each update, as said by :meth:`Twins.check`."""
    twins = Twins(name, how, warm=False)
    shard(twins.ours, FAMILIES[name].sharded, parts, mesh)
    for _ in range(3):
        twins.check("before", changed=False)
    optimisers = [torch.optim.SGD(model.parameters(), lr=2e-3) for model in twins.both]
    torch.manual_seed(7)
    errors = []
    for index in range(UPDATES):
        for ours, stock in zip(*(model.parameters() for model in twins.both), strict=True):
            stock.grad = torch.randn_like(stock)
            # Each rank has drawn the whole, and takes its part without asking the others.
            ours.grad = distribute_tensor(
                stock.grad, ours.device_mesh, ours.placements, src_data_rank=None
            )
        for optimiser in optimisers:
            optimiser.step()
        answers = list(map(twins.answer, twins.both))
        try:
            twins.compare(*answers, f"update {index}")
        except AssertionError as error:
            errors.append(str(error).partition("\n")[0])
        twins.last = answers[1]
    return errors


def evaluate_sharded(rank, world, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh = dist.init_device_mesh("cpu", (world,))
    results = {}
    for key, (*case, parts) in SHARDED.items():
        try:
            results[key] = sharded_errors(*case, parts, mesh)
        except Exception:
            results[key] = [traceback.format_exc()]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def sharded(request, tmp_path_factory):
    """All errors of all cases on each rank; the processes are started once for all tests."""
    folder, world = tmp_path_factory.mktemp("sharded"), request.param
    torch.multiprocessing.spawn(evaluate_sharded, (world, str(folder)), nprocs=world)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("key", SHARDED)
def test_sharded(key, sharded):
    errors = [error for results in sharded for error in results[key]]
    assert not errors, f"{len(errors)} of {UPDATES * len(sharded)}: {errors[0]}"


# Other tensors at the same names


def drawn(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator)
    return weight.detach() + 0.5 * weight.std().item() * noise


def swapped(conv, value):
    torch.utils.swap_tensors(conv.weight, nn.Parameter(value))


def plain_attribute(conv, value):
    del conv.weight
    conv.weight = value


def new_parameter(conv, value):
    conv.weight = nn.Parameter(value)


def data_pointer(conv, value):
    conv.weight.data = value


EXCHANGES = {
    exchange.__name__: exchange
    for exchange in (swapped, plain_attribute, new_parameter, data_pointer)
}


@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES.keys())
def test_weights_exchanged(exchange, twins):
    """Three in a row: the memory of the first may come back with the third."""
    for name in convs_of(twins.stock):
        before = twins.stock.get_submodule(name).weight.detach().clone()
        for seed in range(3):
            for model in twins.both:
                exchange(model.get_submodule(name), drawn(before, seed))
            gc.collect(0)
            twins.check(f"{name}, {seed}")
        for model in twins.both:
            exchange(model.get_submodule(name), before.clone())
        twins.check(f"{name}, put back")


def test_a_plain_attribute_written(twins):
    for name in convs_of(twins.stock):
        before = twins.stock.get_submodule(name).weight.detach().clone()
        for model in twins.both:
            plain_attribute(model.get_submodule(name), drawn(before, 0))
        twins.check(f"{name}, set")
        twins.check(f"{name}, again", changed=False)
        for model in twins.both:
            model.get_submodule(name).weight.numpy()[...] = drawn(before, 1).numpy()
        twins.check(f"{name}, written")
        for model in twins.both:
            plain_attribute(model.get_submodule(name), before.clone())
        twins.check(f"{name}, put back")


def test_norm_vectors_exchanged(twins):
    def put(name, vector, value):
        for model in twins.both:
            norm = model.get_submodule(name)
            delattr(norm, vector)
            setattr(norm, vector, value.clone())

    for name in norms_of(twins.stock):
        for vector in VECTORS:
            before = getattr(twins.stock.get_submodule(name), vector).detach()
            for seed in range(3):
                put(name, vector, before * (1.4 + 0.3 * seed) + 0.2 * (seed + 1))
                twins.check(f"{name}.{vector}, {seed}")
            put(name, vector, before)
            twins.check(f"{name}.{vector}, put back")


def test_functional_call(twins):
    for name in convs_of(twins.stock):
        before = twins.last
        for seed in range(3):
            weights = {f"{name}.weight": drawn(twins.stock.get_submodule(name).weight, seed)}
            with torch.no_grad():
                answers = [functional_call(model, weights, (twins.x,)) for model in twins.both]
            twins.compare(*answers, f"{name}, {seed}")
            del weights
        twins.check(f"{name}, without")
        assert torch.equal(twins.last, before)


def test_tied_weights_written(twins):
    by_shape = {}
    for name in names_of(twins.stock, nn.Conv2d):
        shape = twins.stock.get_submodule(name).weight.shape
        by_shape.setdefault(shape, []).append(name)
    first, second = next(names for names in by_shape.values() if len(names) > 1)[:2]
    for model in twins.both:
        model.get_submodule(second).weight = model.get_submodule(first).weight
    twins.check("tied")
    twins.check("tied", changed=False)
    twins.written(
        lambda model: copied(model.get_submodule(first).weight), "written through the first"
    )
    twins.written(lambda model: copied(model.get_submodule(second).weight), "through the second")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Buffer(torch.tensor(1.3))

    def forward(self, weight):
        return weight * self.factor


def test_parametrised_weights(twins):
    for name in convs_of(twins.stock):
        before = twins.stock.get_submodule(name).weight.detach().clone()

        def change(model, what, name=name):
            conv = model.get_submodule(name)
            if what == "registered":
                parametrize.register_parametrization(conv, "weight", Scaled())
            elif what == "original":
                copied(conv.parametrizations.weight.original)
            elif what == "factor":
                conv.parametrizations.weight[0].factor.data.mul_(0.6)
            else:
                parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)

        for what in ("registered", "original", "factor", "removed"):
            twins.written(change, f"{name}, {what}", what)
        for model in twins.both:
            model.get_submodule(name).weight = nn.Parameter(before.clone())


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_states_loaded(assign, twins):
    for seed in range(3):
        for model in twins.both:
            torch.manual_seed(seed)
            state = model.state_dict()
            for name, value in state.items():
                if value.dim() == 4:
                    state[name] = value + 0.1 * value.std() * torch.randn_like(value)
            model.load_state_dict(state, assign=assign)
            del state, value
        twins.check(f"state {seed}")


# Code replaced


def bent(counts, function, by=0.1):
    """function, counted and with another answer."""

    def replaced(*args, **kwargs):
        counts[function] += 1
        y = function(*args, **kwargs)
        return y + by * y.tanh()

    return replaced


def kind_of(model, kinds):
    """The class of the model's modules of these kinds, which may derive from stock PyTorch's."""
    found = {type(module) for module in model.modules() if isinstance(module, kinds)}
    return found.pop() if len(found) == 1 else None


ACTIVATIONS = (nn.ReLU, nn.SiLU)
FORWARDS = {
    "norm_forward": (nn.BatchNorm2d, "forward"),
    "conv_forward": (nn.Conv2d, "forward"),
    "conv__conv_forward": (nn.Conv2d, "_conv_forward"),
    "act_forward": (ACTIVATIONS, "forward"),
    "pool_forward": (nn.MaxPool2d, "forward"),
}
FUNCTIONS = ("batch_norm", "conv2d", "relu", "silu", "max_pool2d")
# What a network does not call.
ABSENT = {
    "googlenet": ("act_forward", "silu"),
    "resnet18": ("silu",),
    "densenet121": ("silu",),
    "seresnet18": ("silu",),
    "efficientnet_b0": ("pool_forward", "max_pool2d", "relu"),
}
BY_NETWORK = {
    f"{key}-{what}": (case, what)
    for what in (*FORWARDS, *FUNCTIONS)
    for key, case in CASES.items()
    if what not in ABSENT[case[0]]
}
replaced_code = pytest.mark.parametrize(("case", "what"), BY_NETWORK.values(), ids=BY_NETWORK)
replaced_forward = pytest.mark.parametrize(
    ("case", "what"), [v for v in BY_NETWORK.values() if v[1] in FORWARDS],
    ids=[key for key, (_, what) in BY_NETWORK.items() if what in FORWARDS],
)  # fmt: skip
warmth = pytest.mark.parametrize("warm", [False, True], ids=["before_first_call", "after"])


def replace(patch, what, stock, counts):
    """Replace a method on its class, or a function of torch.nn.functional."""
    if what in FUNCTIONS:
        owner, name = F, what
    else:
        owner, name = FORWARDS[what]
        owner = kind_of(stock, owner)
    patch.setattr(owner, name, bent(counts, getattr(owner, name)))


def answers_counted(twins, counts):
    """The answers of ours and stock's, and what was counted for each."""
    answers, counted = [], []
    for model in twins.both:
        counts.clear()
        answers.append(twins.answer(model))
        counted.append(dict(counts))
    return answers, counted


@replaced_code
@warmth
def test_code_replaced(warm, case, what, monkeypatch):
    twins, counts = Twins(*case, warm=warm), Counter()
    with monkeypatch.context() as patch:
        replace(patch, what, twins.stock, counts)
        answers, counted = answers_counted(twins, counts)
        assert sum(counted[1].values()) > 0
        twins.compare(*answers, "replaced")
        assert counted[0] == counted[1]
        twins.check("replaced, again", changed=False)
    twins.check("restored")


@replaced_forward
@warmth
def test_an_instance_s_method_replaced(warm, case, what):
    twins = Twins(*case, warm=warm)
    kinds, method = FORWARDS[what]
    names = names_of(twins.stock, kinds)
    for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
        answers, counted = [], []
        for model in twins.both:
            module, counts = model.get_submodule(name), Counter()
            function = bent(counts, getattr(type(module), method), by=3)
            # A bound method, which a copy of the network binds to the copy.
            module.__dict__[method] = types.MethodType(function, module)
            answers.append(twins.answer(model))
            counted.append(dict(counts))
        twins.compare(*answers, f"{name}, replaced")
        assert counted[0] == counted[1] != {}
        for model in twins.both:
            del model.get_submodule(name).__dict__[method]
        twins.check(f"{name}, restored")


# Modes


LAYERS = ("conv", "batch_norm")


class FunctionsSeen(TorchFunctionMode):
    def __init__(self, bend=False):
        super().__init__()
        self.counts, self.bend = Counter(), bend

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        name = resolve_name(function) or getattr(function, "__name__", "")
        if name.startswith("torch.") and any(layer in name for layer in LAYERS):
            self.counts[name] += 1
            y = y + 0.1 * y.tanh() if self.bend else y
        return y


class OpsSeen(TorchDispatchMode):
    def __init__(self, bend=False):
        super().__init__()
        self.counts, self.bend = Counter(), bend

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        y = op(*args, **(kwargs or {}))
        name = op._schema.name
        if name.startswith("aten::") and any(layer in name for layer in LAYERS):
            self.counts[name] += 1
            if self.bend:
                first, *rest = y if isinstance(y, tuple) else (y,)
                first = first + 0.1 * first.tanh()
                y = (first, *rest) if isinstance(y, tuple) else first
        return y


MODES = {"functions": FunctionsSeen, "ops": OpsSeen}
modes = pytest.mark.parametrize("kind", MODES.values(), ids=MODES.keys())


@modes
@pytest.mark.parametrize("bend", [False, True], ids=["watches", "changes"])
def test_modes(kind, bend, twins):
    answers, counted = [], []
    for model in twins.both:
        with kind(bend) as mode:
            answers.append(twins.answer(model))
        counted.append(mode.counts)
    layers = len(names_of(twins.stock, (nn.Conv2d, nn.BatchNorm2d)))
    assert sum(counted[1].values()) >= layers
    assert counted[0] == counted[1]
    twins.compare(*answers, "under the mode", changed=bend)
    twins.check("without the mode", changed=bend)


def test_flops_counted(twins):
    totals = []
    for model in twins.both:
        with FlopCounterMode(display=False) as counter:
            twins.answer(model)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


# Training


TRAINED_UNDER = ("nothing", "norm_forward", "conv_forward", "batch_norm", "conv2d", *MODES)


@pytest.mark.parametrize("what", TRAINED_UNDER)
def test_training(what, case, monkeypatch):
    """Loss and gradients, in float64: deep networks' float32 gradients are mostly rounding."""
    twins = Twins(*case, warm=False)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    results, counted = [], []
    for model in twins.both:
        counts = Counter()
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            if what in MODES:
                # The backward's convolutions are not all ours to repeat: the forward's are.
                counts = stack.enter_context(MODES[what](bend=what == "functions")).counts
            elif what != "nothing":
                replace(patch, what, twins.stock, counts)
            torch.manual_seed(4)
            loss = model.double().train()(x).square().mean()
            counted.append(dict(counts))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss.detach(), *gradients, *model.buffers()])
    assert what == "nothing" or sum(counted[1].values()) > 0
    names = ["loss", *(name for name, _ in twins.stock.named_parameters())]
    names += [name for name, _ in twins.stock.named_buffers()]
    for name, actual, expected in zip(names, *results, strict=True):
        error = largest(actual.double() - expected.double())
        # A convolution before a norm has a bias or a scale without gradient, but for rounding.
        allowed = 1e-8 * max(largest(expected), 1e-3)
        assert error <= allowed, f"{name}: {error:.1e} of {largest(expected):.1e}"
    assert counted[0] == counted[1]
