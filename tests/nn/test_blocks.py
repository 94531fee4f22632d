"""What dense blocks and inception blocks, which write into one buffer, share beside stock."""

import copy

import pytest
import torch

import cvkernels
from tests.nn import test_dense_block, test_inception
from tests.support.numerics import assert_matches_module
from tests.support.pairs import with_statistics


@pytest.fixture(params=[test_dense_block, test_inception], ids=["dense", "inception"])
def block(request):
    """The tests of one kind of block, which have its pairs and images."""
    return request.param


def concatenates(module, x):
    with torch.no_grad():
        return any(row.op == "aten.cat" for row in cvkernels.explain(module, x).rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 6, 7), (1, 1, 1)], ids=str)
def test_matches_stock(block, size, dtype, memory_format, device):
    ours, stock = (module.to(device, dtype) for module in block.blocks())
    x = block.image(batch=size[0], size=size[1:], dtype=dtype, device=device)
    x = x.contiguous(memory_format=memory_format)
    before = x.clone()
    for _ in range(3):  # the first call, the one that plans, and one by a kept plan
        assert_matches_module(ours, stock, x, grad=False)
    assert torch.equal(x, before)
    assert not concatenates(ours, x)


def test_float64(block, memory_format):
    ours, stock = (module.double() for module in block.blocks())
    x = block.image(dtype=torch.float64).contiguous(memory_format=memory_format)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-12, atol=1e-12)


def test_every_call_has_a_buffer_of_its_own(block):
    ours, stock = block.blocks()
    image = block.image
    images = [image(), image(), image(batch=1, size=(9, 4)), image()]
    with torch.no_grad():
        outputs = [ours(x) for x in images]
        for x, out in zip(images, outputs, strict=True):
            assert torch.allclose(out, stock(x), atol=1e-5)
            if block is test_dense_block:
                assert out.is_contiguous(memory_format=torch.channels_last)


def test_inference_mode_and_autocast(block):
    ours, stock = block.blocks()
    x = block.image()
    with torch.inference_mode():
        for _ in range(2):
            assert torch.allclose(ours(x), stock(x), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(2):
            assert (ours(x) - stock(x)).abs().max() < 0.1
        assert concatenates(ours, x)


def test_loads_and_copies_are_followed(block):
    ours, stock = block.blocks()
    x = block.image()
    with torch.no_grad():
        ours(x), ours(x)
        with_statistics(stock)
        ours.load_state_dict(stock.state_dict())
        assert torch.allclose(ours(x), stock(x), atol=1e-5)
        twin = copy.deepcopy(ours)
        assert not any("_derived" in module.__dict__ for module in twin.modules())
        assert torch.equal(twin(x), ours(x))


HOOKED = {
    test_dense_block: [f"denselayer2{part}" for part in ("", *test_dense_block.PARTS)],
    test_inception: test_inception.HOOKED,
}


@pytest.mark.parametrize(
    ("tests", "hooked"),
    [(tests, layer) for tests, layers in HOOKED.items() for layer in layers],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition("test_")[2],
)
def test_a_hook_is_called_with_what_it_sees_in_stock(tests, hooked):
    ours, stock = tests.blocks()
    x, seen = tests.image(), []
    with torch.no_grad():
        ours(x), ours(x)  # a plan must not outlive the hook
        for module in (ours, stock):
            module.get_submodule(hooked).register_forward_hook(
                lambda module, args, out: seen.append(out.clone())
            )
            module(x)
        torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)
        rows = cvkernels.explain(ours, x).rows
    assert "has a hook" in str({row.reason for row in rows})
