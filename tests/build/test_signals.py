"""Signals end what runs soon and leave no trace in it; the interpreter ends without a word."""

import atexit
import contextlib
import importlib
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch
from torch import nn

import __main__
import cvkernels
from cvkernels import extension
from tests.support.five_families import USES, Uses, assert_same_bits
from tests.support.own_process import ended, run_alone, start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the signals are POSIX's")
INTERRUPTS = 15
SOON = 10.0  # seconds; machines that run tests are busy


def interrupted(function, delay: float) -> float:
    """How long after a SIGINT the repeated function ended, by KeyboardInterrupt."""
    sent, begun = [], threading.Event()

    def interrupt():
        begun.wait()
        time.sleep(delay)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with contextlib.suppress(KeyboardInterrupt):
        begun.set()
        while not sent or time.monotonic() - sent[0] < 10 * SOON:
            function()
    late = time.monotonic() - sent[0]
    thread.join()
    return late


def interrupt_at_random_times(use: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    uses, choose = Uses(), random.Random(use)
    expected = uses.all()
    for _ in range(INTERRUPTS):
        assert interrupted(getattr(uses, use), choose.uniform(0, 0.1)) < SOON
        assert_same_bits(uses.all(), expected)


@pytest.mark.few(2)
@pytest.mark.parametrize("use", USES)
def test_an_interrupt_leaves_no_trace(use):
    run_alone(interrupt_at_random_times, use)


def interrupt_a_large_batch() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    layers = [layer for _ in range(60) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 64, 1), *layers).eval()
    frozen = cvkernels.freeze(model, torch.randn(1, 3, 8, 8))
    x = torch.randn(8, 3, 112, 112)
    frozen(x[:, :, :8, :8])
    (before,) = [time.monotonic()]
    expected = frozen(x)
    whole = time.monotonic() - before
    assert interrupted(lambda: frozen(x), 0.3) < whole / 2
    assert torch.equal(frozen(x), expected)


@pytest.mark.skipif(not extension.has("cpu"), reason="the compiled extension is missing")
def test_a_call_of_seconds_is_interrupted_before_its_end():
    run_alone(interrupt_a_large_batch)


def call_forever(handle: bool) -> None:
    signal.signal(signal.SIGTERM, (lambda *_: sys.exit(3)) if handle else signal.SIG_DFL)
    uses = Uses()
    uses.all()
    print("calls", flush=True)
    while True:
        uses.frozen(), uses.live()


@pytest.mark.parametrize(("handle", "expected"), [(False, -signal.SIGTERM), (True, 3)])
def test_sigterm_ends_the_process(handle, expected):
    process = start(call_forever, handle)
    assert process.stdout.readline() == "calls\n"
    process.terminate()
    status, _, err = ended(process, timeout=60)
    assert (status, err) == (expected, "")


# The end of the interpreter


def keep_in_globals() -> None:
    __main__.uses = Uses()
    __main__.results = __main__.uses.all()
    __main__.large = cvkernels.freeze(nn.Conv2d(3, 64, 3).eval(), torch.randn(1, 3, 224, 224))
    __main__.map = __main__.large(torch.randn(2, 3, 224, 224))


def call_at_exit() -> None:
    uses = Uses()
    expected = uses.all()
    atexit.register(lambda: assert_same_bits(uses.all(), expected))


class CalledWhenDropped:
    def __init__(self) -> None:
        self.uses = Uses()
        self.uses.all()

    def __del__(self) -> None:
        # PyTorch's own modules may be gone by now.
        with contextlib.suppress(Exception):
            self.uses.frozen(), self.uses.live()


def call_in_teardown() -> None:
    __main__.dropped_last = CalledWhenDropped()
    sys.dropped_later = CalledWhenDropped()


def leave_a_thread() -> None:
    uses = Uses()
    expected = uses.all()

    def work():
        for _ in range(20):
            assert_same_bits(uses.all(), expected)

    threading.Thread(target=work).start()


def leave_a_daemon(calls: str) -> None:
    torch.set_num_threads(1)
    _C = importlib.import_module("cvkernels._C")
    x = torch.randn(4, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    out = torch.empty(4, 64)

    def squeeze() -> None:
        torch.ops.cvkernels.squeeze_native_out(x, out)

    direct = _C.direct(squeeze)
    call = {
        "program": _C.record(squeeze),
        "direct call": lambda: direct(x.data_ptr(), out.data_ptr()),
    }[calls]
    call()

    def work(*_kept: torch.Tensor) -> None:
        while True:
            call()

    threading.Thread(target=work, args=(x, out), daemon=True).start()
    time.sleep(0.2)


ENDS = (keep_in_globals, call_at_exit, call_in_teardown, leave_a_thread)


@pytest.mark.few(2)
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_quietly(end):
    run_alone(end)


@pytest.mark.skipif(not extension.has("cpu"), reason="the compiled extension is missing")
@pytest.mark.parametrize("calls", ["program", "direct call"])
def test_the_interpreter_ends_quietly_in_native_calls_of_a_daemon(calls):
    """PyTorch's own calls abort the process then, with Python up to 3.13."""
    run_alone(leave_a_daemon, calls)
