"""Large results in memory that freed ones lay in: callers can do with them what they could."""

import io
import os
import subprocess
import sys
import threading

import pytest
import torch

import cvkernels
from cvkernels import extension
from cvkernels.memory_use import out_of_memory, resident_memory
from cvkernels.ops.common import recycled
from cvkernels.ops.common.recycled import maker
from cvkernels.ops.conv_bn_act import native

pytestmark = pytest.mark.skipif(
    not extension.has("cpu"), reason="the compiled extension is missing"
)
MB = 1 << 20


def like(megabytes: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A map of so many megabytes."""
    width = megabytes * MB // dtype.itemsize // (4 * 64 * 64)
    return torch.empty(4, width, 64, 64, dtype=dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("megabytes", [1, 8])
def test_results_are_as_their_model(megabytes, dtype):
    model = like(megabytes, dtype)
    for y in (maker(model)(), maker(model[:, :16])()):
        expected = torch.empty_like(model if y.shape == model.shape else model[:, :16])
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), dtype)
        assert type(y) is torch.Tensor
        assert not y.requires_grad and y._base is None and not y.is_inference()
    with torch.inference_mode():
        assert maker(model)().is_inference()


def test_memory_is_another_tensors_when_all_that_reads_it_is_gone():
    make = maker(like())
    y = make()
    address, view, array = y.data_ptr(), y[1:], y.numpy()
    del y
    assert make().data_ptr() != address
    del view
    assert make().data_ptr() != address
    del array
    assert make().data_ptr() == address
    assert maker(like(20))().data_ptr() != address, "a block of twice the size and more is another"


def test_idle_memory_goes_back_to_the_system():
    cpu = torch.device("cpu")
    before = resident_memory(cpu)
    make = maker(like(64))
    held = [make().zero_() for _ in range(12)]
    assert resident_memory(cpu) - before > 500 * MB  # 768 MB, of which 256 may have been idle
    del held
    assert resident_memory(cpu) - before < 300 * MB


def test_results_of_threads_are_their_own():
    make, wrong = maker(like(4)), []

    def work(number: int) -> None:
        for step in range(50):
            tensors = [make().fill_(number + step + i) for i in range(3)]
            wrong.extend(t for i, t in enumerate(tensors) if (t != number + step + i).any())

    threads = [threading.Thread(target=work, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_shared_copied_and_saved_results_do_not_change():
    make = maker(like())
    y = make().fill_(1)
    file = io.BytesIO()
    torch.save(y, file)
    copy, address = y.clone(), y.data_ptr()
    assert y.share_memory_().is_shared()
    assert y.data_ptr() != address
    other = make().fill_(2)
    assert other.data_ptr() == address
    file.seek(0)
    for kept in (y, copy, torch.load(file, weights_only=True)):
        assert (kept == 1).all()


def test_a_result_cannot_grow_in_place():
    """As README says: PyTorch lets no memory grow that is not its own."""
    y = maker(like())()
    assert y.resize_(4).shape == (4,)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(2 * like().numel())


def test_memory_that_runs_out_is_told():
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised:
        recycled._recycled(torch.empty(1).expand(1 << 45))
    assert out_of_memory(raised.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_has_its_own():
    code = """
import os, torch
torch.set_num_threads(1)
from cvkernels.ops.common.recycled import maker
from cvkernels.ops.conv_bn_act import native
make = maker(torch.empty(4, 128, 64, 64))
held, idle = make().fill_(1), make()
del idle
child = os.fork()
if child == 0:
    theirs = make().fill_(2)
    os._exit(int(not (held == 1).all() or not (theirs == 2).all()))
ours = make().fill_(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (held == 1).all() and (ours == 3).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_networks_take_it(monkeypatch):
    made = []

    def counted(like: torch.Tensor) -> torch.Tensor:
        made.append(like.shape)
        return torch.empty_like(like)

    monkeypatch.setattr(recycled, "_recycled", counted)
    for name in ("resnet18", "densenet121", "googlenet", "efficientnet_b0"):
        options = {"init_weights": False} if name == "googlenet" else {}
        model = cvkernels.create_model(name, **options)
        x = torch.randn(4, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        model(x)
        assert made, name
        made.clear()
        model.eval()
        with torch.no_grad():
            model(x), model(x)
        assert made, name
        made.clear()


def test_weights_are_not_among_what_is_reused(monkeypatch):
    """A frozen network keeps them: blocks of whole huge pages would be wasted on them."""

    def refused(like: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"recycled memory of shape {list(like.shape)}")

    monkeypatch.setattr(recycled, "_recycled", refused)
    weight = torch.randn(512, 512, 3, 3)
    for algorithm in (native.DIRECT, *native.WINOGRAD):
        assert native.pack(weight, algorithm).nbytes > recycled.BYTES
