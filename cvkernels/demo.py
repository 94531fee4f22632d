"""``python -m cvkernels demo``: stock networks and ours on real photographs, one table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvkernels import extension, models
from cvkernels.freeze.progress import progress
from cvkernels.images import Preparation
from cvkernels.info import cpu_name
from cvkernels.memory_use import peak_memory
from cvkernels.photographs import photographs
from cvkernels.tables import fitted_table, wrapped

# Each network, and the library whose model is the stock one.
NETWORKS = {
    "googlenet": "torchvision",
    "resnet50": "torchvision",
    "densenet121": "torchvision",
    "seresnet50": "timm",
    "efficientnet_b0": "torchvision",
}
BATCHES = (1, 16)
HEADER = (
    "network", "batch", "max logit diff", "same top-5", "stock ms", "ours ms", "stock/ours",
    "stock peak MB", "ours peak MB",
)  # fmt: skip
# As printed, within 100 columns.
SHORT_HEADER = (
    "network", "batch", "max diff", "same top-5", "stock ms", "ours ms", "stock/ours", "stock MB",
    "ours MB",
)  # fmt: skip
# What a narrow terminal does without, in this order.
OPTIONAL = ("same top-5", "stock MB", "ours MB", "max diff")
# After those that measure memory and give the logits, which prepack the weights.
WARM_UP = 1
# Seconds of timed runs after which a row has no more of them, if it has this many.
SECONDS, LEAST = 6.0, 3


class Row(NamedTuple):
    """One network at one batch size; stock and ours with the same weights and photographs."""

    network: str
    batch: int
    largest_difference: float
    top5_agreement: float
    stock_ms: float
    ours_ms: float
    stock_peak_mb: float
    ours_peak_mb: float


class Table:
    """The demo's rows under their conditions; prints as a table."""

    def __init__(self, rows: list[Row], conditions: str) -> None:
        self.rows = rows
        self.conditions = conditions

    def as_dict(self) -> dict:
        return {"conditions": self.conditions, "rows": [row._asdict() for row in self.rows]}

    @classmethod
    def from_dict(cls, content: dict) -> Table:
        return cls([Row(**row) for row in content["rows"]], content["conditions"])

    def __str__(self) -> str:
        return self.table(None)

    def table(self, columns: int | None) -> str:
        """As it is printed, within so many columns; None: as many as it needs."""
        table = fitted_table(SHORT_HEADER, self.cells(), columns, OPTIONAL)
        about = f"{self.conditions}; MB are what a call holds of memory at most"
        return f"{table}\n{wrapped(about, columns)}"

    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text, under :data:`HEADER`."""
        return [
            (
                r.network, str(r.batch), f"{r.largest_difference:.1e}", f"{r.top5_agreement:.0%}",
                f"{r.stock_ms:.1f}", f"{r.ours_ms:.1f}", f"{r.stock_ms / r.ours_ms:.2f}x",
                f"{r.stock_peak_mb:.0f}", f"{r.ours_peak_mb:.0f}",
            )
            for r in self.rows
        ]  # fmt: skip


def demo(
    photos: Sequence[str] = (),
    *,
    networks: Sequence[str] = tuple(NETWORKS),
    weights: str | None = None,
    device: str = "cpu",
    runs: int = 20,
) -> Table:
    """Run each network, stock and ours, on photographs and compare logits, time and memory.

    Args:
        photos: image files; none means the photographs that scikit-learn carries.
        networks: of :data:`NETWORKS`.
        weights: a weight name such as "DEFAULT" (downloaded), or a checkpoint of the one network;
            None means seeded random weights with the photographs' batch-norm statistics; nothing is
            downloaded then.
        device: "cpu" or "cuda". Stock runs in channels_last, its faster layout.
        runs: timed runs of each, fewer where they take longer than :data:`SECONDS`; their median is
            reported, the two interleaved.

    Raises:
        ImportError: a package of the ``demo`` extra is missing.
        UnreadableImage: a file is no image.
        ValueError: a network is none of those.
    """
    check_networks(networks)
    pictures = load_photos(photos).to(device)
    rows = []
    for network in networks:
        stock, ours = stock_and_ours(network, weights, pictures)
        for batch in BATCHES:
            x = pictures[torch.arange(batch) % len(pictures)]
            with progress(f"{network}, batch {batch}", runs) as advance:
                rows.append(_compare(network, stock, ours, x, runs, advance))
    cpu = f"{torch.get_num_threads()} threads of {cpu_name()}"
    where = torch.cuda.get_device_name() if device == "cuda" else cpu
    revision = extension.build_info().get("git_revision", "")
    source = f"weights {weights}" if weights else "seeded random weights"
    return Table(
        rows,
        f"{len(pictures)} photograph(s) at 224 x 224, float32, {where}, torch {torch.__version__}, "
        f"commit {revision or 'unknown'}, {source}; stock is torchvision's, of "
        f"SENet timm's, in channels_last; medians of {runs} interleaved runs, fewer after "
        f"{SECONDS:.0f} s",
    )


def check_networks(networks: Sequence[str]) -> None:
    """Raise a ValueError for one that is none of :data:`NETWORKS`."""
    for network in networks:
        if network not in NETWORKS:
            raise ValueError(f"demo: network must be one of {', '.join(NETWORKS)}, got {network!r}")


def load_photos(paths: Sequence[str]) -> Tensor:
    """Tensor[N, 3, 224, 224], normalised as ImageNet's: the files, or scikit-learn's photos.

    Raises:
        UnreadableImage: a file is no image.
        ImportError: no file is given, and scikit-learn is not installed.
    """
    files = list(paths) or photographs(["sklearn.datasets.images"])
    return torch.stack([Preparation().of_file(Path(file)) for file in files])


def stock_and_ours(
    network: str, weights: str | None, images: Tensor
) -> tuple[nn.Module, nn.Module]:
    """(stock, ours) with the same weights, on the photographs' device, in eval."""
    kwargs: dict[str, Any] = {}
    if weights is None and network == "googlenet":
        kwargs = {"init_weights": False}
    elif weights is None and network == "seresnet50":
        kwargs = {"zero_init_last": False}  # else all residual branches are zero
    torch.manual_seed(0)
    ours = models.create_model(network, weights=weights, **kwargs).eval()
    if network == "googlenet":
        own = {name: getattr(ours, name) for name in ("aux_logits", "transform_input")}
        kwargs = {"init_weights": False, **own}
    if NETWORKS.get(network) == "timm":
        import timm

        stock = timm.create_model(network, **kwargs)
    else:
        import torchvision

        stock = torchvision.models.get_model(network, **kwargs)
    if weights is None:
        _take_statistics(ours, images.cpu())
    stock.load_state_dict(ours.state_dict())
    stock = stock.to(images.device).to(memory_format=torch.channels_last)
    return stock.eval(), ours.to(images.device).eval()


@torch.no_grad()
def _take_statistics(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics to the photographs', so that activations keep their scale."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = None
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def _compare(
    network: str, stock: nn.Module, ours: nn.Module, x: Tensor, runs: int, tick: Callable[[], None]
) -> Row:
    channels_last = x.contiguous(memory_format=torch.channels_last)
    calls = (lambda: stock(channels_last), lambda: ours(x))
    # What a call derives from the weights counts as its memory: drop it first.
    ours.train().eval()
    peaks = [peak_memory(call, x.device) / 1e6 for call in calls]
    expected, actual = (call() for call in calls)
    top5 = [logits.topk(5).indices.sort().values for logits in (expected, actual)]
    for _ in range(WARM_UP):
        for call in calls:
            call()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    for done in range(runs):
        if done >= LEAST and time.perf_counter() > end:
            break
        for call, measured in zip(calls, times, strict=True):
            _synchronise(x)
            start = time.perf_counter()
            call()
            _synchronise(x)
            measured.append((time.perf_counter() - start) * 1e3)
        tick()
    return Row(
        network,
        len(x),
        (expected - actual).abs().max().item(),
        (top5[0] == top5[1]).all(1).double().mean().item(),
        *map(statistics.median, times),
        *peaks,
    )


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
