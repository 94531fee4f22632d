"""The Triton kernels of se_scale compiled for real targets, as in test_triton_compile."""

from dataclasses import dataclass

import pytest

from cvkernels.ops.squeeze_excite import tiles
from tests.support.cases.squeeze_excite import NETWORKS
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


def network_cases(arch):
    """What SE-ResNet-50 and EfficientNet-B0 launch, in inference and in training."""
    for name, m in NETWORKS.items():
        for N in (1, 128):
            shape = (arch, N, m.C, m.R, m.H)
            seresnet = name.startswith("seresnet")
            act = "relu" if seresnet else "none"
            yield Case("squeeze", *shape)
            yield Case("excite", *shape)
            yield Case("scale", *shape, act=act, residual=seresnet)
            if N == 128 and 2 * m.C * m.H * m.W <= tiles.IMAGE_BYTES:
                yield Case("image", *shape, act=act, residual=seresnet)
            if N == 128:
                yield Case("reduce", *shape, act=act, residual=seresnet)
                yield Case("shift", *shape)


def other_cases(arch):
    shape = (arch, 128, 256, 16, 56)
    yield Case("finish", *shape)
    yield Case("excite", arch, 128, 3840, 160, 7)
    yield Case("excite", arch, 16, 2048, 512, 7)
    yield Case("image", arch, 128, 480, 20, 7, "float32", "silu", True)
    for dtype in ("float16", "float32"):
        for act in ("none", "relu", "silu"):
            for nchw in (False, True):
                yield Case("scale", *shape, dtype, act, True, nchw)
                yield Case("backward", *shape, dtype, act, True, nchw)
        yield Case("squeeze", *shape, dtype, nchw=True)
        yield Case("squeeze", *shape, dtype)


CASES = [case for arch in ARCHS for cases in (network_cases, other_cases) for case in cases(arch)]
# C is no multiple of 8, or a plane none of 16 bytes: narrow accesses, and they only must compile.
AWKWARD = [
    Case(kernel, 90, 2, C, 3, size, "float16", act, True, nchw)
    for kernel in ("squeeze", "excite", "image", "scale", "backward", "reduce", "shift", "finish")
    for C, size, act in ((17, 7, "silu"), (1, 9, "relu"), (24, 1, "none"))
    for nchw in (False, True)
    if not (nchw and kernel == "image")
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Case -> what inspect_launch found."""
    return dict(zip(CASES, compiled_once("se_scale", CASES, tmp_path_factory), strict=True))


def test_awkward_shapes_compile():
    assert len(compile_cases("se_scale", AWKWARD)) == len(AWKWARD)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills(case, compiled):
    found = compiled[case]
    assert (found["stack"], found["local"]) == (0, 0), found


MAPS = [case for case in CASES if case.kernel not in ("excite", "finish", "image")]
IMAGES = [case for case in CASES if case.kernel == "image"]


@pytest.mark.parametrize("case", MAPS, ids=str)
def test_accesses_of_maps_are_16_bytes_wide(case, compiled):
    """Each map's loads and stores; only sums, which are one store, may be narrower."""
    found = compiled[case]
    assert found["load_16"] > 0 and found["load_2"] == 0, found
    sums = 0 if case.kernel in ("scale", "shift") else 1
    assert found["store"] - found["store_16"] <= sums, found


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_accesses_of_images_are_16_bytes_wide(case, compiled):
    """Two accesses a thread for each of x, x again, residual and out; the sums are vectors."""
    found = compiled[case]
    assert found["load_16"] >= 2 * (2 + case.residual) and found["store_16"] >= 2, found
    assert found["store"] - found["store_16"] <= 2, found


@pytest.mark.parametrize("case", MAPS, ids=str)
def test_four_programs_fit_an_sm(case, compiled):
    """So that enough loads are under way to keep the memory busy."""
    found = compiled[case]
    assert 4 * 32 * found["meta"].get("num_warps", 4) * found["registers"] <= REGISTERS, found
