"""Small networks trained in parallel, sharded, as ensembles, compiled, with scaled gradients."""

import contextlib
import copy
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel

from cvkernels.nn import DenseBlock, DenseLayer
from tests.support import pairs
from tests.support.pairs import assert_equal, gradients, loss_of, pair, spread_norms, step
from tests.support.training_nets import (
    BLOCKS,
    DENSENET,
    assert_same_results,
    each_block,
    image,
    stock_densenet,
    training_pair,
)

# Processes


class WithSide(nn.Module):
    """A network, and a linear layer behind it that only calls with ``side`` use."""

    def __init__(self, network, width):
        super().__init__()
        self.network, self.side = network, nn.Linear(width, 5, dtype=torch.float64)

    def forward(self, x, side=False):
        y = self.network(x)
        return torch.cat([y, self.side(y)], 1) if side else y


WRAPPED = {
    "plain": dict(gradient_as_bucket_view=True),
    "static_graph": dict(static_graph=True),
    "find_unused_parameters": dict(find_unused_parameters=True),
}


def wrapped_steps(model, x, rank, options):
    wrapped = DistributedDataParallel(model, **options)
    finds = options.get("find_unused_parameters", False)
    results = []
    for index in range(3):
        # With one to be found, each process leaves another parameter out.
        results += step(wrapped, x + index, not finds or rank == index % 2)
    if not options.get("static_graph"):
        model.zero_grad()
        for index, context in enumerate((wrapped.no_sync(), contextlib.nullcontext())):
            with context:
                loss_of(wrapped(x * (index + 1), True)).backward()
        results += gradients(model)
    return results


def takes_blocks(shard) -> bool:
    """Whether this torch shards a ModuleDict with a forward, as stock's dense blocks are."""
    try:
        shard(stock_densenet.DenseNet(**DENSENET).features.denseblock1)
    except Exception as error:  # of the process group, in a torch that does
        return "containers that do not implement forward" not in str(error)
    return True


def sharded_steps(model, x, rank, options):
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in getattr(model.network, "features", model.network).children():
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return [value for index in range(2) for value in step(model, x + index, True)]


def train_in_two_processes(rank, path):
    torch.set_num_threads(1)
    store = dist.FileStore(path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    sharded = {"sharded": None} if takes_blocks(fully_shard) else {}
    every = {**sharded, **WRAPPED}
    few = list(every)[:2]
    kinds = dict(dense=every, inception=every, memory_efficient=few, mbconv=few)
    for name, kind in [(name, kind) for name, listed in kinds.items() for kind in listed]:
        results, x = [], image(name) + rank
        for network in training_pair(name):
            torch.manual_seed(0)
            model = WithSide(network, network(x).shape[1])
            run = sharded_steps if every[kind] is None else wrapped_steps
            results.append(run(model, x, rank, every[kind]))
        assert_equal(*results, 1e-9, f"{name}, {kind}")
    dist.destroy_process_group()


def test_two_processes_train_as_stock_does(tmp_path):
    """DistributedDataParallel's options, no_sync, fully_shard."""
    torch.multiprocessing.spawn(train_in_two_processes, (str(tmp_path / "store"),), nprocs=2)


def test_sharded_blocks_keep_what_others_keep():
    """The hooks that fully_shard puts on a block are not inside it."""
    if not takes_blocks(fully_shard):
        pytest.skip("this torch's fully_shard takes no dense block, stock's neither")
    ours, _ = training_pair("dense")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        block = ours.features.denseblock1
        fully_shard(block, mesh=dist.init_device_mesh("cpu", (1,)))
        seen = []
        block.register_forward_hook(lambda module, args, out: seen.append(out.grad_fn))
        step(ours, image("dense"))
    finally:
        dist.destroy_process_group()
    names, waiting = set(), seen
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [below for below, _ in node.next_functions]
    assert "_DenseBlockBackward" in names and "CatBackward0" not in names


@each_block
def test_data_parallel_processes_of_one(name, tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ours, stock = training_pair(name)
        wrapped = DistributedDataParallel(ours)
        assert_equal(step(ours, image(name), run=wrapped), step(stock, image(name)), 1e-9)
    finally:
        dist.destroy_process_group()


# Replicas and threads


def replica(module):
    """As DataParallel makes them: parameters are plain attributes, copied under autograd."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = replica(child)
    for name, tensor in {**module._parameters, **module._buffers}.items():
        setattr(copied, name, None if tensor is None else tensor.clone())
    return copied


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("part", ["network", "block"])
@each_block
def test_replicas_pass_their_gradients_on(name, part, training):
    def run(model):
        model, x = model.train(training), image(name)
        if part == "block":
            block, channels = BLOCKS[name]
            model, x = model.get_submodule(block), image(name, size=(6, 5), channels=channels)
        outs = [replica(model)(x * (i + 1)) for i in range(2)]
        sum(map(loss_of, outs)).backward()
        return [*outs, *gradients(model), *model.buffers()]

    assert_same_results(name, run)


@each_block
def test_data_parallel_without_a_gpu_and_threads_of_copies(name):
    ours, stock = training_pair(name)
    expected, x = step(stock, image(name)), image(name)
    results, copies = [], [copy.deepcopy(ours) for _ in range(3)]
    assert_equal(step(nn.DataParallel(ours), x), expected, 1e-9)
    begin = threading.Barrier(len(copies))

    def train(model):
        begin.wait()
        results.append(step(model, x))

    threads = [threading.Thread(target=train, args=(model,)) for model in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(copies)
    for result in results:
        assert_equal(result, expected, 1e-9)


# Steps and ensembles


@each_block
def test_a_gradient_scaler_steps_as_on_stock(name):
    def run(model):
        optimiser = torch.optim.SGD(model.parameters(), 1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for index in range(3):
            optimiser.zero_grad()
            scale = float("inf") if index == 1 else 1.0  # skipped, in both
            scaler.scale(loss_of(model(image(name))) * scale).backward()
            scaler.step(optimiser)
            scaler.update()
        return [*model.parameters(), *model.buffers(), torch.tensor(scaler.get_scale())]

    assert_same_results(name, run)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_block
def test_ensembles_under_vmap(name, training, grad):
    x = image(name)

    def run(model):
        members = [copy.deepcopy(model).train(training) for _ in range(2)]
        if training:
            for member in members:
                torch.func.replace_all_batch_norm_modules_(member)
        with torch.no_grad():
            for parameter in members[1].parameters():
                parameter.mul_(1.25)
        with torch.set_grad_enabled(grad):
            run = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))
            return [run(*stack_module_state(members))]

    assert_same_results(name, run)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["plain", "memory_efficient"])
def test_a_compiled_training_step(memory_efficient):
    stock = stock_densenet._DenseBlock(1, 6, 2, 4, 0.0)
    block = DenseBlock(1, 6, 2, 4, 0.0, memory_efficient)
    ours, stock = pair(spread_norms(stock, (-0.5, 1.5), 0.3), block, torch.float64)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for index in range(2):
        x = pairs.image(2, (5, 4), dtype=torch.float64, channels=6, seed=index)
        assert_equal(step(compiled, x), step(stock, x))


def test_statistics_are_updated_once_where_layers_are_called():
    stock = stock_densenet._DenseLayer(6, 4, 2, 0.0)
    ours, stock = pair(stock, DenseLayer(6, 4, 2, 0.0, memory_efficient=True), torch.float64)
    ours.relu1.register_forward_hook(lambda *_: None)
    for index in range(2):
        x = pairs.image(2, (5, 4), dtype=torch.float64, channels=6, seed=index)
        assert_equal(step(ours, x), step(stock, x))
    assert ours.norm1.track_running_stats
