"""What every drop-in builder must show, next to its stock counterpart; the model tests call these.

``stock`` is the module that has the stock builder, torchvision.models by default. Keyword arguments
go to both builders.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import cvkernels
from tests.support.numerics import assert_close_as_eager, assert_matches_module
from tests.support.pairs import SIZE, calibrate, image, pair
from tests.support.stock_twin_checks import assert_same_error, assert_same_state


def torchvision_models():
    return pytest.importorskip("torchvision").models


def build(module, name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return getattr(module, name)(**kwargs)


def twins(name, stock=None, **kwargs):
    """(ours, stock) with one state, in which every layer's output is of order 1."""
    ours = build(cvkernels.models, name, **kwargs)
    return pair(calibrate(build(stock or torchvision_models(), name, **kwargs)), ours)


def calibrated(build, **kwargs):
    """A network of seed 0 in eval, as :func:`calibrate` leaves it."""
    torch.manual_seed(0)
    return calibrate(build(**kwargs)).eval()


class Concatenated(nn.Module):
    """The outputs of a model that may return several, side by side."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        outputs = self.model(x)
        return outputs if isinstance(outputs, Tensor) else torch.cat(tuple(outputs), 1)


# Names, order, shapes, initialisation


def check_state_dict(name, stock=None, **kwargs):
    """Keys, order, versions, module names and values of one seed are the stock ones."""
    ours = build(cvkernels.models, name, **kwargs)
    drawn = torch.rand(1)
    theirs = build(stock or torchvision_models(), name, **kwargs)
    assert torch.equal(drawn, torch.rand(1)), "the constructor drew other random numbers"
    assert_same_state(ours, theirs)


# Numbers


def check_eval(name, device, stock=None, batch=2, **kwargs):
    """Output and input gradient in eval, and the state that the calls leave alone."""
    ours, theirs = (model.eval().to(device) for model in twins(name, stock, **kwargs))
    x = image(batch, device=device)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    assert_matches_module(ours, theirs, x, grad=False)
    assert_matches_module(ours, theirs, x)
    assert list(ours.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def check_train(name, device, stock=None, batch=4, **kwargs):
    """Outputs (dropout included), input gradient and the statistics that training updates."""
    ours, theirs = (model.train().to(device) for model in twins(name, stock, **kwargs))
    assert_matches_module(Concatenated(ours), Concatenated(theirs), image(batch, device=device))
    for key, value in theirs.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            # A few roundings of the largest: a mean near zero is a sum that cancels.
            atol = 2e-6 * value.abs().max().item()
            assert torch.allclose(ours.state_dict()[key], value, atol=atol), key
        else:
            assert torch.equal(ours.state_dict()[key], value), key


def check_half(name, device, dtype, stock=None, **kwargs):
    ours, theirs = (model.eval().to(device, dtype) for model in twins(name, stock, **kwargs))
    assert_matches_module(ours, theirs, image(2, device=device, dtype=dtype), grad=False)


def check_channels_last(name, device, stock=None, **kwargs):
    ours, theirs = (
        model.eval().to(device, memory_format=torch.channels_last)
        for model in twins(name, stock, **kwargs)
    )
    x = image(2, device=device).contiguous(memory_format=torch.channels_last)
    assert_matches_module(ours, theirs, x, grad=False)


def check_autocast_and_inference_mode(name, device, stock=None, **kwargs):
    ours, theirs = (model.eval().to(device) for model in twins(name, stock, **kwargs))
    x = image(2, device=device)
    with torch.inference_mode():
        assert_matches_module(ours, theirs, x, grad=False)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        actual, expected = ours(x), theirs(x)
    with torch.no_grad():
        assert_close_as_eager(actual, expected, copy.deepcopy(theirs).double()(x.double()))


def check_parameter_gradients(name, device, stock=None, atol=1e-3, **kwargs):
    """Every parameter that trains in the stock network trains in ours, by the same gradient."""
    ours, theirs = (model.train().to(device) for model in twins(name, stock, **kwargs))
    x = image(4, device=device)
    for model in (ours, theirs):
        torch.manual_seed(3)
        Concatenated(model)(x).square().mean().backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        expected = gradients[key].grad
        assert (parameter.grad is None) == (expected is None), key
        if expected is not None:
            scale = max(1.0, expected.abs().max().item())
            assert torch.allclose(parameter.grad, expected, rtol=0, atol=atol * scale), key


# Tracing and compilation


def check_fx(name, stock=None, **kwargs):
    """torch.fx names nodes as in the stock network, in eval and train, and computes the same."""
    ours, theirs = twins(name, stock, **kwargs)
    for training in (True, False):
        graphs = [torch.fx.symbolic_trace(model.train(training)) for model in (ours, theirs)]
        names = [[node.name for node in graph.graph.nodes] for graph in graphs]
        assert names[0] == names[1]
    assert_matches_module(graphs[0], theirs, image(), grad=False)


def check_feature_extraction(name, nodes, stock=None, **kwargs):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    ours, theirs = (model.eval() for model in twins(name, stock, **kwargs))
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    x = image()
    features = [create_feature_extractor(model, nodes)(x) for model in (ours, theirs)]
    assert list(features[0]) == list(features[1])
    for key, value in features[1].items():
        assert torch.allclose(features[0][key], value, atol=1e-4), key


def check_export(name, stock=None, **kwargs):
    ours, theirs = (model.eval() for model in twins(name, stock, **kwargs))
    x = image()
    exported = torch.export.export(ours, (x,))
    assert not any("cvkernels" in str(node.target) for node in exported.graph.nodes)
    assert torch.allclose(exported.module()(x), theirs(x), atol=1e-4)


def check_compiles_in_one_graph(name, device, stock=None, **kwargs):
    ours, theirs = (model.eval().to(device) for model in twins(name, stock, **kwargs))
    x = image(device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), theirs(x), atol=1e-4)


def check_jit_trace(name, stock=None, **kwargs):
    ours, theirs = (model.eval() for model in twins(name, stock, **kwargs))
    x = image()
    assert torch.allclose(torch.jit.trace(ours, x, check_trace=False)(x), theirs(x), atol=1e-4)


# Copies, hooks, parameters


def copied(model, how):
    """model's twin by "deepcopy", "pickle" or "torch.save"."""
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    plain = io.BytesIO()
    torch.save(copy.deepcopy(model), plain)
    assert file.tell() == pytest.approx(plain.tell(), rel=1e-3)
    file.seek(0)
    return torch.load(file, weights_only=False)


def check_copy(name, how, stock=None, **kwargs):
    """A copy computes the same and carries nothing that was derived from the weights."""
    ours, _ = twins(name, stock, **kwargs)
    x = image()
    with torch.no_grad():
        expected = ours.eval()(x)
        twin = copied(ours, how)
        assert not any("_derived" in module.__dict__ for module in twin.modules())
        assert torch.equal(twin(x), expected)
    assert list(twin.state_dict()) == list(ours.state_dict())


def check_steps_and_loads(name, device, stock=None, **kwargs):
    """The output follows an optimiser step, a load, and a load that assigns."""
    ours, theirs = (model.eval().to(device) for model in twins(name, stock, **kwargs))
    x = image(2, device=device)
    for model in (ours, theirs):
        with torch.no_grad():
            model(x)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        model(x).square().mean().backward()
        optimiser.step()
    assert_matches_module(ours, theirs, x, grad=False)
    theirs.cpu()
    calibrate(theirs)
    theirs.to(device)
    ours.load_state_dict(theirs.state_dict())
    assert_matches_module(ours, theirs, x, grad=False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(0.9)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    assert_matches_module(ours, theirs, x, grad=False)


def check_hook(name, layer, stock=None, **kwargs):
    """A hook on a layer sees what it sees in the stock network, and ``explain`` says so."""
    ours, theirs = (model.eval() for model in twins(name, stock, **kwargs))
    seen = []
    for model in (ours, theirs):
        model.get_submodule(layer).register_forward_hook(
            lambda module, args, out: seen.append(out.clone())
        )
    x = image()
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    calls = len(seen) // 2  # a block may call one module several times
    assert calls and len(seen) == 2 * calls
    for actual, expected in zip(seen[:calls], seen[calls:], strict=True):
        assert torch.allclose(actual, expected, atol=1e-4)
    reasons = {row.reason for row in cvkernels.explain(ours, x).rows}
    assert any("has a hook" in reason for reason in reasons)


def check_functional_call(name, stock=None, **kwargs):
    ours, theirs = (model.eval() for model in twins(name, stock, **kwargs))
    x = image()
    with torch.no_grad():
        ours(x)
        for factor in (0.9, 1.1):
            state = {k: v * factor if v.is_floating_point() else v for k, v in
                     theirs.state_dict().items()}  # fmt: skip
            actual = torch.func.functional_call(ours, state, x)
            assert torch.allclose(actual, torch.func.functional_call(theirs, state, x), atol=1e-3)


def check_runs_as_modules(name, stock=None, **kwargs):
    """Under vmap, and with norms that became SyncBatchNorm."""
    ours, theirs = (model.eval() for model in twins(name, stock, **kwargs))
    x = image(2)
    batched = torch.vmap(lambda one: ours(one[None])[0])(x)
    with torch.no_grad():
        assert torch.allclose(batched, theirs(x), atol=1e-4)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    rows = cvkernels.explain(converted.eval(), x).rows
    assert any("SyncBatchNorm is not exactly nn.BatchNorm2d" in row.reason for row in rows)


def check_meta(name, classes=1000, **kwargs):
    with torch.device("meta"):
        model = getattr(cvkernels.models, name)(**kwargs).eval()
    assert model(torch.empty(2, 3, SIZE, SIZE, device="meta")).shape == (2, classes)


# Errors


def check_same_error(name, stock=None, **kwargs):
    """A wrong call raises the stock error: its type and, unless Python raised it, its text."""
    assert_same_error(
        getattr(cvkernels.models, name), getattr(stock or torchvision_models(), name), **kwargs
    )
