"""Derivatives of gradients in training are stock's, whatever they are taken of, and past what."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cvkernels.nn import ConvBNAct
from tests.support import pairs
from tests.support.model_checks import Concatenated, builders, counterpart
from tests.support.pairs import calibrate, gradients, loss_of, spread_norms
from tests.support.training_nets import (
    each_block,
    each_network,
    image,
    training_pair,
)
from tests.training.test_backward import FROZEN, PARTS, Sink, maps_of

FAMILIES = ["googlenet", "resnet50", "densenet121", "seresnet50", "efficientnet_b0"]


def assert_equal(ours, stock):
    """Tensor by tensor, by their norms."""
    # A bias before a norm over the batch has the gradient zero, and rounding around it.
    rounding = 1e-12 * max(t.norm() for t in stock if t is not None and t.is_floating_point())
    for actual, expected in zip(ours, stock, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            error = (actual - expected).double().norm()
            assert error <= 1e-9 * expected.double().norm() + rounding


def assert_same_results(name, run):
    """``run`` gives equal tensors for both networks of that name."""
    assert_equal(*map(run, training_pair(name)))


def derivatives(results, leaves, retain_graph=False):
    """In leaves, of the square of results: those of them that are there."""
    results = [result for result in results if result is not None and result.requires_grad]
    loss = sum(result.square().sum() for result in results)
    return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=retain_graph)


def twice(model, x, run=None):
    """The output, the gradients of its loss, their derivatives, and the buffers after all that."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    out = (run or model)(x)
    leaves = [leaf for leaf in (x, *model.parameters()) if leaf.requires_grad]
    first = torch.autograd.grad(loss_of(out), leaves, create_graph=True, allow_unused=True)
    second = derivatives(first, leaves)
    return [t if t is None else t.detach() for t in (out, *first, *second, *model.buffers())]


@pytest.mark.few(3)
@pytest.mark.parametrize("how", ["drop_in", "patched"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gradient_penalty_of_a_family(name, how):
    """On the norm of the loss' gradient in the image."""
    options = {"num_classes": 10} | ({"init_weights": False} if name == "googlenet" else {})
    torch.manual_seed(0)
    stock = calibrate(builders(name)[1](**options))
    ours = counterpart(stock, name, how, **options)
    x, results = pairs.image(2, 64, dtype=torch.float64, seed=2), []
    for model in (ours, stock):
        model, leaf = Concatenated(model.double().train()), x.clone().requires_grad_()
        torch.manual_seed(3)
        loss = loss_of(model(leaf))
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + (grad.flatten(1).norm(dim=1) - 1).square().sum()).backward()
        results.append([leaf.grad, *gradients(model)])
    assert_equal(*results)


@pytest.mark.few(10)
@each_network
def test_networks(name, memory_format):
    x = image(name).contiguous(memory_format=memory_format)
    assert_same_results(name, lambda model: twice(model, x))


@each_block
def test_maps_between_blocks(name):
    """In a map, a gradient depends on it by what stands behind it alone."""

    def run(model):
        first, second, *_ = maps_of(model, image(name).requires_grad_(), PARTS[name])
        leaves = [first, next(model.get_submodule(PARTS[name][1]).parameters())]
        loss = second.square().sum() + first.pow(3).sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return [*grads, *derivatives(grads, [*leaves, *model.parameters()])]

    assert_same_results(name, run)


@each_block
def test_several_passes_through_one_graph(name):
    """Each in its own part of it and with or without a graph of gradients: none spoils another."""

    def run(model):
        x = image(name).requires_grad_()
        first, second, *_ = maps_of(model, x, PARTS[name])
        loss, leaves = second.square().sum(), [x, *model.parameters()]
        (kept,) = torch.autograd.grad(loss, first, create_graph=True)
        plain = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        results = [derivatives([kept], leaves, retain_graph=True) for _ in range(2)]
        results.append(derivatives(wanted, leaves))
        return [kept, *plain, *wanted, *(t for result in results for t in result)]

    assert_same_results(name, run)


TRAINED = {key: case for key, case in FROZEN.items() if key != "inception-all"}


@pytest.mark.parametrize("image_too", [True, False], ids=["image", "parameters"])
@pytest.mark.parametrize(("name", "frozen", "trained"), TRAINED.values(), ids=TRAINED.keys())
def test_frozen_parts(name, frozen, trained, image_too):
    prefix = "features." if name == "dense" else ""

    def run(model):
        for part in frozen.split():
            model.get_submodule(prefix + part).requires_grad_(False)
        for parameter in trained.split():
            model.get_parameter(parameter).requires_grad_()
        x = image(name).requires_grad_(image_too)
        leaves = [leaf for leaf in (x, *model.parameters()) if leaf.requires_grad]
        first = torch.autograd.grad(loss_of(model(x)), leaves, create_graph=True, allow_unused=True)
        return [*first, *derivatives(first, leaves)]

    assert_same_results(name, run)


def on_cpu(model):
    return torch.autograd.graph.save_on_cpu()


def cloned(model):
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)


@pytest.mark.parametrize("hooks", [on_cpu, cloned], ids=lambda f: f.__name__)
@each_block
def test_hooks_on_saved_tensors(name, hooks):
    def run(model):
        def forward(x):
            with hooks(model):
                return model(x)

        return twice(model, image(name), forward)

    assert_same_results(name, run)


@each_block
def test_checkpointed_stages(name):
    def run(model):
        for part in PARTS[name]:
            module = model.get_submodule(part)
            forward = module.forward
            module.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=False)
        return twice(model, image(name))[: -len(list(model.buffers()))]

    assert_same_results(name, run)


@each_block
def test_batches_of_gradients(name):
    """By ``is_grads_batched=True`` and ``torch.vmap``, with and without a graph of them."""

    def run(model):
        x = image(name).requires_grad_()
        out, leaves = model(x), [x, *model.parameters()]
        generator = torch.Generator().manual_seed(1)
        cotangents = torch.randn(3, *out.shape, generator=generator, dtype=out.dtype)
        results = []
        for graph in (False, True):
            grads = torch.autograd.grad(
                out, leaves, cotangents, is_grads_batched=True, create_graph=graph,
                retain_graph=True, allow_unused=True,
            )  # fmt: skip
            results += [t if t is None else t.detach() for t in grads]
        results += derivatives(grads, leaves, retain_graph=True)

        def of_image(cotangent):
            return torch.autograd.grad(out, x, cotangent, retain_graph=True)[0]

        return [*results, torch.vmap(of_image)(cotangents)]

    assert_same_results(name, run)


@each_block
def test_missing_gradients_stay_missing(name):
    missing = []
    for model in training_pair(name):
        unused, x = copy.deepcopy(model), image(name)
        used, _ = Sink.apply(model(x), unused(x))
        leaves = [*model.parameters(), *unused.parameters()]
        loss = used.square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        grads += derivatives(grads, leaves)
        missing.append([grad is None for grad in grads])
    assert missing[0] == missing[1] and any(missing[0])


def test_shared_weights():
    """What a weight does elsewhere, before or behind a block, is not counted in the block."""
    torch.manual_seed(0)
    ours = spread_norms(ConvBNAct(4, 4)).double()
    stock, results = nn.Sequential(*ours), []
    for model in (ours, stock):

        def forward(x, model=model):
            weight = model[0].weight
            return model(model(x * weight.mean()) * weight.sum()) + weight.square().mean()

        x = pairs.image(2, 6, dtype=torch.float64, channels=4, seed=1)
        results.append(twice(model, x, forward)[: -len(list(model.buffers()))])
    assert_equal(*results)


@each_block
def test_an_inner_step_that_is_differentiated(name):
    """MAML of second order: the loss behind a step of gradient descent, in what it started from."""

    def run(model):
        parameters = dict(model.named_parameters())
        loss = loss_of(torch.func.functional_call(model, parameters, image(name)))
        grads = torch.autograd.grad(
            loss, list(parameters.values()), create_graph=True, allow_unused=True
        )
        moved = {
            key: p if grad is None else p - 0.1 * grad
            for (key, p), grad in zip(parameters.items(), grads, strict=True)
        }
        query = image(name, batch=2, seed=4)
        loss_of(torch.func.functional_call(model, moved, query)).backward()
        return [loss, *gradients(model)]

    assert_same_results(name, run)


def test_product_of_the_hessian_and_a_vector():
    def run(model):
        x, parameters = image("se-bottleneck"), list(model.parameters())
        generator = torch.Generator().manual_seed(1)
        vector = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        grads = torch.autograd.grad(loss_of(model(x)), parameters, create_graph=True)
        return torch.autograd.grad(grads, parameters, vector)

    assert_same_results("se-bottleneck", run)


@each_block
def test_autocast_is_as_near_as_stock(name):
    """Twice stock's own distance from float64, on the mean over all tensors."""
    ours, stock = training_pair(name)
    exact, distances = copy.deepcopy(stock), []
    for index in range(1, 4):
        truth = twice(exact, image(name) * index)
        for model in (ours.float(), stock.float()):

            def forward(x, model=model):
                with torch.autocast("cpu", torch.bfloat16):
                    return model(x).float()

            results = twice(model, image(name, torch.float32) * index, forward)
            errors = [
                (actual.double() - t).norm() / t.norm()
                for actual, t in zip(results, truth, strict=True)
                if t is not None and t.is_floating_point() and t.norm() > 1e-9
            ]
            distances.append(torch.stack(errors).mean())
    actual, eager = torch.stack(distances).view(3, 2).mean(0)
    assert actual <= 2 * eager
