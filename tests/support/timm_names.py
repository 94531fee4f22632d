"""timm's names of ResNets, SENets, DenseNets and EfficientNets: patched and frozen, against stock.

``python -m tests.support.timm_names [NAME ...]`` prints a table of these, or all 211; ``--frozen``
freezes them, too.
"""

import argparse
import collections
import copy

import timm
import torch
from torch import nn

import cvkernels
from cvkernels.freeze.capture import CaptureError
from cvkernels.tables import first_line
from tests.support.numerics import assert_matches_module
from tests.support.pairs import calibrate, pair, spread_norms
from tests.support.random_networks import assert_exact, trained

MODULES = ("resnet", "senet", "densenet", "efficientnet")
# Of sizes of images, the first that stock takes.
SIZES = (96, 128, 160, 224, 256, 320)
# Above it, a network is planned without memory for it, and not run.
PARAMETERS = 30_000_000
RIGHT = "right"


def timm_names() -> list[str]:
    return [name for module in MODULES for name in timm.list_models(module=module)]


def build(name: str, **options) -> nn.Module:
    """In eval; norms are no identities, and branches that start at zero are not zero."""
    torch.manual_seed(0)
    return spread_norms(timm.create_model(name, num_classes=10, **options)).eval()


def images_of(model: nn.Module, count: int = 2) -> torch.Tensor:
    """Images of the smallest size that stock takes."""
    for size in SIZES:
        x = torch.randn(count, 3, size, size, device=next(model.parameters()).device)
        try:
            with torch.no_grad():
                copy.deepcopy(model)(x)
        except RuntimeError:
            continue
        return x
    raise ValueError(f"{type(model).__name__} takes no size of {SIZES}")


def check_planned(name: str) -> str:
    """How many modules are replaced and left; the output's shape is stock's."""
    with torch.device("meta"):
        stock = timm.create_model(name).eval()
    x = images_of(stock)
    expected = stock(x).shape
    report = cvkernels.patch(stock)
    assert report.replaced and stock(x).shape == expected
    assert all(left.reason for left in report.left)
    return f"{RIGHT}: planned, {len(report.replaced)} replaced, {len(report.left)} left"


def check_patched(stock: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """Training, then eval with the statistics of what the norms see, both in float64."""
    stock = copy.deepcopy(stock).double()
    ours, x = copy.deepcopy(stock), x.double()
    cvkernels.patch(ours)

    def train() -> None:
        results = [trained(model.train(), x, seed=0) for model in (ours, stock)]
        _assert_same(*results)

    @torch.no_grad()
    def evaluate() -> None:
        pair(calibrate(stock.eval(), x, only_norms=True), ours.eval())
        assert_exact(ours(x), stock(x))

    return {"training": outcome(train), "eval": outcome(evaluate)}


def _assert_same(actual: dict, expected: dict) -> None:
    # A bias before a norm over the batch has the gradient zero, and rounding around it.
    rounding = 1e-12 * max(value.abs().max() for value in expected.values())
    assert actual.keys() == expected.keys()
    for key, truth in expected.items():
        assert_exact(actual[key], truth, rounding)


def check_frozen(stock: nn.Module, x: torch.Tensor) -> str:
    return outcome(lambda: assert_matches_module(cvkernels.freeze(stock, x), stock, x, grad=False))


def outcome(check) -> str:
    try:
        check()
    except CaptureError as error:
        return f"refused: {first_line(error)}"
    except AssertionError as error:
        return f"differs: {first_line(error)}"
    return RIGHT


def parameters_of(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def row_of(name: str, freeze: bool) -> dict[str, str]:
    if parameters_of(name) > PARAMETERS:
        return {"planned": check_planned(name)}
    stock = build(name)
    x = images_of(stock)
    row = check_patched(stock, x)
    if freeze:
        row["frozen"] = check_frozen(stock, x)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--frozen", action="store_true")
    arguments = parser.parse_args()
    counts: collections.Counter = collections.Counter()
    for name in arguments.names or timm_names():
        row = row_of(name, arguments.frozen)
        counts.update((check, said.partition(":")[0]) for check, said in row.items())
        print(name, *(f"{check} {said}" for check, said in row.items()), sep=" | ", flush=True)
    for (check, said), count in counts.items():
        print(f"{check}: {count} {said}")


if __name__ == "__main__":
    main()
