"""Training GoogLeNet's blocks: stock's gradients and statistics, convolution outputs alone kept."""

import copy
import importlib
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_as_eager
from torch import nn
from torch.utils.checkpoint import checkpoint

import cvkernels
from cvkernels import backend
from cvkernels.nn import BasicConv2d, FusedSequential, Inception, recomputed

torchvision = pytest.importorskip("torchvision")
# The name torchvision.models.googlenet is the builder's too.
stock_module = importlib.import_module("torchvision.models.googlenet")

FIRST = (16, 8, 8, 12, 4, 8, 4)
SECOND = (32, 8, 8, 8, 4, 8, 8)


class Net(nn.Module):
    """Stem, two blocks and the pools between them; the first block's output is used three times."""

    def __init__(self, convolution, inception, sequence):
        super().__init__()
        self.stem = sequence(
            convolution(3, 16, kernel_size=3, stride=2, padding=1),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        self.first = inception(*FIRST)
        self.pool = sequence(nn.MaxPool2d(2, 2, ceil_mode=True))
        self.second = inception(*SECOND)
        self.fc = nn.Linear(32, 5)
        self.side = nn.Linear(32, 5)

    def forward(self, x):
        first = self.first(self.stem(x))
        second = self.second(self.pool(first))
        return torch.cat([self.fc(second.mean((2, 3))), self.side(first.mean((2, 3)))], 1)


def pair(dtype=torch.float64):
    """(ours, stock) in training with one state; norms of all forms that BatchNorm2d has."""
    torch.manual_seed(0)
    stock = Net(stock_module.BasicConv2d, stock_module.Inception, nn.Sequential)
    stock.first.branch2[0].bn = nn.BatchNorm2d(8, momentum=None)
    stock.first.branch2[1].bn = nn.BatchNorm2d(12, affine=False)
    stock.second.branch1.bn = nn.BatchNorm2d(8, track_running_stats=False)
    stock.second.branch3[1].conv.bias = nn.Parameter(torch.randn(8))
    with torch.no_grad():
        for norm in stock.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.affine:
                norm.weight.uniform_(-0.5, 1.5)
                norm.bias.normal_(0, 0.3)
    ours = copy.deepcopy(stock)
    cvkernels.patch(ours)
    for name in ("stem", "pool"):
        setattr(ours, name, FusedSequential(*getattr(ours, name)))
    return ours.to(dtype).train(), stock.to(dtype).train()


def image(dtype=torch.float64, batch=3, size=(26, 23)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(out):
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


def step(model, x, run=None):
    """(outputs, gradients of image and parameters, buffers) of one forward and backward."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = (run or model)(x)
    loss_of(out).backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [out.detach(), *grads, *(b.clone() for b in model.buffers())]


def assert_equal(ours, stock, tolerance=1e-10):
    for actual, expected in zip(ours, stock, strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def is_recomputed(out):
    return isinstance(getattr(out, "recipe", None), recomputed.Recipe)


def saved(model, x):
    """Bytes that autograd keeps of model(x), each storage once, parameters not counted."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    return sum(storage.nbytes() for storage in storages.values()), out


# What is computed


def test_ten_optimiser_steps_match_stock(memory_format):
    results = []
    for model in pair():
        optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        x = image().contiguous(memory_format=memory_format)
        for _ in range(10):
            results.append(step(model, x))
            optimiser.step()
        results[-1] += [p.detach() for p in model.parameters()]
    for ours, stock in zip(results[:10], results[10:], strict=True):
        assert_equal(ours, stock, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_follow_the_numerics_rule(dtype, memory_format, device):
    """Of two convolutions and a pool: through more, what a ReLU passes depends on a rounding."""
    ours, stock = pair(dtype)
    x = image(dtype).to(device).contiguous(memory_format=memory_format)
    models = []
    for model in (ours, stock):
        layers = FusedSequential if model is ours else nn.Sequential
        stem = layers(*model.stem, model.first.branch1)
        models.append(nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device))
    exact = step(copy.deepcopy(models[1]).double(), x.double())
    results = [step(model, x) for model in models]
    for actual, eager, truth in zip(*results, exact, strict=True):
        if actual.is_floating_point():
            assert_close_as_eager(actual, eager, truth)
        else:
            assert torch.equal(actual, eager)


def test_what_is_recomputed_is_bit_equal():
    ours, _ = pair(torch.float32)
    maps = [ours.stem[0](image(torch.float32))]
    maps += [ours.stem(image(torch.float32))]
    maps += [ours.first(maps[1])]
    maps += [ours.pool(maps[2])]
    for out in maps:
        recipe = out.recipe
        assert torch.equal(recipe.node.value(recipe.leaves), out)


def test_autocast_matches_stock():
    ours, stock = pair(torch.float32)
    x = image(torch.float32)

    def run(model):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).float()

        return step(model, x, forward)

    exact = step(copy.deepcopy(stock).double(), x.double())
    for actual, eager, truth in zip(run(ours), run(stock), exact, strict=True):
        if actual.is_floating_point() and truth.abs().max() > 1e-12:
            assert_close_as_eager(actual, eager, truth, factor=3.0)


def test_several_forwards_retained_graphs_and_accumulated_gradients():
    images = [image(), image(batch=2) * 2, image(size=(17, 20)) - 1]
    results = []
    for model in pair():
        losses = [loss_of(model(x)) for x in images]
        losses[1].backward(retain_graph=True)
        losses[1].backward()
        (losses[0] * 0.5 + losses[2]).backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert_equal(*results)


FROZEN = {
    "stem": ["stem"],
    "convolutions": ["first.branch1.conv", "first.branch2.0.conv", "second.branch4.1.conv"],
    "norms": ["first.branch1.bn", "stem.0.bn", "second.branch3.0.bn"],
    "all": [""],
}


@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parameters(names):
    ours, stock = pair()
    for model in (ours, stock):
        for name in names:
            model.get_submodule(name).requires_grad_(False)
    assert_equal(step(ours, image()), step(stock, image()))


def test_no_image_gradient():
    results = []
    for model in pair():
        loss_of(model(image())).backward()
        results.append([p.grad for p in model.parameters()])
    assert_equal(*results)


def test_part_of_the_graph():
    """Gradients in a map, and of one use of it, leave the others right."""
    results = []
    for model in pair():
        first = model.first(model.stem(image()))
        pooled = model.pool(first)
        second = model.second(pooled)
        (grad,) = torch.autograd.grad(second.square().sum(), pooled, retain_graph=True)
        (side,) = torch.autograd.grad(first.pow(3).sum(), first, retain_graph=True)
        (second.square().sum() + first.pow(3).sum()).backward()
        results.append([grad, side, *(p.grad for p in model.parameters())])
    assert_equal(*results)


# What is kept


@pytest.mark.parametrize("patched", [False, True], ids=["builder", "patched"])
def test_googlenet_keeps_less_than_8_mb_per_image(patched):
    builders = torchvision.models if patched else cvkernels.models
    with torch.device("meta"):
        model = builders.googlenet(init_weights=False).to(torch.bfloat16)
        x = torch.randn(4, 3, 224, 224, dtype=torch.bfloat16)
    if patched:
        cvkernels.patch(model)
    assert saved(model.train(), x)[0] / 4 <= 8e6


def test_only_convolution_outputs_are_kept():
    ours, _ = pair(torch.float32)
    x = image(torch.float32)
    outputs = []
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            outputs.append(4 * 4 * module.num_features)  # mean, variance, weight and bias
    sizes = {"stem": (16, 13 * 12), "first": (8 + 8 + 12 + 4 + 8 + 4, 6 * 6)}
    sizes["second"] = (8 + 8 + 8 + 4 + 8 + 8, 3 * 3)
    maps = sum(4 * 3 * channels * pixels for channels, pixels in sizes.values())
    heads = 2 * 4 * 3 * 32
    assert saved(ours, x)[0] == x.nbytes + maps + sum(outputs) + heads


def test_autocast_keeps_no_cast_weights():
    ours, _ = pair(torch.float32)
    block = ours.first.branch2
    x = torch.randn(2, 16, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        count, _ = saved(block, x)
    assert count == 2 * x.numel() + 20 * (2 * 2 * 36 + 4 * 4)


@pytest.mark.parametrize("change", ["none", "hook", "bias", "eval", "frozen"])
def test_convolutions_on_one_map_run_as_one(change, monkeypatch):
    """The three 1x1 of a block; in the test's block the third is a sequence's first."""
    counts, convolve = [], recomputed.convolve
    monkeypatch.setattr(recomputed, "convolve", lambda *args: counts.append(1) or convolve(*args))
    ours, stock = pair()
    for model in (ours, stock):
        block = model.first.branch3[0]
        if change == "hook":
            block.register_forward_hook(lambda *_: None)
        elif change == "bias":
            block.conv.bias = nn.Parameter(torch.linspace(-1, 1, 4).double())
        elif change == "eval":
            block.bn.eval()
        elif change == "frozen":
            block.requires_grad_(False)
    assert_equal(step(ours, image()), step(stock, image()))
    # The stem's, and of each block the siblings, two 3x3 and the projection.
    together = {"none": 9, "frozen": 9, "eval": 10}
    assert len(counts) == together.get(change, 11)


def test_maps_are_let_go_as_backward_passes():
    ours, _ = pair(torch.float32)
    nodes, compute = [], recomputed.Node.value

    def value(node, leaves):
        nodes.append(node)
        return compute(node, leaves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recomputed.Node, "value", value)
        loss_of(ours(image(torch.float32))).backward()
    assert nodes and not any(node._value for node in nodes)


def test_an_output_pickles_without_its_graph():
    ours, _ = pair()
    out = ours.first(torch.randn(2, 16, 6, 6, dtype=torch.float64))
    assert is_recomputed(out)
    file = io.BytesIO()
    torch.save(out, file)
    assert len(file.getvalue()) < 3 * out.nbytes
    file.seek(0)
    for twin in (torch.load(file), pickle.loads(pickle.dumps(out))):
        assert torch.equal(twin, out) and not is_recomputed(twin)


# In whose hands it is


def test_hooks_that_change_an_output():
    def replace(module, args, out):
        return out * 1.5

    def in_place(module, args, out):
        with torch.no_grad():
            out.add_(0.25)

    def tracked(module, args, out):
        out.mul_(0.5)

    ours, stock = pair()
    for model in (ours, stock):
        model.stem[0].register_forward_hook(replace)
        model.first.register_forward_hook(replace)
        model.first.branch1.register_forward_hook(replace)
    assert_equal(step(ours, image()), step(stock, image()))
    # Stock's ReLU keeps its output, and refuses both of these there; behind a concatenation and
    # on our outputs they are right.
    for hook in (in_place, tracked):
        ours, stock = pair()
        for model in (ours, stock):
            model.first.register_forward_hook(hook)
        assert_equal(step(ours, image()), step(stock, image()))


HOOKED = ["first.branch1.conv", "first.branch3.0.bn", "first.branch4.0", "first.branch2", "stem.1"]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_inside_see_what_they_see_in_stock(name):
    results = []
    for model in pair():
        seen = []
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, s=seen: s.append(out.clone()))
        if not isinstance(module, nn.BatchNorm2d):  # a ReLU in place follows, which forbids it
            module.register_full_backward_hook(lambda m, g, out, s=seen: s.append(out[0].clone()))
        results.append([*step(model, image()), *seen])
    assert_equal(*results)


CHANGES = {
    "group-norm": (lambda b: setattr(b, "bn", nn.GroupNorm(2, 8)), "GroupNorm is not exactly"),
    "sync": (lambda b: setattr(b, "bn", nn.SyncBatchNorm(8)), "SyncBatchNorm is not exactly"),
    "eval": (lambda b: b.bn.eval(), "running statistics"),
    "hook": (lambda b: b.conv.register_forward_hook(lambda *_: None), "has a hook"),
    "padding": (lambda b: setattr(b.conv, "padding_mode", "reflect"), "padding_mode"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_other_blocks_run_as_modules(change, reason):
    ours, stock = pair()
    for model in (ours, stock):
        change(model.first.branch1)
        model.double()
    block, x = ours.first.branch1, torch.randn(2, 16, 6, 6, dtype=torch.float64)
    act = cvkernels.nn.conditions.relu_
    assert reason in recomputed.why_not_recomputed(x, block.conv, block.bn, act)
    if not isinstance(block.bn, nn.SyncBatchNorm):  # it trains on GPUs alone
        assert_equal(step(ours, image()), step(stock, image()))


def test_one_value_per_channel_is_refused_as_in_stock():
    block = BasicConv2d(3, 4, kernel_size=3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 3, 3, 3))
    assert block(torch.randn(1, 3, 3, 4)).shape == (1, 4, 1, 2)


def test_requested_reference_and_no_grad_run_as_modules():
    block, x = BasicConv2d(3, 4, kernel_size=3), torch.randn(2, 3, 6, 6)
    assert is_recomputed(block(x))
    with backend.use("reference"):
        assert not is_recomputed(block(x))
    with torch.no_grad():
        assert not is_recomputed(block(x))
    assert int(block.bn.num_batches_tracked) == 3


def test_second_derivatives_are_refused_by_name():
    ours, stock = pair()
    x = image().requires_grad_()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*backend.use\('reference'\)"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    out = ours(x)
    with pytest.raises(RuntimeError, match="is_grads_batched=True"):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape).double(), is_grads_batched=True)
    results = []
    for model in (ours, stock):
        with backend.use("reference"):
            (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x))
    assert_equal(*results)


def test_torch_func_runs_as_modules():
    results = []
    for model in pair():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
                norm.num_batches_tracked = None
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, model=model):
            return loss_of(torch.func.functional_call(model, parameters, (image(),)))

        _, tangent = torch.func.jvp(loss, (parameters,), (parameters,))
        results.append([tangent, *torch.func.grad(loss)(parameters).values()])
    assert_equal(*results)


def test_changes_between_forward_and_backward_are_refused():
    ours, _ = pair()
    for change in (
        lambda x: ours.first.branch2[1].conv.weight.mul_(2),
        lambda x: x.add_(1),
    ):
        x = image()
        loss = loss_of(ours(x))
        with torch.no_grad():
            change(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_checkpointed_blocks(reentrant):
    results = []
    for model in pair():

        def run(x, model=model):
            stem = model.stem(x)
            first = checkpoint(model.first, stem, use_reentrant=reentrant)
            second = checkpoint(model.second, model.pool(first), use_reentrant=reentrant)
            return model.fc(second.mean((2, 3))) + model.side(first.mean((2, 3)))

        results.append(step(model, image(), run))
    assert_equal(*results)


def test_saved_tensors_may_lie_elsewhere():
    def run(x):
        with torch.autograd.graph.save_on_cpu():
            return ours(x)

    ours, stock = pair()
    assert_equal(step(ours, image(), run), step(stock, image()))


def test_distributed_data_parallel(tmp_path):
    ours, stock = pair(torch.float32)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours)
        x = image(torch.float32)
        assert_equal(step(ours, x, wrapped), step(stock, x), 1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_threads_train_copies_side_by_side():
    ours, stock = pair()
    expected = step(stock, image())
    copies, results = [copy.deepcopy(ours) for _ in range(3)], []
    threads = [
        threading.Thread(target=lambda m=model: results.append(step(m, image())))
        for model in copies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for result in results:
        assert_equal(result, expected)


def test_export_and_trace_see_the_stock_operations():
    block = Inception(*FIRST).train()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    x = torch.randn(2, 16, 6, 6)
    exported = torch.export.export(block, (x,))
    assert "cvkernels" not in str(exported.graph)
    traced = torch.jit.trace(block, x, check_trace=False)
    for run in (exported.module(), traced):
        torch.testing.assert_close(run(x), block(x), rtol=1e-4, atol=1e-4)
