"""Dense and Inception blocks trained in parallel, sharded, in half precision, transformed."""

import contextlib
import copy
import functools
import importlib
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel

import cvkernels
from cvkernels.models.densenet import DenseNet
from cvkernels.nn import DenseLayer
from tests.support import pairs
from tests.support.pairs import assert_equal, gradients, loss_of, pair, spread_norms, step

pytest.importorskip("torchvision")
stock_densenet = importlib.import_module("torchvision.models.densenet")
# The name torchvision.models.googlenet is the builder's too.
stock_googlenet = importlib.import_module("torchvision.models.googlenet")

TINY = dict(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=5)
INCEPTION = (8, 4, 4, 6, 2, 4, 4)


class Net(nn.Module):
    """A block, and a linear layer that only calls with ``side`` use."""

    def __init__(self, block, width):
        super().__init__()
        self.block, self.fc, self.side = block, nn.Linear(width, 5), nn.Linear(width, 5)

    def forward(self, x, side=False):
        features = self.block(x)
        features = features.mean((2, 3)) if features.dim() == 4 else features
        return self.fc(features) + (self.side(features) if side else 0)


def dense(**kwargs):
    """(ours, stock, an image) with one state, in float64."""
    stock = stock_densenet.DenseNet(**TINY)
    ours = DenseNet(**TINY, **kwargs)
    return *same(Net(ours, 5), Net(stock, 5)), image(2, (33, 36))


def inception():
    stock = stock_googlenet.Inception(*INCEPTION)
    block = copy.deepcopy(stock)
    return *same(Net(cvkernels.nn.Inception(*INCEPTION), 18), Net(block, 18)), image(
        2, (6, 5), channels=8
    )


NETWORKS = {
    "dense": dense,
    "memory_efficient": lambda: dense(memory_efficient=True),
    "inception": inception,
}
networks = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())


def same(ours, stock):
    return pair(spread_norms(stock, (-0.5, 1.5), 0.3), ours, torch.float64)


image = functools.partial(pairs.image, dtype=torch.float64, seed=1)


# Processes


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
        shard(stock_densenet.DenseNet(**TINY).features.denseblock1)
    except Exception as error:  # of the process group, in a torch that does
        return "containers that do not implement forward" not in str(error)
    return True


def sharded_steps(model, x, rank, options):
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in getattr(model.block, "features", model.block).children():
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return [value for index in range(2) for value in step(model, x + index, True)]


def train_in_two_processes(rank, path):
    torch.set_num_threads(1)
    store = dist.FileStore(path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    sharded = {"sharded": None} if takes_blocks(fully_shard) else {}
    for name, build in NETWORKS.items():
        every = {**sharded, **WRAPPED}
        for kind in list(every)[: 2 if name == "memory_efficient" else None]:
            options = every[kind]
            run = sharded_steps if options is None else wrapped_steps
            torch.manual_seed(0)
            ours, stock, x = build()
            x = x + rank
            results = [run(model, x, rank, options) for model in (ours, stock)]
            assert_equal(*results, 1e-9, f"{name}, {kind}")
    ours, stock, x = dense()
    for model in map(nn.SyncBatchNorm.convert_sync_batchnorm, (ours, stock)):
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
            model(x)
    dist.destroy_process_group()


def test_two_processes_train_as_stock_does(tmp_path):
    """DistributedDataParallel's options, no_sync, fully_shard; SyncBatchNorm wants a GPU."""
    torch.multiprocessing.spawn(train_in_two_processes, (str(tmp_path / "store"),), nprocs=2)


def test_sharded_blocks_keep_what_others_keep():
    """The hooks that fully_shard puts on a block are not inside it."""
    if not takes_blocks(fully_shard):
        pytest.skip("this torch's fully_shard takes no dense block, stock's neither")
    ours, _, x = dense()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        block = ours.block.features.denseblock1
        fully_shard(block, mesh=dist.init_device_mesh("cpu", (1,)))
        seen = []
        block.register_forward_hook(lambda module, args, out: seen.append(out.grad_fn))
        step(ours, x)
    finally:
        dist.destroy_process_group()
    names, waiting = set(), seen
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [below for below, _ in node.next_functions]
    assert "_DenseBlockBackward" in names and "CatBackward0" not in names


def test_a_hook_may_write_a_block_s_output():
    results = []
    for model in dense()[:2]:
        block = model.block.features.denseblock1
        block.register_forward_hook(lambda module, args, out: out.mul_(0.5))
        results.append(step(model, image(2, (33, 36))))
    assert_equal(*results)


@networks
def test_synchronised_norms_run_as_modules(build):
    ours, stock, x = build()
    ours, stock = map(nn.SyncBatchNorm.convert_sync_batchnorm, (ours, stock))
    reasons = {row.reason for row in cvkernels.explain(ours, x).rows}
    assert any("SyncBatchNorm is not exactly nn.BatchNorm2d" in reason for reason in reasons)


# Replicas and threads


def replica(module):
    """As DataParallel makes them: parameters are plain attributes, copied under autograd."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = replica(child)
    for name, tensor in {**module._parameters, **module._buffers}.items():
        setattr(copied, name, None if tensor is None else tensor.clone())
    return copied


@networks
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("part", ["network", "block"])
def test_replicas_pass_their_gradients_on(part, training, build):
    results = []
    for model in build()[:2]:
        model.train(training)
        if part == "block" and hasattr(model.block, "features"):
            model = model.block.features.denseblock1
            x = image(2, (6, 5), channels=8)
        else:
            x = build()[2]
        outs = [replica(model)(x * (i + 1)) for i in range(2)]
        sum(map(loss_of, outs)).backward()
        results.append([*outs, *gradients(model), *model.buffers()])
    assert_equal(*results)


@networks
def test_data_parallel_without_a_gpu_and_threads_of_replicas(build):
    ours, stock, x = build()
    expected = step(stock, x, True)
    results, copies = [], [copy.deepcopy(ours) for _ in range(2)]
    assert_equal(step(nn.DataParallel(ours), x, True), expected)
    begin = threading.Barrier(2)

    def train(model):
        begin.wait()
        results.append(step(model, x, True))

    threads = [threading.Thread(target=train, args=(model,)) for model in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        assert_equal(result, expected)


# Half precision


@networks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_is_as_near_as_stock(dtype, build):
    """Twice stock's own distance from float64, on the mean over tensors and images."""
    ours, stock, x = build()
    exact = copy.deepcopy(stock)
    distances = []
    for index in range(4):
        truth = step(exact, x * (1 + index))
        for model in (ours, stock):
            with torch.autocast("cpu", dtype):
                results = step(model.float(), x.float() * (1 + index))
            floats = [(a, t) for a, t in zip(results, truth, strict=True) if t is not None]
            distances.append(
                torch.stack(
                    [
                        (a.double() - t).norm() / t.norm()
                        for a, t in floats
                        if t.is_floating_point() and t.norm() > 1e-9
                    ]
                ).mean()
            )
    actual, eager = torch.stack(distances).view(-1, 2).mean(0)
    assert actual <= 2 * eager + torch.finfo(dtype).eps


@networks
def test_a_gradient_scaler_steps_as_on_stock(build):
    *models, x = build()
    states = []
    for model in models:
        optimiser = torch.optim.SGD(model.parameters(), 1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for index in range(3):
            optimiser.zero_grad()
            scale = float("inf") if index == 1 else 1.0  # skipped, in both
            scaler.scale(loss_of(model(x)) * scale).backward()
            scaler.step(optimiser)
            scaler.update()
        states.append([*model.parameters(), *model.buffers(), torch.tensor(scaler.get_scale())])
    assert_equal(*states)


# Transforms and compilation


@networks
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_ensembles_under_vmap(training, grad, build):
    ours, stock, x = build()
    results = []
    for model in (ours, stock):
        members = [copy.deepcopy(model).train(training) for _ in range(2)]
        if training:
            for member in members:
                torch.func.replace_all_batch_norm_modules_(member)
        with torch.no_grad():
            for parameter in members[1].parameters():
                parameter.mul_(1.25)
        state = stack_module_state(members)
        with torch.set_grad_enabled(grad):
            run = vmap(lambda p, b, m=members[0]: functional_call(m, (p, b), (x,)))
            results.append([run(*state)])
    assert_equal(*results)


@pytest.mark.parametrize("build", [dense, inception])
def test_gradients_per_sample(build):
    """torch.func refuses checkpoints by name, so there is no ``memory_efficient`` here."""
    results = []
    for model in build()[:2]:
        x = build()[2]
        torch.func.replace_all_batch_norm_modules_(model)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, sample, model=model):
            return loss_of(functional_call(model, parameters, (sample[None],)))

        grads = vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        results.append([*grads.values()])
    assert_equal(*results)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["plain", "memory_efficient"])
def test_a_compiled_training_step(memory_efficient):
    stock = stock_densenet._DenseBlock(1, 6, 2, 4, 0.0)
    block = cvkernels.nn.DenseBlock(1, 6, 2, 4, 0.0, memory_efficient)
    ours, stock = same(Net(block, 10), Net(stock, 10))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = image(2, (5, 4), channels=6)
        assert_equal(step(compiled, x), step(stock, x))


# What memory_efficient does to running statistics


def test_statistics_are_updated_once_where_layers_are_called():
    stock = stock_densenet._DenseLayer(6, 4, 2, 0.0).double()
    ours = DenseLayer(6, 4, 2, 0.0, memory_efficient=True).double()
    ours.load_state_dict(stock.state_dict())
    ours.relu1.register_forward_hook(lambda *_: None)
    for _ in range(2):
        x = image(2, (5, 4), channels=6)
        assert_equal(step(ours, x), step(stock, x))
    assert ours.norm1.track_running_stats
