"""nn.SyncBatchNorm: two processes that share a batch train as stock does on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cvkernels
from tests.support.pairs import assert_equal, gradients
from tests.support.training_nets import BLOCKS, image, training_pair

convert_timm = pytest.importorskip("timm.layers").convert_sync_batchnorm

# Images of the first process, of four. With none it takes part all the same; with one, the last
# maps of some networks have one pixel there.
PARTS = {"halves": 2, "one": 1, "none": 0}
RATE = 1e-2
NETWORKS = [*BLOCKS, "timm-dense", "timm-mbconv"]


def convert(model):
    """As PyTorch converts, or timm where its norms have an activation inside."""
    if any(type(module).__name__ == "BatchNormAct2d" for module in model.modules()):
        return convert_timm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def batch_of(name):
    x = torch.cat([image(name) * (1 + index) for index in range(4)])[:4]
    return x[..., :32, :32]


def cotangent(y):
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)


def trained(model, x, part, reduce=lambda g: g):
    """Two steps on ``part`` of the batch: outputs there, x's gradients, parameters, statistics."""
    results = []
    for index in range(2):
        model.zero_grad()
        share = (x[part] * (index + 1)).requires_grad_()
        y = model(share)
        weights = cotangent(y.new_empty(len(x), *y.shape[1:]))[part]
        (y * weights).sum().backward()
        results += [y.detach(), share.grad]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * reduce(parameter.grad)
    return [*results, *model.parameters(), *model.buffers()]


def summed(gradient):
    dist.all_reduce(gradient)
    return gradient


def train_shares(rank, path, networks, parts):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    for name in networks:
        x = batch_of(name)
        for kind, count in parts.items():
            ours, stock = training_pair(name)
            part = slice(0, count) if rank == 0 else slice(count, None)
            expected = trained(stock, x, slice(None))
            for index in range(0, 4, 2):  # outputs and gradients of this share
                for at in (index, index + 1):
                    expected[at] = expected[at][part]
            actual = trained(convert(ours), x, part, summed)
            assert_equal(actual, expected, 1e-9, f"{name}, {kind}")
    sharded_as_stock(rank)
    refuses_second_derivatives()
    dist.destroy_process_group()


def sharded_as_stock(rank):
    """Under fully_shard, whose gradients are means; DistributedDataParallel takes no such norm on
    a CPU."""
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(convert(training_pair("bottleneck")[0]))
    ours, stock = training_pair("bottleneck")
    fully_shard(convert(ours), mesh=dist.init_device_mesh("cpu", (2,)))
    x, part = batch_of("bottleneck"), slice(2 * rank, 2 * rank + 2)
    weights = cotangent(stock(x))
    stock, results = training_pair("bottleneck")[1], []
    for model, share, factor in ((ours, part, 2), (stock, slice(None), 1)):
        (model(x[share]) * weights[share] * factor).sum().backward()
        results.append(gradients(model))
    assert_equal(*results, 1e-9)


def refuses_second_derivatives():
    for name in ("bottleneck", "dense"):
        ours, x = convert(training_pair(name)[0]), batch_of(name).requires_grad_()
        with pytest.raises(RuntimeError, match="SyncBatchNorm .* has no second derivatives"):
            torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)


def spawn(tmp_path, networks, parts):
    arguments = (str(tmp_path / "store"), networks, parts)
    torch.multiprocessing.spawn(train_shares, arguments, nprocs=2)


def test_two_processes_that_share_a_batch(tmp_path):
    spawn(tmp_path, ["dense", "se-bottleneck"], {"one": 1})


@pytest.mark.full
def test_two_processes_that_share_a_batch_of_each_network(tmp_path):
    spawn(tmp_path, NETWORKS, PARTS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_alone_it_is_batch_norm(name, training):
    """With the fused path of batch norm, bit for bit."""
    ours = training_pair(name)[0].train(training)
    x, results = batch_of(name), []
    reasons = [{row.reason for row in cvkernels.explain(ours, x).rows}]
    for model in (ours, convert(training_pair(name)[0]).train(training)):
        y = model(x)
        (y * cotangent(y)).sum().backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([y.detach(), *gradients, *model.buffers()])
        reasons.append({row.reason for row in cvkernels.explain(model, x).rows})
    assert_equal(*results, 0)
    assert reasons[1] == reasons[2]


def test_a_frozen_network_with_shared_norms(name="bottleneck"):
    ours = training_pair(name)[0].eval()
    x = batch_of(name).float()
    expected = cvkernels.freeze(ours.float(), x)(x)
    assert torch.equal(cvkernels.freeze(convert(ours), x)(x), expected)
