"""The Triton kernels of a plan, compiled in parallel before its first call.

Run as a script, without TRITON_INTERPRET, this file collects the launches of plans for a GPU that
is not there, and compiles them with Triton's compiler or with one that only counts.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

import cvkernels  # noqa: E402
from cvkernels.freeze.compile import compile_launches  # noqa: E402
from cvkernels.freeze.frozen import planned  # noqa: E402
from cvkernels.ops.common import triton_compile  # noqa: E402
from cvkernels.ops.common.launches import collected, collecting  # noqa: E402

ROOT = Path(__file__).parents[2]
NETWORKS = ("googlenet", "resnet50", "densenet121", "seresnet50", "efficientnet_b0")
BATCHES = (128, 1)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 1)
        self.head = nn.Conv2d(32, 64, 1)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))))


def plan_of(model, batch, size=224):
    """A plan for a GPU, whose launches can be collected."""
    with collecting():
        images = torch.empty(batch, 3, size, size, dtype=torch.bfloat16, device="meta")
        return planned(model.eval().to("meta", torch.bfloat16), images)


@pytest.fixture(scope="module")
def found():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", NETWORKS)
def test_each_kernel_of_a_network_is_compiled_once(name, found):
    for batch in BATCHES:
        counted = found["networks"][f"{name} {batch}"]
        assert counted["layers that launch"] == counted["layers"]
        assert 0 < counted["distinct"] < counted["launches"]
        assert counted["compiled"] == counted["distinct kernels compiled"]
        assert counted["compiled anew"] == 0
    # What the second batch size shares with the first is not compiled for it; of DenseNet's, none.
    assert counted["compiled"] < counted["distinct"] + (name == "densenet121")


def test_compilations_run_at_the_same_time(found):
    assert found["at once"] == 3


def test_an_error_names_the_layer(found):
    message = "freeze: the Triton kernel of body does not compile (ValueError: no such thing)"
    assert found["error"] == message


def test_what_fails_in_a_thread_is_compiled_without(found):
    assert found["failed in a thread"] == 3


def test_an_interrupt_ends_it_and_a_later_call_goes_on(found):
    assert found["interrupted"] == {"compiled": 2, "later": 3}


def test_kernels_that_were_compiled_in_threads_are_those_of_a_launch(found):
    assert found["compiled by the launch"] == 0


def test_a_launch_is_collected_by_its_own_thread_alone():
    with collecting() as launched:
        other = threading.Thread(target=lambda: launched.append(collected.found))
        other.start()
        other.join()
    assert launched == [None] and collected.found is None


def test_a_plan_for_the_meta_device_has_no_launches_of_its_own():
    images = torch.empty(1, 3, 8, 8, dtype=torch.bfloat16, device="meta")
    plan = planned(Small().eval().to("meta", torch.bfloat16), images)
    assert plan.launches() == [] and compile_launches(plan) == 0


@pytest.mark.gpu
def test_freeze_compiles_before_the_first_call(monkeypatch):
    compiled = []
    compile_all = triton_compile.compile_all
    monkeypatch.setattr(
        triton_compile, "compile_all", lambda *given: compiled.append(compile_all(*given))
    )
    x = torch.randn(2, 3, 16, 16, device="cuda", dtype=torch.bfloat16)
    model = Small().eval().to("cuda", torch.bfloat16)
    frozen = cvkernels.freeze(model, x)
    assert compiled == [3]
    torch.testing.assert_close(frozen(x), model(x), rtol=0.05, atol=0.05)


# The subprocess


class Driver:
    """Of a GPU that is not there: says what to compile for."""

    get_current_device = staticmethod(lambda: 90)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


class Compiler:
    """In place of Triton's: counts what it is asked for."""

    def __init__(self):
        self.keys, self.wait = [], lambda: None
        self.wrong, self.in_threads_alone = "", False

    def __call__(self, src, target=None, options=None, _env_vars=None):
        in_thread = threading.current_thread() is not threading.main_thread()
        if self.wrong and self.wrong in src.name and (in_thread or not self.in_threads_alone):
            raise ValueError("no such thing")
        self.keys.append((src.hash(), str(sorted(options.items(), key=str))))
        self.wait()
        return object.__new__(Kernel)


class Kernel:
    run = None


def by_counting(compiler):
    """Have our kernels compile anew, by ``compiler``."""
    triton.compiler.compile = compiler
    for module in list(sys.modules.values()):
        if module.__name__.startswith("cvkernels."):
            for value in vars(module).values():
                if isinstance(caches := getattr(value, "device_caches", None), dict):
                    caches.clear()


def network(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        return getattr(cvkernels.models, name)(**options)


def counts(name, batch, compiler):
    plan, before = plan_of(network(name), batch), len(compiler.keys)
    launched = plan.launches()
    distinct = compile_launches(plan)
    keys = compiler.keys[before:]
    compile_launches(plan)
    launching = [step for step, run in plan.steps if run and "triton" in plan.backends[step]]
    return {
        "launches": len(launched),
        "layers": len({step.layer for step in launching}),
        "layers that launch": len({layer for layer, _ in launched}),
        "distinct": distinct,
        "compiled": len(keys),
        "distinct kernels compiled": len(set(keys)),
        "compiled anew": len(compiler.keys) - before - len(keys),
    }


def networks():
    found = {}
    for name in NETWORKS:
        compiler = Compiler()
        by_counting(compiler)
        found |= {f"{name} {batch}": counts(name, batch, compiler) for batch in BATCHES}
    return found


def at_once():
    """How many compilations three workers have under way, of seven or more."""
    compiler, barrier = Compiler(), threading.Barrier(3)
    by_counting(compiler)
    most = itertools.count(1)
    compiler.wait = lambda: barrier.wait(60) if next(most) <= 3 else None
    triton_compile.compile_all(plan_of(network("resnet50"), 128).launches(), workers=3)
    return 0 if barrier.broken else barrier.parties


def error():
    compiler = Compiler()
    by_counting(compiler)
    compiler.wrong = "1x1"
    try:
        compile_launches(plan_of(Small(), 2, 16))
    except RuntimeError as error:
        return str(error)


def failed_in_a_thread():
    """The kernels that are there all the same."""
    compiler = Compiler()
    by_counting(compiler)
    compiler.wrong, compiler.in_threads_alone = "1x1", True
    compile_launches(plan_of(Small(), 2, 16))
    return len(compiler.keys)


def interrupted():
    """After the first kernel, while one is being compiled and one waits."""
    compiler, compiling, end = Compiler(), threading.Event(), threading.Event()
    by_counting(compiler)
    launched = plan_of(Small(), 2, 16).launches()

    def wait():
        if len(compiler.keys) > 1:
            compiling.set()
            end.wait(60)

    @contextlib.contextmanager
    def bar(total):
        def advance():
            compiling.wait(60)
            threading.Timer(0.1, end.set).start()
            raise KeyboardInterrupt

        yield advance

    compiler.wait = wait
    with contextlib.suppress(KeyboardInterrupt):
        triton_compile.compile_all(launched, bar=bar, workers=1)
        return "not interrupted"
    before = len(compiler.keys)
    return {"compiled": before, "later": triton_compile.compile_all(launched)}


def compiled_by_the_launch():
    """Of Triton's own compiler, after it has compiled the same in threads."""
    from triton.compiler.compiler import compile

    by_counting(compile)
    launched = plan_of(Small(), 2, 16).launches()
    triton_compile.compile_all(launched, workers=2)
    compiler = Compiler()
    for _, (launch, operands) in launched:
        launch.kernel.compile = compiler
        launch.warmup(*operands)
    return len(compiler.keys)


def main():
    triton.runtime.driver.set_active(Driver())
    found = {
        "networks": networks(),
        "at once": at_once(),
        "error": error(),
        "failed in a thread": failed_in_a_thread(),
        "interrupted": interrupted(),
        "compiled by the launch": compiled_by_the_launch(),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
