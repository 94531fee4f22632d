"""Writes what each network's plan has into its page: ``python docs/plans.py``, from the root.

Kernels and bytes are what ``explain`` counts for images on the meta device, in the plan that a
Hopper GPU would get. tests/docs holds that the pages are up to date.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

import cvkernels
from cvkernels.demo import NETWORKS
from cvkernels.explain import Explanation

PAGES = Path(__file__).resolve().parent / "pages" / "networks"
PAGE_OF = {
    "googlenet": "googlenet",
    "resnet50": "resnet",
    "densenet121": "densenet",
    "seresnet50": "senet",
    "efficientnet_b0": "efficientnet",
}
BEGIN, END = "<!-- plan -->", "<!-- end of plan -->"
BATCH = 128


def main() -> None:
    for network in PAGE_OF:
        path, text = page(network)
        path.write_text(text)


def page(network: str) -> tuple[Path, str]:
    """The path of the network's page, and what it is to hold."""
    path = PAGES / f"{PAGE_OF[network]}.md"
    before, _, rest = path.read_text().partition(BEGIN)
    return path, f"{before}{BEGIN}\n\n{plan(network)}\n\n{END}{rest.partition(END)[2]}"


def plan(network: str) -> str:
    with torch.device("meta"):
        image = torch.empty(BATCH, 3, 224, 224, dtype=torch.bfloat16)
        image = image.contiguous(memory_format=torch.channels_last)
        stock, ours = _stock(network), cvkernels.create_model(network, **_options(network))
    counted = {
        "stock PyTorch": cvkernels.explain(stock.eval().to(torch.bfloat16), image),
        "imported": cvkernels.explain(ours.eval().to(torch.bfloat16), image),
        "frozen": cvkernels.explain(ours, image, frozen=True),
    }
    frozen = counted["frozen"]
    assert frozen.predicted_us is not None
    seconds = frozen.predicted_us / 1e6
    return "\n\n".join([
        f"`{network}` in bfloat16 on {BATCH} images of 224 x 224, in evaluation:",
        _table(
            ["", "kernels", "MB moved per image"],
            [[name, str(e.totals["kernels"]), _mb(_bytes(e))] for name, e in counted.items()],
        ),
        "The frozen plan by op:",
        _table(["op", "backend", "kernels", "MB moved per image"], _by_op(frozen)),
        f"Counted from the plan that an H200 would get. A model predicts {seconds * 1e3:.2f} ms "
        "for it\nthere; no GPU has measured that. Every step is printed by",
        f"```bash\npython -m cvkernels explain {network} --frozen --device meta --dtype bfloat16 "
        f"--batch {BATCH}\n```",
    ])  # fmt: skip


def _stock(network: str) -> nn.Module:
    if NETWORKS[network] == "timm":
        import timm

        return timm.create_model(network)
    import torchvision

    return torchvision.models.get_model(network, **_options(network))


def _options(network: str) -> dict:
    return {"init_weights": False} if network == "googlenet" else {}


def _bytes(explained: Explanation) -> int:
    return explained.totals["bytes_read"] + explained.totals["bytes_written"]


def _mb(count: int) -> str:
    return f"{count / BATCH / 1e6:.1f}"


def _by_op(explained: Explanation) -> list[list[str]]:
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in explained.rows:
        found = sums[row.op, row.backend.split()[0]]
        found[0] += row.kernels
        found[1] += row.bytes_read + row.bytes_written
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return [[*key, str(kernels), _mb(moved)] for key, (kernels, moved) in ordered if kernels]


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *lines))


if __name__ == "__main__":
    main()
