"""A live network follows weights that another process writes, and that are gathered of shards."""

import json
import re
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from tests.support.live_twins import CASES, FAMILIES, Twins, convs_of, each_case, norms_of

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


@each_case
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


# Shards

UPDATES = 6
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


@pytest.mark.full
@pytest.mark.parametrize("key", SHARDED)
def test_sharded(key, sharded):
    errors = [error for results in sharded for error in results[key]]
    assert not errors, f"{len(errors)} of {UPDATES * len(sharded)}: {errors[0]}"
