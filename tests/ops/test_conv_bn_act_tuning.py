"""Which backend and tile conv_bn_act chooses: the heuristic, and tables that overrule it."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from cvkernels.ops.conv_bn_act import tiles, tuning
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.ops.conv_bn_act.tiles import Config

H100, A100, B200 = (9, 0), (8, 0), (10, 0)
# shared memory that one program may have
SHARED_LIMIT = {A100: 163 * 1024, H100: 227 * 1024, B200: 227 * 1024}


def problem(channels=64, out=64, taps=3, size=56, batch=128, groups=1, **options):
    defaults = {"dtype": torch.bfloat16, "act": "relu", "stride": (1, 1), "has_bn": True}
    geometry = {"padding": (taps // 2,) * 2, "dilation": (1, 1), "groups": groups}
    return Problem(batch, channels, size, size, out, taps, taps, **(defaults | geometry | options))


@pytest.mark.parametrize(
    ("kernel", "args"),
    [
        ("1x1", {"taps": 1}),
        ("1x1", {"taps": 1, "channels": 3}),
        ("spatial", {}),
        ("spatial", {"taps": 1, "padding": (1, 1)}),
        ("spatial", {"taps": 1, "groups": 4}),
        ("spatial", {"groups": 64}),
        ("filter_row", {"channels": 3, "taps": 7}),
    ],
)
def test_kernel_by_geometry(kernel, args):
    assert tiles.kernel(problem(**args)) == kernel


def test_cudnn_gets_what_its_fused_op_does_well():
    assert tuning.heuristic(problem(), H100).backend == "cudnn"
    assert tuning.heuristic(problem(has_residual=True), H100).backend == "cudnn"


FEW = {"channels": 128, "out": 32, "size": 14, "act": "none"}


@pytest.mark.parametrize(
    "args", [{}, {"has_out": True}, {"act": "silu"}, {"channels": 24, "out": 64}], ids=str
)
def test_the_halo_kernel_gets_few_output_channels(args):
    assert tuning.heuristic(problem(**FEW | args), H100).backend == "halo"


@pytest.mark.parametrize(
    "args",
    [
        {"out": 64},
        {"channels": 132},
        {"out": 28},
        {"stride": (2, 2)},
        {"padding": (0, 0)},
        {"dilation": (2, 2)},
        {"groups": 2},
        {"taps": 5},
        {"dtype": torch.float32},
        {"has_residual": True},
        {"has_input_bn": True},
        {"has_input_gate": True},
        {"has_output_gate": True},
    ],
    ids=str,
)
def test_the_halo_kernel_gets_nothing_else(args):
    assert tuning.heuristic(problem(**FEW | args), H100).backend != "halo"


@pytest.mark.parametrize(
    "args",
    [
        {"taps": 1},
        {"channels": 48},
        {"channels": 3, "taps": 7, "size": 224},
        {"groups": 2},
        {"dtype": torch.float32},
        {"act": "silu"},
        {"has_input_bn": True},
        {"has_output_gate": True},
        {"has_out": True},
    ],
    ids=str,
)
def test_triton_gets_the_rest(args):
    assert tuning.heuristic(problem(**args), H100).backend == "triton"


@pytest.mark.parametrize("capability", SHARED_LIMIT, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
def test_every_answer_is_a_shipped_config_that_fits(dtype, capability, prologue):
    for batch in (1, 2, 32, 256):
        for channels in (3, 17, 24, 32, 64, 200, 1024):
            for out in (16, 40, 96, 144, 1024):
                for taps, size in ((1, 7), (1, 56), (3, 14), (3, 112), (7, 224)):
                    p = problem(
                        channels, out, taps, size, batch, dtype=dtype, has_input_bn=prologue
                    )
                    config = tuning.heuristic(p, capability)
                    tile = replace(config, backend="triton", split_k=1)
                    assert tile in tiles.CONFIGS[tiles.kernel(p), dtype.itemsize]
    for config in tiles.CONFIGS["1x1", dtype.itemsize]:
        stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
        assert stage * config.num_stages <= SHARED_LIMIT[capability]


def test_small_problems_get_small_tiles():
    large = tuning.heuristic(problem(256, 256, 1, 56), H100)
    small = tuning.heuristic(problem(512, 512, 1, 7, batch=1), H100)
    assert large.block_m * large.block_n >= 128 * 128 and large.split_k == 1
    assert small.block_m * small.block_n <= 128 * 32 and small.split_k > 1


@pytest.mark.parametrize(
    ("channels", "out", "groups", "block_n", "span"),
    [
        (64, 64, 1, 32, 64),
        (128, 128, 32, 32, 32),
        (256, 512, 2, 64, 128),
        (24, 24, 24, 32, 24),
        (15, 21, 3, 16, 15),
    ],
)
def test_group_span(channels, out, groups, block_n, span):
    p = problem(channels, out, groups=groups)
    assert tiles.group_span(p, block_n) == span
    reached = set()
    for start in range(0, out, block_n):
        of_group = {k // (out // groups) for k in range(start, min(start + block_n, out))}
        reached.add(len(of_group) * channels // groups)
    assert max(reached) <= span


def test_key_says_what_the_speed_depends_on():
    p = problem(has_residual=True, has_input_gate=True, batch=100)
    assert tuning.key(p) == (
        "bf16 C64 K64 R3 S3 stride1x1 pad1x1 dil1x1 groups1 H56 W56 N128 relu residual input_gate"
    )
    assert tuning.key(replace(p, N=128, has_bias=True)) == tuning.key(p)
    assert tuning.key(replace(p, N=129)) != tuning.key(p)
    assert tuning.key(replace(p, has_output_gate=True)) == tuning.key(p) + " output_gate"
    entry = {tuning.key(replace(p, has_output_gate=True)): {"backend": "cudnn"}}
    tuning._parse(json.dumps(table({"entries": entry})), "here")


TILE = Config("triton", 64, 64, 32, 4, 3)


def table(entries, **fields):
    head = {"device": "Test GPU", "capability": [9, 0], "op": "conv_bn_act"}
    return head | {"torch": "2.11.0", "triton": "3.6.0", "commit": "0" * 7} | fields | entries


@pytest.fixture
def load(tmp_path):
    def write_and_load(content):
        path = tmp_path / "table.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tuning.load_table(path)

    tuning._entries.cache_clear()
    tuning.choose.cache_clear()
    yield write_and_load
    tuning._entries.cache_clear()
    tuning.choose.cache_clear()


def test_loaded_table_overrules_the_heuristic_on_its_device(load):
    mine, other = problem(taps=1), problem()
    before = tuning.choose(mine, "Test GPU", H100)
    assert before == tuning.heuristic(mine, H100) != TILE
    entries = {tuning.key(mine): asdict(TILE), tuning.key(other): {"backend": "cudnn"}}
    entries[tuning.key(problem(size=7))] = {"backend": "halo"}
    assert load(table({"entries": entries})) == 3
    assert tuning.choose(mine, "Test GPU", H100) == TILE
    assert tuning.lookup(mine, "Test GPU", H100) == TILE
    assert tuning.choose(mine, "Other GPU", H100) == before
    cudnn = tuning.choose(other, "Test GPU", H100)
    assert cudnn.backend == "cudnn" and cudnn.block_m == 128
    assert tuning.choose(problem(size=7), "Test GPU", H100).backend == "halo"
    assert tuning.lookup(problem(channels=128), "Test GPU", H100) is None


def test_later_table_wins(load):
    name = tuning.key(problem())
    load(table({"entries": {name: asdict(TILE)}}))
    load(table({"entries": {name: {"backend": "cudnn"}}}))
    assert tuning.choose(problem(), "Test GPU", H100).backend == "cudnn"


KEY = tuning.key(problem())
BAD_TABLES = {
    "not-json": ("{", "not JSON"),
    "not-an-object": ("[]", "needs the fields"),
    "unknown-field": (table({"entries": {}}, extra=1), "needs the fields"),
    "other-op": (table({"entries": {}}, op="se_scale"), "op must be 'conv_bn_act', got 'se_scale'"),
    "no-device": (table({"entries": {}}, device=""), "device must be a name"),
    "capability": (table({"entries": {}}, capability="9.0"), "capability must be"),
    "entries": (table({"entries": []}), "entries must map keys"),
    "bad-key": (table({"entries": {"3x3": asdict(TILE)}}), "'3x3' is not a key"),
    "missing-value": (table({"entries": {KEY: {"backend": "triton"}}}), "needs the fields"),
    "unknown-value": (table({"entries": {KEY: asdict(TILE) | {"split": 2}}}), "needs the fields"),
    "backend": (table({"entries": {KEY: asdict(TILE) | {"backend": "fast"}}}), "backend must be"),
    "block": (table({"entries": {KEY: asdict(TILE) | {"block_m": 48}}}), "block_m must be a power"),
    "type": (
        table({"entries": {KEY: asdict(TILE) | {"num_warps": "8"}}}),
        "num_warps must be a posit",
    ),
    "warps": (table({"entries": {KEY: asdict(TILE) | {"num_warps": 3}}}), "num_warps must be"),
    "stages": (table({"entries": {KEY: asdict(TILE) | {"num_stages": 99}}}), "num_stages must be"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_table_is_refused_whole(content, message, load):
    with pytest.raises(ValueError, match=message):
        load(content)
    assert tuning.lookup(problem(), "Test GPU", H100) is None


def test_shipped_tables_are_valid():
    for file in tuning._SHIPPED.glob("*.json"):
        tuning._parse(file.read_text(), file.name)
