"""Training GoogLeNet's blocks in others' hands: hooks, transforms, checkpoints, threads, export."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cvkernels
from cvkernels import backend
from cvkernels.nn import BasicConv2d, Inception
from cvkernels.nn.training import match
from tests.support.inception_training_checks import FIRST, image, inception_pair, is_recomputed
from tests.support.pairs import assert_equal, loss_of, step


def test_hooks_that_change_an_output():
    def replace(module, args, out):
        return out * 1.5

    def in_place(module, args, out):
        with torch.no_grad():
            out.add_(0.25)

    def tracked(module, args, out):
        out.mul_(0.5)

    ours, stock = inception_pair()
    for model in (ours, stock):
        model.stem[0].register_forward_hook(replace)
        model.first.register_forward_hook(replace)
        model.first.branch1.register_forward_hook(replace)
    assert_equal(step(ours, image()), step(stock, image()))
    # Stock's ReLU keeps its output, and refuses both of these there; behind a concatenation and
    # on our outputs they are right.
    for hook in (in_place, tracked):
        ours, stock = inception_pair()
        for model in (ours, stock):
            model.first.register_forward_hook(hook)
        assert_equal(step(ours, image()), step(stock, image()))


HOOKED = ["first.branch1.conv", "first.branch3.0.bn", "first.branch4.0", "first.branch2", "stem.1"]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_inside_see_what_they_see_in_stock(name):
    results = []
    for model in inception_pair():
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
    ours, stock = inception_pair()
    for model in (ours, stock):
        change(model.first.branch1)
        model.double()
    block, x = ours.first.branch1, torch.randn(2, 16, 6, 6, dtype=torch.float64)
    act = cvkernels.nn.fused.match.relu_
    assert reason in match.why_not_train_conv_bn_act(x, block.conv, block.bn, act)
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
    ours, stock = inception_pair()
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
    for model in inception_pair():
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
    ours, _ = inception_pair()
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
    for model in inception_pair():

        def run(x, model=model):
            stem = model.stem(x)
            first = checkpoint(model.first, stem, use_reentrant=reentrant)
            second = checkpoint(model.second, model.pool(first), use_reentrant=reentrant)
            return model.fc(second.mean((2, 3))) + model.side(first.mean((2, 3)))

        results.append(step(model, image(), run=run))
    assert_equal(*results)


def test_saved_tensors_may_lie_elsewhere():
    def run(x):
        with torch.autograd.graph.save_on_cpu():
            return ours(x)

    ours, stock = inception_pair()
    assert_equal(step(ours, image(), run=run), step(stock, image()))


def test_distributed_data_parallel(tmp_path):
    ours, stock = inception_pair(torch.float32)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours)
        x = image(dtype=torch.float32)
        assert_equal(step(ours, x, run=wrapped), step(stock, x), 1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_threads_train_copies_side_by_side():
    ours, stock = inception_pair()
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
