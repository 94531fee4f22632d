"""Fresh memory for large outputs comes in huge pages, where the system has them."""

import resource
from pathlib import Path

import pytest
import torch

from cvkernels import extension
from cvkernels import functional as CF

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OFFERED = SETTING.exists() and "[never]" not in SETTING.read_text()
PAGE = 1 << 12

pytestmark = [
    pytest.mark.skipif(not extension.has("cpu"), reason="needs the compiled CPU ops"),
    pytest.mark.skipif(not OFFERED, reason="needs transparent huge pages"),
]

CALLS = {
    "conv_bn_act": lambda x: CF.conv_bn_act(x, torch.ones(64, 64, 1, 1)),
    "depthwise_conv_bn_act": lambda x: CF.depthwise_conv_bn_act(x, torch.ones(64, 1, 3, 3)),
    "max_pool": lambda x: CF.max_pool(x, 1),
    "avg_pool": lambda x: CF.avg_pool(x, 1),
    "se_scale": lambda x: CF.se_scale(x, torch.ones(1, 64)),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """None here: PyTorch's writing NaN to outputs would be the first write to them."""


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.parametrize("name", CALLS)
def test_a_large_output_is_faulted_in_huge_pages(name):
    # More than glibc keeps of what is freed: every output is fresh memory.
    x = torch.zeros(1, 64, 512, 512).contiguous(memory_format=torch.channels_last)
    pages = x.nbytes // PAGE
    CALLS[name](x)
    before = faults()
    CALLS[name](x)
    assert faults() - before < pages // 4
