"""Small networks made at random: modules, writes in place, views, reductions, parts and sizes.

Some have blocks that patch replaces among them. ``python -m tests.support.random_networks FIRST
LAST`` freezes those of many seeds, ``--check patch`` patches them, and ``both`` does both.
"""

import argparse
import collections
import copy
import random

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import cvkernels
from cvkernels.freeze.capture import CaptureError
from cvkernels.nn import DenseBlock
from tests.support import random_parts as parts
from tests.support.numerics import cotangents_of, tensors_in

# Whether code behind blocks may tell maps that are channels_last from contiguous ones: by a view
# that flattens one, or by the order in which dropout draws its numbers.
LAYOUT_SENSITIVE = True
# Whether the output of a dense block may be written in place in training.
WRITES_DENSE_OUTPUTS = True


class RandomNetwork(nn.Module):
    """A network of images [N, 8, H, W], the same for the same seed.

    With ``blocks``, parts of it are what patch replaces; some modules have hooks, and some
    parameters need no gradient. Every other one of them writes nothing in place, so that autograd
    differentiates it.
    """

    def __init__(self, seed: int, blocks: bool = False) -> None:
        super().__init__()
        choose = random.Random(seed)
        self._constants()
        self.layers, self.program = nn.ModuleList(), []
        modules, maps, weights = parts.MODULES, parts.MAPS, (6, 10, 4, 2, 6, 0)
        rarer_maps, rarer_modules = parts.RARER_MAPS, parts.RARER_MODULES
        if blocks:
            # Needs torchvision and timm.
            from tests.support.random_blocks import random_block

            weights = (4, 10, 3 * (seed % 2), 2, 2, 8)
            maps = maps if seed % 2 else [m for m in maps if m not in parts.IN_PLACE]
            modules += parts.DECIDING + parts.WRITING * (seed % 2)
            if not LAYOUT_SENSITIVE:
                modules = [m for m in modules if m is not nn.Dropout]
                maps = [m for m in maps if m not in parts.OF_A_LAYOUT]
        table = {
            "layer": (modules, rarer_modules), "map": (maps, rarer_maps),
            "write": (parts.WRITES, parts.RARER_WRITES),
            "result": (parts.RESULTS, parts.RARER_RESULTS), "part": (parts.PARTS,), "block": (),
        }  # fmt: skip
        for _ in range(choose.randint(3, 9)):
            kind = choose.choices(list(table), weights)[0]
            picked = (
                random_block(choose)
                if kind == "block"
                else choose.choice(choose.choice(table[kind]))
            )
            if kind in ("layer", "part"):
                picked = picked()
                for norm in picked.modules():
                    _vary(norm)
            if isinstance(picked, nn.Module):
                self.layers.append(picked)
            self.program.append((kind, picked, choose.random(), choose.random()))
        self.returned = [choose.random() for _ in range(choose.randint(1, 3))]
        self.has_blocks = blocks
        if blocks:
            self._watch_and_fix(choose)

    def _constants(self) -> None:
        """What maps are made with: buffers, and parameters of the network's own."""
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("matrix", torch.randn(8, 8) / 3)
        self.register_buffer("order", torch.randperm(8))
        self.register_buffer("slope", torch.rand(8) + 0.1)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.taps = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def _watch_and_fix(self, choose: random.Random) -> None:
        for module in self.layers.modules():
            if hasattr(module, "drop_rate") and not LAYOUT_SENSITIVE:
                module.drop_rate = 0.0
            if choose.random() < 0.03:
                watch = choose.randrange(4)
                if watch == 0:
                    module.register_forward_hook(_doubles)
                elif watch == 1:
                    module.register_forward_hook(_writes)
                elif watch == 2:
                    module.register_forward_pre_hook(_doubles_first)
                else:
                    module.register_full_backward_hook(_nothing)
        for parameter in self.parameters():
            parameter.requires_grad_(choose.random() < 0.9)

    def forward(self, x):
        maps, results = [x * 1.0], []
        for kind, picked, first, second in self.program:
            f, g = (maps[int(place * len(maps))] for place in (first, second))
            if isinstance(picked, nn.Module):
                maps.append(picked(f))
            elif kind == "map":
                maps.append(picked(f, g, self))
            elif kind == "write":
                picked(f, g)
            else:
                results.append(picked(f))
        # What a network of blocks does not read may raise in stock, and is not run by ours.
        results += maps[1:] if self.has_blocks else ()
        return (*(maps[int(place * len(maps))] for place in self.returned), *results)


def _vary(norm: nn.Module) -> None:
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        for vector in (norm.running_mean, norm.weight):
            if vector is not None:
                nn.init.uniform_(vector)


def _doubles(module, args, out):
    return out * 2 if isinstance(out, Tensor) else None


def _writes(module, args, out):
    out.mul_(2)


def _doubles_first(module, args):
    return (args[0] * 2, *args[1:]) if isinstance(args[0], Tensor) else None


def _nothing(module, gradients, of_outputs):
    """Registered, it has autograd see the module's inputs and outputs as views of them."""


def attempt(function, *args):
    """What the function returns, or the error that it raises."""
    try:
        return function(*args)
    except Exception as error:  # noqa: BLE001 - stock may raise anything
        return error


def tensors_of(*results) -> list[tuple[Tensor, ...]]:
    """The tensors of results of one structure, side by side."""
    structures = [_pytree.tree_structure(result) for result in results]
    assert structures == structures[:1] * len(structures), "another structure"
    return list(zip(*map(tensors_in, results), strict=True))


def assert_errs_like(ours: Tensor, stock: Tensor, truth: Tensor, slack: float = 1e-5) -> None:
    """By at most eight times what stock does, and roundings."""
    assert ours.shape == stock.shape and ours.dtype == stock.dtype
    errors = [(y.double() - truth).abs().max() for y in (ours, stock)]
    allowed = 8 * errors[1] + slack * truth.abs().max() + 1e-6
    assert errors[0] <= allowed or not truth.isfinite().all(), f"{errors[0]} > {allowed}"


def networks_of(seed: int, blocks: bool) -> tuple[RandomNetwork, RandomNetwork]:
    """In eval: in float32, and in float64."""
    torch.manual_seed(seed)
    network = RandomNetwork(seed, blocks).eval()
    return network, copy.deepcopy(network).double()


@torch.no_grad()
def check_frozen(seed: int, patched: bool = False) -> None:
    """Frozen, the network errs as stock does, in each call and for other sizes of images.

    Some networks amplify roundings: a map that errs more may err as stock's in channels_last does.
    """
    network, wide = networks_of(seed, patched)
    ours = copy.deepcopy(network)
    if patched:
        attempt(cvkernels.patch, ours)
    frozen = None
    for shape in ((2, 8, 6, 6), (2, 8, 6, 6), (3, 8, 7, 5)):
        x = torch.randn(shape)
        expected = attempt(network, x.clone())
        if isinstance(expected, Exception):
            raised = attempt(cvkernels.freeze, ours, x) if frozen is None else attempt(frozen, x)
            # A frozen network's maps are channels_last, and it reshapes where stock views.
            may_differ = "view size is not compatible" in str(expected)
            assert may_differ or isinstance(raised, Exception), f"stock raises {expected}"
            return
        if frozen is None:
            try:
                frozen = cvkernels.freeze(ours, x)
            except CaptureError as refused:
                # What iterates over a result, which torch.fx cannot trace, is refused.
                assert "Proxy object cannot be iterated" in str(refused), refused
                return
        actual, truths = frozen(x), wide(x.double())
        try:
            for values in tensors_of(actual, expected, truths):
                assert_errs_like(*values)
        except AssertionError:
            other = network(x.contiguous(memory_format=torch.channels_last))
            for values in tensors_of(actual, other, truths):
                assert_errs_like(*values)


def check_patched(seed: int) -> None:
    """Patched, the network computes and trains as stock does, or raises where stock raises."""
    network, wide = networks_of(seed, blocks=True)
    patched = copy.deepcopy(network)
    if isinstance(attempt(cvkernels.patch, patched), ValueError):
        return
    models = (patched, network, copy.deepcopy(patched).double(), wide)
    choose = random.Random(seed)
    layout = choose.choice((torch.contiguous_format,) * 2 + (torch.channels_last,))
    for _ in range(2):
        for shape in ((2, 8, 6, 6), (2, 8, 6, 6), (3, 8, 7, 5)):
            if not _evaluates_alike(*models, torch.randn(shape).contiguous(memory_format=layout)):
                return
        place, factor = choose.random(), choose.choice((0.9, 1.1))
        for model in models:
            state = [p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()]
            with torch.no_grad():
                state[int(place * len(state))].mul_(factor)
    _set_modes(models, choose)
    for step in range(2):
        x = torch.randn(3, 8, 6, 7).contiguous(memory_format=layout)
        if not _trains_alike(*models, x, step):
            return


def _set_modes(models, choose) -> None:
    """All of them in training, or in eval, or parts of them in either."""
    mode, mixed = choose.random() < 0.8, choose.random() < 0.4
    for model in models:
        model.train(mode)
    for modules in zip(*(model.modules() for model in models), strict=True):
        if mixed and choose.random() < 0.15:
            part = choose.random() < 0.5
            for module in modules:
                module.train(part)


@torch.no_grad()
def _evaluates_alike(patched, stock, wide_patched, wide, x) -> bool:
    """False where stock raises, and so does the patched one."""
    expected, actual = attempt(stock, x), attempt(patched, x)
    if isinstance(expected, Exception):
        assert isinstance(actual, Exception), f"stock raises {expected}"
        return False
    if isinstance(actual, Exception):
        raise actual
    truths = wide(x.double())
    for values in tensors_of(actual, expected, truths):
        assert_errs_like(*values)
    pairs = tensors_of(wide_patched(x.double()), truths)
    rounding = 1e-13 * max(truth.abs().max() for _, truth in pairs)
    for ours, truth in pairs:
        assert_exact(ours, truth, rounding)
    return True


def assert_exact(ours: Tensor, truth: Tensor, rounding: float = 0.0) -> None:
    """Equal in float64 but for its rounding."""
    assert ours.shape == truth.shape and ours.dtype == truth.dtype
    allowed = 1e-9 * truth.abs().max() + rounding
    error = (ours - truth).abs().max()
    assert error <= allowed or not truth.isfinite().all(), f"{error} > {allowed}"


def _trains_alike(patched, stock, wide_patched, wide, x, seed) -> bool:
    """False where stock raises, and so does the patched one, or computes what stock would have."""
    copied = copy.deepcopy(wide)
    expected = attempt(trained, wide, x.double(), seed)
    actual = attempt(trained, wide_patched, x.double(), seed)
    if isinstance(expected, Exception):
        if isinstance(actual, Exception):
            return False
        # Stock has saved for backward what is written in place, which ours need not have.
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            expected = trained(copied, x.double(), seed)
        wide.load_state_dict(copied.state_dict())
    if isinstance(actual, Exception):
        if "modified by an inplace" in str(actual) and not WRITES_DENSE_OUTPUTS:
            if any(isinstance(module, DenseBlock) for module in patched.modules()):
                return False
        raise actual
    # A bias before a norm over the batch has the gradient zero, and rounding around it.
    rounding = 1e-11 * max(value.abs().max() for value in expected.values())
    assert actual.keys() == expected.keys()
    narrow = [attempt(trained, model, x, seed) for model in (patched, stock)]
    for name, truth in expected.items():
        try:
            assert_exact(actual[name], truth, rounding)
            # In float32 a rounding moves a value across a kink, and its gradient jumps.
            if not name.startswith("gradient") and isinstance(narrow[1], dict):
                assert_errs_like(*(found[name] for found in narrow), truth, slack=1e-4)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return True


def trained(network: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after a forward and backward pass."""
    torch.manual_seed(seed)
    network.zero_grad()
    x = x.clone().requires_grad_()
    outputs = tensors_in(network(x))
    needy = [out for out in outputs if out.requires_grad]
    torch.autograd.backward(needy, cotangents_of(needy))
    results = {f"output {place}": out.detach() for place, out in enumerate(outputs)}
    results |= {f"gradient of {name}": p.grad for name, p in network.named_parameters()}
    results |= {"gradient of x": x.grad}
    results |= {
        f"{name}.{key}": buffer.double().clone()
        for name, module in network.named_modules()
        if not name.endswith("norm1") or not _checkpoints(network, name)
        for key, buffer in module.named_buffers(recurse=False)
    }
    return {name: value for name, value in results.items() if value is not None}


def _checkpoints(network: nn.Module, norm: str) -> bool:
    """Whether stock updates the norm's statistics twice a step, ours once."""
    layer = network.get_submodule(norm.rpartition(".")[0])
    return getattr(layer, "memory_efficient", getattr(layer, "grad_checkpointing", False))


CHECKS = {
    "freeze": (check_frozen, lambda seed: check_frozen(seed, patched=True)),
    "patch": (check_patched,),
}
CHECKS["both"] = CHECKS["freeze"] + CHECKS["patch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--check", choices=CHECKS, default="freeze")
    arguments = parser.parse_args()
    counts = collections.Counter()
    for seed in range(arguments.first, arguments.last):
        for number, check in enumerate(CHECKS[arguments.check]):
            error = attempt(check, seed)
            kind = "right" if error is None else type(error).__name__
            counts[number, kind] += 1
            if error is not None and not isinstance(error, CaptureError):
                print(f"seed {seed} ({number}): {kind}: {str(error)[:300]}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
