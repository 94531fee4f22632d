"""Planned launches of Triton kernels: what reaches the driver, and what a call costs the host.

Run as a script, without TRITON_INTERPRET, this file compiles kernels for a GPU that is not there
and launches them by Triton's own code and by ours, down to the driver's function that would start
the kernel; it prints what that was given. Tests read it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import timeit
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402

import cvkernels  # noqa: E402
from cvkernels.ops.common.norm import BatchNormParams  # noqa: E402
from cvkernels.ops.common.triton_launch import Launch  # noqa: E402
from cvkernels.ops.conv_bn_act import tiles, tuning  # noqa: E402
from cvkernels.ops.conv_bn_act import triton as conv_launches  # noqa: E402
from cvkernels.ops.conv_bn_act.problem import problem_of  # noqa: E402
from cvkernels.ops.depthwise_conv_bn_act import triton as depthwise_launches  # noqa: E402
from cvkernels.ops.depthwise_conv_bn_act.problem import problem_of as depthwise_problem  # noqa: E402
from cvkernels.ops.squeeze_excite import triton as se_launches  # noqa: E402

CPU = -1  # what get_device() of the tensors says
US_PER_CALL = 15
SLACK = 4  # a machine that others use too, or a slow one


@triton.jit
def scaled_kernel(
    x_ptr, scale_ptr, factor, out_ptr, size, UNUSED: tl.constexpr, BLOCK: tl.constexpr
):
    """out = x * scale * factor, the scale optional."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + offs, mask=offs < size).to(tl.float32) * factor
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + offs, mask=offs < size).to(tl.float32)
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=offs < size)


def scaled_launch(size=40, grid=(3,)):
    return Launch(scaled_kernel, grid, (size,), {"UNUSED": "no", "BLOCK": 16, "num_warps": 2})


# Calls of one launch; ``scale`` None, unlike it in dtype, or not at a multiple of 16 bytes.
def operands(x="float32", scale="float32", factor=2.0, x_start=0, scale_start=0, out_start=0):
    def vector(dtype, start):
        return torch.ones(48, dtype=getattr(torch, dtype))[start : start + 40]

    scale = None if scale is None else vector(scale, scale_start)
    return vector(x, x_start), scale, factor, vector(x, out_start)


KINDS = {
    "aligned": {},
    "half": {"x": "float16"},
    "half-scale": {"scale": "float16"},
    "no-scale": {"scale": None},
    "x-misaligned": {"x_start": 1},
    "scale-misaligned": {"scale_start": 1},
    "out-misaligned": {"out_start": 3},
    "all-misaligned": {"x_start": 2, "scale_start": 1, "out_start": 3},
}
SAME_KIND = {"other-factor": {"factor": 1.0}, "aligned-slices": {"x_start": 4, "scale_start": 8}}


def test_launches_compute(device):
    launch = scaled_launch()
    for options in {**KINDS, **SAME_KIND}.values():
        x, scale, factor, out = (
            v.to(device) if isinstance(v, torch.Tensor) else v for v in operands(**options)
        )
        for _ in range(2):
            launch(x, scale, factor, out.zero_())
            assert torch.equal(out, x * factor)


def test_an_empty_grid_launches_nothing(device):
    x, scale, factor, out = operands()
    Launch(scaled_kernel, (0,), (40,), {})(x.to(device), None, factor, out.to(device))
    assert torch.equal(out, torch.ones(40))


STRIDES = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda x: x,
    "slice": lambda x: x.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)[:, :16],
}


def pointwise(x, weight, act="relu"):
    return problem_of(x, weight, None, None, 1, 0, 1, 1, act, None, None, None, None)


def test_plans_are_kept_by_what_they_depend_on():
    """Equal strides share a plan; others, and another problem, tile or precision do not."""
    weight = torch.empty(16, 16, 1, 1, device="meta")
    maps = [view(torch.empty(2, 16, 5, 5, device="meta")) for view in STRIDES.values()]
    problem, silu = (pointwise(maps[0], weight, act) for act in ("relu", "silu"))
    tile = tiles.CONFIGS["1x1", 4][0]

    def plans():
        for p, precision, config in (
            (problem, "ieee", None), (problem, "tf32", None), (silu, "ieee", None),
            (problem, "ieee", tile),
        ):  # fmt: skip
            for x in maps:
                for out in maps:
                    yield conv_launches.plan_launch(
                        p, x, weight, None, None, out, precision=precision, config=config
                    )

    first, second = list(plans()), list(plans())
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert len(set(map(id, first))) == 4 * 9


def test_a_table_that_is_loaded_reaches_the_next_plan(monkeypatch):
    x, weight = torch.empty(2, 16, 5, 5, device="meta"), torch.empty(16, 16, 1, 1, device="meta")
    problem = pointwise(x, weight)

    def plan():
        return conv_launches.plan_launch(problem, x, weight, None, None, x, precision="ieee")

    before = plan()
    other = tiles.CONFIGS["1x1", 4][0]
    monkeypatch.setattr(tuning, "choose", lambda *_: other)
    assert plan().launch.meta["BLOCK_M"] == other.block_m and plan() is not before


def test_squeeze_excite_plans_copy_what_kernels_cannot_read(device):
    """A plan for a transposed map reads another one of the same layout."""
    gate = torch.randn(2, 16, device=device)
    plans = []
    for _ in range(2):
        x = torch.randn(2, 16, 5, 4, device=device).transpose(2, 3)
        plan = se_launches.plan_se_scale(x, x, "relu")
        expected = (x * gate.sigmoid()[:, :, None, None] + x).relu()
        assert torch.allclose(plan(x, gate, x), expected, atol=1e-6)
        plans.append(plan)
    assert plans[0] is plans[1]


# The subprocess's answers


@pytest.fixture(scope="module")
def found():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(cvkernels.__file__).resolve().parents[1]
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", [*KINDS, *SAME_KIND])
def test_the_driver_is_given_what_triton_gives_it(kind, found):
    """The same kernel, grid, stream and arguments, whichever kinds were launched before."""
    by_triton, *planned = found["kinds"][kind]
    assert len(planned) == 2 and all(call == by_triton for call in planned)


def test_each_kind_has_its_kernel(found):
    kernels = {kind: calls[0]["kernel"] for kind, calls in found["kinds"].items()}
    assert len({kernels[kind] for kind in KINDS}) == len(KINDS)
    assert {kernels[kind] for kind in SAME_KIND} == {kernels["aligned"]}


EXPECTED = {
    "asked of Triton, once for each kind": len(KINDS),
    "hooks around a launch": [["enter", "scaled_kernel"], ["exit", "scaled_kernel"]] * 2,
    "recompiled what Triton dropped": True,
    "left a launcher of another kind to Triton": 3,
    "hooks before a run": 3,
}


@pytest.mark.parametrize("what", EXPECTED)
def test_triton_is_gone_through_where_it_must_be(what, found):
    assert found[what] == EXPECTED[what]


@pytest.mark.parametrize("op", ["conv_bn_act", "depthwise_conv_bn_act", "se_scale"])
def test_host_time_of_a_planned_call(op, found):
    """With the launch stubbed: 15 us on a machine of its own."""
    assert found["times"][op] < SLACK * US_PER_CALL, found["times"]


# The subprocess


class Launcher(CudaLauncher):
    """Triton's launcher, but for the function of the driver that starts the kernel."""

    calls = []

    def __init__(self, src, metadata):
        self.src, self.name = src, metadata.name
        self.num_ctas, self.gsan_enabled = 1, False
        self.global_scratch_size = self.profile_scratch_size = 0
        self.global_scratch_align = self.profile_scratch_align = 1
        self.launch_cooperative_grid = self.launch_pdl = False
        self.arg_annotations = self.kernel_signature = None

    def launch(self, *arguments):
        Launcher.calls.append((self, arguments))


class Uncalled(Launcher):
    """A launcher whose parameters are none that Triton has had."""

    def __call__(self, grid, *arguments):
        Launcher.calls.append((self, arguments))


class Driver:
    """Of a GPU that is not there, whose tensors are the CPU's."""

    launcher_cls = Launcher

    def __init__(self):
        self.get_current_device = lambda: CPU
        self.get_current_stream = lambda device: 7
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda *_: (1, 2, 64, 0, 1024),
            unload_module=lambda module: None,
        )


def described(call):
    """A call as plain values: pointers for tensors, names for hooks, and which kernel it is."""
    launcher, arguments = call

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.data_ptr()
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        known = value is None or isinstance(value, (int, float, str))
        # Triton passes chains of hooks, and what they are told, where there are none, too.
        return value if known else None

    return {"kernel": id(launcher), "arguments": plain(arguments)}


def launched(call):
    Launcher.calls.clear()
    call()
    (one,) = Launcher.calls
    return described(one)


def by_triton(launch, given):
    return launch.kernel[launch.grid](*given, *launch.fixed, **launch.meta)


def counting(launch):
    """``launch`` with its ways through Triton counted."""
    asked = []
    through = launch._by_triton
    launch._by_triton = lambda given: asked.append(1) or through(given)
    return asked


def kinds_found():
    launch = scaled_launch()
    asked = counting(launch)
    calls = {name: operands(**options) for name, options in {**KINDS, **SAME_KIND}.items()}
    results = {name: [launched(lambda g=g: by_triton(launch, g))] for name, g in calls.items()}
    for _ in range(2):
        for name, given in calls.items():
            results[name].append(launched(lambda g=given: launch(*g)))
    return {"kinds": results, "asked of Triton, once for each kind": len(asked)}


def hooks_found():
    launch, given, heard = scaled_launch(), operands(), []
    launch(*given)

    def listener(what):
        return lambda metadata: heard.append((what, metadata.get()["name"]))

    def hooked(self, *arguments):
        before, after = (a for a in arguments if isinstance(a, type(chains[0])))
        (metadata,) = (a for a in arguments if hasattr(a, "extras"))
        before(metadata)
        after(metadata)

    chains = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    listeners = (listener("enter"), listener("exit"))
    for chain, listening in zip(chains, listeners, strict=True):
        chain.add(listening)
    plain, Launcher.launch = Launcher.launch, hooked
    try:
        launch(*given)
        by_triton(launch, given)
    finally:
        Launcher.launch = plain
        for chain, listening in zip(chains, listeners, strict=True):
            chain.remove(listening)
    return heard


def recompiled():
    launch, given = scaled_launch(), operands()
    asked = counting(launch)
    before = [launched(lambda: launch(*given)) for _ in range(2)]
    scaled_kernel.device_caches.clear()
    after = [launched(lambda: launch(*given)) for _ in range(2)]
    kernels = [call["kernel"] for call in before + after]
    return len(asked) == 2 and kernels[0] == kernels[1] != kernels[2] == kernels[3]


def unknown():
    launch, given = scaled_launch(), operands()
    asked = counting(launch)
    scaled_kernel.device_caches.clear()
    Driver.launcher_cls = Uncalled
    for _ in range(3):
        launch(*given)
    Driver.launcher_cls = Launcher
    scaled_kernel.device_caches.clear()
    return len(asked)


def pre_run_hooks():
    launch, given, heard = scaled_launch(), operands(), []
    launch(*given)
    scaled_kernel.add_pre_run_hook(lambda *_, **__: heard.append(1))
    for _ in range(3):
        launch(*given)
    scaled_kernel.pre_run_hooks.clear()
    return len(heard)


def microseconds(call, calls=1000, rounds=7):
    for _ in range(20):
        call()
    clear, clock = Launcher.calls.clear, time.thread_time
    spent = timeit.repeat(call, clear, clock, repeat=rounds, number=calls)
    return statistics.median(spent) / calls * 1e6


def times():
    """Host time of planned calls with all they can have, as a block makes them."""

    def image():
        x = torch.randn(1, 64, 8, 8, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last)

    x, residual, out = image(), image(), image()
    bn = BatchNormParams(*torch.rand(4, 64))
    weight = torch.randn(64, 64, 3, 3, dtype=torch.bfloat16)
    geometry = (1, 1, 1)
    problem = problem_of(x, weight, None, bn, *geometry, 1, "relu", residual, None, None, None)
    conv = conv_launches.plan_launch(problem, x, weight, residual, None, out, precision="ieee")
    taps = torch.randn(64, 1, 3, 3, dtype=torch.bfloat16)
    rsc = taps.squeeze(1).permute(1, 2, 0)
    problem = depthwise_problem(x, taps, None, bn, *geometry, "silu", False)
    depthwise = depthwise_launches.plan_launch(problem, x, rsc, out)
    scale, gate = se_launches.plan_se_scale(x, residual, "relu", out), torch.rand(1, 64)
    return {
        "conv_bn_act": microseconds(lambda: conv(x, weight, None, bn, residual, None, None, out)),
        "depthwise_conv_bn_act": microseconds(lambda: depthwise(x, rsc, None, bn, out, None)),
        "se_scale": microseconds(lambda: scale(x, gate, residual, out)),
    }


def main():
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    found = kinds_found() | {
        "hooks around a launch": hooks_found(),
        "recompiled what Triton dropped": recompiled(),
        "left a launcher of another kind to Triton": unknown(),
        "hooks before a run": pre_run_hooks(),
        "times": times(),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
