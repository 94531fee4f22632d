"""Every Triton launch of the five frozen networks, by the machine code that ships.

One process compiles those of one kind, bfloat16 at batch 128 for sm_90, anew; the committed table,
which ``python -m benchmarks launches`` writes, has all of them.
"""

import itertools
import json

import pytest

pytest.importorskip("triton")

from benchmarks import launches  # noqa: E402
from cvkernels.ops.common.work import H200, bytes_needed  # noqa: E402
from tests.support.made_once import made_once, shared_folder  # noqa: E402

TABLE = launches.read()
# Of Triton, architectures and dtypes in the committed table.
COMMITTED = set(itertools.product(("3.6.0", "3.8.0"), (80, 90, 100), ("bfloat16", "float16")))
# They read or write vectors and matrices, not maps alone.
VECTORS = (
    "squeeze_nhwc_kernel",
    "squeeze_finish_kernel",
    "excite_kernel",
    "excite_hidden_kernel",
    "excite_out_kernel",
)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The rows of one kind, compiled now, once in a test run."""

    def make(path):
        rows = launches.rows(batches=(128,), dtypes=("bfloat16",), archs=(90,))
        path.write_text(json.dumps(rows))

    path = made_once(shared_folder(tmp_path_factory) / "launches.json", make)
    return json.loads(path.read_text())


def spilling(rows):
    """But for DenseNet's prologue in wide tiles, where Triton 3.6 compiles for Blackwell."""

    def known(row):
        wide = row["tile"]["BLOCK_M"] == row["tile"]["BLOCK_N"] == 128
        return (
            (row["triton"], row["arch"]) == ("3.6.0", 100) and wide and "denselayer" in row["layer"]
        )

    return [row for row in rows if row["spills"] and not known(row)]


def without_tensor_cores(rows):
    return [row for row in rows if row["kernel"] in launches.DENSE and not row["matrix"]]


def crowded(rows):
    """Fewer programs fit an SM than the time model counts on; it knows sm_90 and sm_100."""
    return [
        row
        for row in rows
        if row["arch"] >= 90
        if min(row["fit_registers"], row["fit_shared"]) < row["assumed"]
    ]


def narrowest(row):
    """Bytes of the narrowest access to a map: those of 4 are to vectors in float32, and one load of
    2 is of a bias in 16 bits, an element a thread."""
    widths = [
        int(access.split()[1])
        for access, count in row["accesses"].items()
        if not access.endswith(" 4") and (access, count) != ("LDG 2", 1)
    ]
    return min(widths)


def scalar(rows):
    """Narrower than 16 bytes; than 8 in the first convolution, whose small tiles have few."""
    return [
        row
        for row in rows
        if row["kernel"] not in VECTORS
        if narrowest(row) < (8 if row["kernel"] == "conv_bn_act_filter_row_kernel" else 16)
    ]


def starved(rows):
    """Bound by memory at batch 128, with fewer bytes in flight than its rate needs."""
    return [
        row
        for row in rows
        if row["bounds"] == ["memory"] and 1024 * row["kb_in_flight"] < bytes_needed(H200)
    ]


CHECKS = (spilling, without_tensor_cores, crowded, scalar)


@pytest.mark.full
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_machine_code(fresh, check):
    assert not check(fresh)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_committed_machine_code(check):
    assert not check(TABLE)


@pytest.mark.full
def test_launches_that_memory_bounds_have_enough_in_flight(fresh):
    assert not starved(fresh)
    assert [row for row in fresh if row["bounds"] == ["memory"]]


def test_the_committed_table_has_every_kind():
    """Of launches that ``python -m benchmarks launches`` was asked for."""
    kinds = {
        (row["triton"], row["arch"], dtype) for row in TABLE for dtype in row["dtype"].split(", ")
    }
    assert kinds >= COMMITTED


@pytest.mark.full
def test_the_committed_table_is_of_these_launches(fresh):
    """``python -m benchmarks launches`` makes it anew, with the Triton at hand."""
    known = {_kind(row) for row in TABLE if row["arch"] == 90}
    assert {_kind(row) for row in fresh} <= known


def _kind(row):
    return json.dumps([row[name] for name in ("kernel", "tile", "warps", "stages")])


@pytest.mark.full
@pytest.mark.parametrize("kernel", launches.DENSE)
def test_the_model_counts_the_instructions_of_the_machine_code(fresh, kernel):
    """Those that a warp runs, within a third."""
    rows = [row for row in fresh if row["kernel"] == kernel]
    off = [row for row in rows if not 0.74 < row["modelled"] / row["counted"] < 1.34]
    assert rows and not off
