"""A live network never answers with an old weight, however its weights are changed."""

import functools
import gc
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import cvkernels
from tests.support.live_twins import AGAIN, CASES, Twins, convs_of, each_case, names_of, norms_of

VECTORS = "weight", "bias", "running_mean", "running_var"


def conv_weights(model):
    return [f"{name}.weight" for name in convs_of(model)]


def norm_vectors(model):
    return [f"{name}.{vector}" for name in norms_of(model) for vector in VECTORS]


def drawn(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator)
    return weight.detach() + 0.5 * weight.std().item() * noise


# Scenarios: each is given a network, changes it, and yields where the answers are to be compared.
# Those below are made of a function that says how.


# Vectors of order 1 need larger steps than weights do, to show.
STEPPED = {nn.BatchNorm2d: 10, nn.Conv2d: 0.5}


def stepped(kind, **options):
    def scenario(model, twins):
        for modules, larger in STEPPED.items():
            of_kind = [module for module in model.modules() if isinstance(module, modules)]
            parts = [p for module in of_kind for p in module.parameters(recurse=False)]
            optimiser = kind(parts, **options)
            optimiser.param_groups[0]["lr"] *= larger
            for _ in range(2):
                for parameter in parts:
                    parameter.grad = torch.randn_like(parameter)
                optimiser.step()
                yield f"of {modules.__name__}"

    return scenario


def written(paths, write):
    """``write`` each of these tensors past the version counter, and put it back."""

    def scenario(model, twins):
        for path in paths(model):
            module, _, name = path.rpartition(".")
            tensor = getattr(model.get_submodule(module), name)
            before, channel = tensor.detach().clone(), twins.shown_channel(path, write)
            write(tensor, channel)
            yield path
            tensor.data.copy_(before)
            yield f"{path}, put back"

    return scenario


def averaged(put):
    """An average is ``put`` in the place of the weights and out again, twice."""

    def scenario(model, twins):
        average = {
            name: parameter.detach()
            + 0.2 * parameter.std(correction=0) * torch.randn_like(parameter)
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 or "bias" not in name
        }
        for _ in range(2):
            kept = {name: put(model.get_parameter(name), average[name].clone()) for name in average}
            yield "in"
            for name, value in kept.items():
                put(model.get_parameter(name), value)
            yield "out"

    return scenario


def refreshed(which):
    """One weight of a filter is the one change that may go unseen, until it is announced."""

    def scenario(model, twins):
        for name in which(names_of(model, nn.Conv2d)):
            flat = model.get_submodule(name).weight.data.view(-1)
            flat[len(flat) // 2 + 1] += 30
        if model is twins.ours:
            cvkernels.refresh(model)
        yield "announced"

    return scenario


def exchanged(exchange):
    """Three in a row: the memory of the first may come back with the third."""

    def scenario(model, twins):
        for name in convs_of(model):
            conv = model.get_submodule(name)
            before = conv.weight.detach().clone()
            for seed in range(3):
                exchange(conv, drawn(before, seed))
                gc.collect(0)
                yield f"{name}, {seed}"
            exchange(conv, before)
            yield f"{name}, put back"

    return scenario


def loaded(assign):
    def scenario(model, twins):
        for seed in range(3):
            state = model.state_dict()
            for name, value in state.items():
                if value.dim() == 4:
                    state[name] = value + 0.1 * value.std() * torch.randn_like(value)
            model.load_state_dict(state, assign=assign)
            del state, value
            yield f"state {seed}"

    return scenario


# How a tensor is written, of which one channel is sure to show


def noise(weight, channel=None):
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


def whole_vector(vector, channel):
    vector.data.mul_(1.5).add_(0.5)


def one_element(vector, channel):
    vector.data[channel].add_(20)


def numpy_vector(vector, channel):
    view = vector.detach().numpy()
    view += 1


# How a parameter's values are replaced


def by_copy(parameter, value):
    kept = parameter.data.clone()
    parameter.data.copy_(value)
    return kept


def by_pointer(parameter, value):
    kept, parameter.data = parameter.data, value
    return kept


def swapped(conv, value):
    torch.utils.swap_tensors(conv.weight, nn.Parameter(value))


def plain_attribute(conv, value):
    del conv.weight
    conv.weight = value


def new_parameter(conv, value):
    conv.weight = nn.Parameter(value)


def data_pointer(conv, value):
    conv.weight.data = value


# Scenarios by themselves


def biases(model, twins):
    for name in convs_of(model):
        conv = model.get_submodule(name)
        if conv.bias is None:
            conv.bias = nn.Parameter(torch.full([conv.out_channels], 2.0))
            yield f"{name}, added"
        conv.bias.data.sub_(3)
        yield f"{name}, written"


def a_plain_attribute_written(model, twins):
    for name in convs_of(model):
        conv = model.get_submodule(name)
        before = conv.weight.detach().clone()
        plain_attribute(conv, drawn(before, 0))
        yield f"{name}, set"
        yield AGAIN
        conv.weight.numpy()[...] = drawn(before, 1).numpy()
        yield f"{name}, written"
        plain_attribute(conv, before)
        yield f"{name}, put back"


def norm_vectors_exchanged(model, twins):
    for name in norms_of(model):
        norm = model.get_submodule(name)
        for vector in VECTORS:
            before = getattr(norm, vector).detach()
            values = [before * (1.4 + 0.3 * seed) + 0.2 * (seed + 1) for seed in range(3)]
            for value in (*values, before.clone()):
                delattr(norm, vector)
                setattr(norm, vector, value)
                yield f"{name}.{vector}"


def tied(model, twins):
    by_shape = {}
    for name in names_of(model, nn.Conv2d):
        conv = model.get_submodule(name)
        by_shape.setdefault(conv.weight.shape, []).append(conv)
    first, second = next(convs for convs in by_shape.values() if len(convs) > 1)[:2]
    second.weight = first.weight
    yield "tied"
    yield AGAIN
    noise(first.weight)
    yield "written through the first"
    noise(second.weight)
    yield "written through the second"


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Buffer(torch.tensor(1.3))

    def forward(self, weight):
        return weight * self.factor


def parametrised(model, twins):
    for name in convs_of(model):
        conv = model.get_submodule(name)
        before = conv.weight.detach().clone()
        parametrize.register_parametrization(conv, "weight", Scaled())
        yield f"{name}, registered"
        noise(conv.parametrizations.weight.original)
        yield f"{name}, its original written"
        conv.parametrizations.weight[0].factor.data.mul_(0.6)
        yield f"{name}, its factor written"
        parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
        yield f"{name}, removed"
        conv.weight = nn.Parameter(before)


class Scenario(NamedTuple):
    run: Callable
    context: Callable = torch.no_grad  # of the calls


OPTIMISERS = {
    "sgd": functools.partial(stepped, torch.optim.SGD, lr=3e-3, momentum=0.9),
    "adam": functools.partial(stepped, torch.optim.Adam, lr=3e-3),
    "adamw": functools.partial(stepped, torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
}
CONV_WRITES = (noise, one_filter, one_input_channel, numpy_view, numpy_filter)
NORM_WRITES = (whole_vector, one_element, numpy_vector)
EXCHANGES = (swapped, plain_attribute, new_parameter, data_pointer)
SCENARIOS = {
    **{
        f"{name}-{implementation}": Scenario(make(**{implementation: True}))
        for name, make in OPTIMISERS.items()
        for implementation in ("fused", "foreach")
    },
    **{f"conv-{f.__name__}": Scenario(written(conv_weights, f)) for f in CONV_WRITES},
    **{f"norm-{f.__name__}": Scenario(written(norm_vectors, f)) for f in NORM_WRITES},
    **{
        f"average-{put.__name__}-{context.__name__}": Scenario(averaged(put), context)
        for put in (by_copy, by_pointer)
        for context in (torch.no_grad, torch.inference_mode)
    },
    "refreshed-one_weight": Scenario(refreshed(lambda names: names[len(names) // 2 :][:1])),
    "refreshed-every_weight": Scenario(refreshed(lambda names: names)),
    **{f"exchanged-{f.__name__}": Scenario(exchanged(f)) for f in EXCHANGES},
    "loaded-assign": Scenario(loaded(True)),
    "loaded-copy": Scenario(loaded(False)),
    **{
        f.__name__: Scenario(f)
        for f in (biases, a_plain_attribute_written, norm_vectors_exchanged, tied, parametrised)
    },
}


# Each scenario with all families, taking turns at drop-in modules and patched ones.
PAIRS = {
    f"{name}-{case}": (SCENARIOS[name], CASES[case])
    for first, name in enumerate(SCENARIOS)
    for second, case in enumerate(CASES)
    if (first + second // 2 + second) % 2 == 0
}


@pytest.mark.few(24)
@pytest.mark.parametrize(("scenario", "case"), PAIRS.values(), ids=PAIRS.keys())
def test_changes_are_followed(scenario, case):
    Twins(*case, scenario.context).follow(scenario.run)


@each_case
def test_functional_calls_are_followed(case):
    twins = Twins(*case)
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
