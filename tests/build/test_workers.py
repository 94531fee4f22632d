"""A frozen model in worker processes gives the bits that it gives here."""

import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.support.five_families import Uses

METHODS = sorted({"spawn", "forkserver", "fork"} & {*multiprocessing.get_all_start_methods()})


class Answers(Dataset):
    """What a frozen model gives for each of some images."""

    def __init__(self, frozen: torch.nn.Module, images: torch.Tensor) -> None:
        self.frozen, self.images = frozen, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.frozen(self.images[index : index + 1])[0]


@pytest.mark.few(1)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader(method):
    frozen, images = Uses()._frozen, torch.randn(6, 3, 12, 12)
    expected = torch.stack([frozen(x[None])[0] for x in images])
    options = {"num_workers": 2, "multiprocessing_context": method, "timeout": 120}
    loader = DataLoader(Answers(frozen, images), batch_size=2, **options)
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), expected)
