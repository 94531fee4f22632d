"""Fences between asynchronous copies and the tensor cores, where Triton leaves them out."""

import pytest

pytest.importorskip("triton")

from triton import knobs  # noqa: E402

from benchmarks.machine_code import unfenced  # noqa: E402
from cvkernels.ops.common import triton_fence  # noqa: E402

LOOP = """
.visible .entry some_kernel(
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	cp.async.commit_group;
$L__BB0_2:
	// begin inline asm
	cp.async.wait_group 	2;
	// end inline asm
	bar.sync 	0;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r3}, %rd2, %rd3, %p1, 1, 1;
	@%p2 bra 	$L__BB0_2;
	cp.async.wait_group 	0;
	bar.sync 	0;
"""


@pytest.fixture
def old(monkeypatch):
    """A Triton without the fences, and no hook yet."""
    monkeypatch.setattr(triton_fence.triton, "__version__", "3.6.0")
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", None)
    monkeypatch.setattr(triton_fence, "kernels", {"some_kernel"})


def compiled(ptx):
    """The code that the compiler's stages make of this PTX."""
    stages = {"ptx": lambda source, metadata: source}
    knobs.runtime.add_stages_inspection_hook(None, stages, None, None, 90)
    return stages["ptx"](ptx, {})


def test_each_wait_gets_a_fence_before_the_barrier():
    assert unfenced(LOOP) == 1
    code = triton_fence.fenced(LOOP)
    assert unfenced(code) == 0
    lines = [line.strip() for line in code.splitlines()]
    first = lines.index(triton_fence.FENCE)
    assert lines[first - 1].startswith("cp.async.wait_group") and lines.count(lines[first]) == 2
    others = [line for line in code.splitlines() if triton_fence.FENCE not in line]
    assert others == LOOP.splitlines()


def test_code_without_such_products_stays():
    code = LOOP.replace("wgmma.mma_async", "mma.sync")
    assert triton_fence.fenced(code) == code


def test_kernels_of_the_library_are_compiled_with_fences(old):
    triton_fence.install()
    assert unfenced(compiled(LOOP)) == 0
    others = LOOP.replace("some_kernel", "another_kernel")
    assert compiled(others) == others


def test_newer_versions_need_none(old, monkeypatch):
    monkeypatch.setattr(triton_fence.triton, "__version__", "3.8.0")
    triton_fence.install()
    assert knobs.runtime.add_stages_inspection_hook is None


def test_another_hook_is_called_too(old, monkeypatch):
    calls = []
    monkeypatch.setattr(
        knobs.runtime, "add_stages_inspection_hook", lambda *given: calls.append(given)
    )
    triton_fence.install()
    triton_fence.install()
    assert unfenced(compiled(LOOP)) == 0
    assert len(calls) == 1 and len(calls[0]) == 5
    assert knobs.runtime.add_stages_inspection_hook() and calls[1] == ()
