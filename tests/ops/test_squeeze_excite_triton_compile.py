"""The Triton kernels of se_scale compiled for real targets, as in test_triton_compile."""

from dataclasses import dataclass

import pytest

from cvkernels.ops.squeeze_excite import tiles
from tests.support.cases.squeeze_excite import NETWORKS
from tests.support.tiers import asked
from tests.support.triton_compiled import compile_cases, compiled_once

pytest.importorskip("triton")

ARCHS = (80, 90, 100)
REGISTERS = 65536  # of one SM


@dataclass(frozen=True)
class Case:
    """One launch, compiled for one target."""

    kernel: str
    arch: int
    N: int
    C: int
    R: int
    size: int
    dtype: str = "bfloat16"
    act: str = "none"
    residual: bool = False
    nchw: bool = False

    def __str__(self):
        layout = "nchw" if self.nchw else "nhwc"
        added = "-residual" if self.residual else ""
        shape = f"{self.N}x{self.C}x{self.size}"
        return f"{self.kernel}-{shape}-{self.dtype}-{self.act}{added}-{layout}-sm{self.arch}"


def excites(arch, N, C, R, size, dtype="bfloat16"):
    """The launches of both layers."""
    launches = tiles.excite(N, 1, C, R, C, 4 if dtype == "float32" else 2, 132).launches
    for kernel in ("excite",) if launches == 1 else ("hidden", "out"):
        yield Case(kernel, arch, N, C, R, size, dtype)


def network_cases(arch):
    """What SE-ResNet-50 and EfficientNet-B0 launch, in inference and in training."""
    for name, m in NETWORKS.items():
        for N in (1, 128):
            shape = (arch, N, m.C, m.R, m.H)
            seresnet = name.startswith("seresnet")
            act = "relu" if seresnet else "none"
            yield Case("squeeze", *shape)
            yield from excites(*shape)
            yield Case("scale", *shape, act=act, residual=seresnet)
            if N == 128:
                yield Case("reduce", *shape, act=act, residual=seresnet)
                yield Case("shift", *shape)


def other_cases(arch):
    shape = (arch, 128, 256, 16, 56)
    yield Case("finish", *shape)
    for layers in ((128, 3840, 160), (16, 2048, 512), (2048, 2048, 128), (2048, 96, 4)):
        for dtype in ("float16", "float32"):
            yield from excites(arch, *layers, 7, dtype)
    for dtype in ("float16", "float32"):
        for act in ("none", "relu", "silu"):
            for nchw in (False, True):
                yield Case("scale", *shape, dtype, act, True, nchw)
                yield Case("backward", *shape, dtype, act, True, nchw)
        yield Case("squeeze", *shape, dtype, nchw=True)
        yield Case("squeeze", *shape, dtype)


# A third of them for the other architectures: each takes a quarter of a second.
CASES = [
    case
    for arch in ARCHS
    for place, case in enumerate([*network_cases(arch), *other_cases(arch)])
    if arch == 90 or place % 3 == arch % 3
]
# C is no multiple of 8, or a plane none of 16 bytes: narrow accesses, and they only must compile.
AWKWARD = [
    Case(kernel, 90, 2, C, 3, size, "float16", act, True, nchw)
    for kernel in ("squeeze", "excite", "scale", "backward", "reduce", "shift", "finish")
    for C, size, act in ((17, 7, "silu"), (1, 9, "relu"), (24, 1, "none"))
    for nchw in (False, True)
]
AWKWARD += [
    Case(kernel, 90, N, C, 70, 7, dtype)
    for kernel in ("hidden", "out")
    for N, C in ((2, 17), (600, 24))
    for dtype in ("bfloat16", "float32")
]


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """Case -> what inspect_launch found."""
    cases = asked(request, "case")
    return dict(zip(cases, compiled_once("se_scale", cases, tmp_path_factory), strict=True))


@pytest.mark.full
def test_awkward_shapes_compile():
    assert len(compile_cases("se_scale", AWKWARD)) == len(AWKWARD)


few = pytest.mark.few(30, together=True)


@few
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills(case, compiled):
    found = compiled[case]
    assert (found["stack"], found["local"]) == (0, 0), found


LAYERS = ("excite", "hidden", "out")
MAPS = [case for case in CASES if case.kernel not in (*LAYERS, "finish")]


@few
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_accesses_of_maps_are_16_bytes_wide(case, compiled):
    """Each map's loads and stores; only sums, which are one store, may be narrower."""
    found = compiled[case]
    assert found["load_16"] + found["async_16"] > 0, found
    assert found["load_2"] == found["async_narrow"] == 0, found
    sums = 0 if case.kernel in ("scale", "shift") else 1
    assert found["store"] - found["store_16"] <= sums, found


@few
@pytest.mark.parametrize("case", [case for case in CASES if case.kernel in LAYERS], ids=str)
def test_layers_are_products_whose_loads_are_ahead(case, compiled):
    """Matrix instructions, on tiles that asynchronous copies fetch steps before."""
    found = compiled[case]
    assert found["mma"] + found["wgmma"] + found["tcgen05"] > 0, found
    assert found["async_16"] > 0, found


@few
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_programs_that_the_grid_counts_on_fit_an_sm(case, compiled):
    found = compiled[case]
    of = {"squeeze": tiles.SQUEEZE, "scale": tiles.SCALE, "shift": tiles.SCALE}
    resident = of.get(case.kernel, tiles.BACKWARD).resident
    assert resident * 32 * found["meta"].get("num_warps", 4) * found["registers"] <= REGISTERS
