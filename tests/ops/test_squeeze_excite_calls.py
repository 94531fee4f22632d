"""se_scale and its parts as ops: what explain reports, and bad input."""

import pytest
import torch

from cvkernels import record
from cvkernels.functional import excite, se_scale, squeeze, squeeze_excite
from tests.support.cases.squeeze_excite import Map, make_layers, make_map

CHANNELS_LAST = torch.channels_last


# What explain counts, in bytes, on x[128, 256, 56, 56] in bfloat16 with R = 16.
MAP, GATES, PARAMETERS = 2 * 128 * 256 * 56 * 56, 2 * 128 * 256, 2 * (2 * 256 * 16 + 256 + 16)
# The call; launches, bytes read and written.
EXPLAINED = {
    "squeeze": (lambda x, layers, gate: squeeze(x), 1, MAP, GATES),
    "excite": (lambda x, layers, gate: excite(gate, *layers), 1, GATES + PARAMETERS, GATES),
    "se_scale": (lambda x, layers, gate: se_scale(x, gate, x, "relu"), 1, 2 * MAP + GATES, MAP),
    "squeeze_excite": (
        lambda x, layers, gate: squeeze_excite(x, *layers, out=x),
        3, 2 * MAP + PARAMETERS + 4 * GATES, MAP + 4 * GATES,
    ),
    # A copy around the kernel, of every second column.
    "se_scale-copied": (
        lambda x, layers, gate: se_scale(x[:, :, :, ::2].transpose(2, 3), gate),
        2, MAP + GATES, MAP,
    ),
}  # fmt: skip


def explained(m, dtype, device, run):
    """The row of run(x, layers, gate)."""
    x, layers = make_map(m, dtype, CHANNELS_LAST, device), make_layers(m, dtype, device)
    with record.recording(record.Recorder()) as recorder:
        y = run(x, layers, torch.zeros(m.N, m.C, dtype=dtype, device=device))
    assert y.device.type == device
    (row,) = recorder.calls
    return row


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_counts_launches_and_bytes(name):
    run, *counted = EXPLAINED[name]
    row = explained(Map(128, 256, 16, 56, 56), torch.bfloat16, "meta", run)
    assert (row.op, row.backend) == (name.partition("-")[0], "triton")
    assert [row.kernels, row.bytes_read, row.bytes_written] == counted


def test_few_large_maps_are_squeezed_in_parts_that_a_launch_adds():
    one = Map(1, 256, 16, 56, 56)
    assert explained(one, torch.bfloat16, "meta", EXPLAINED["squeeze"][0]).kernels == 2


def test_native_reads_the_map_once(native):
    m = Map(2, 16, 4, 5, 6)
    row = explained(m, torch.float32, "cpu", lambda x, layers, gate: squeeze_excite(x, *layers))
    assert (row.backend, row.kernels) == ("native", 1)
    assert row.bytes_read == 4 * (2 * 16 * 5 * 6 + 2 * 16 * 4 + 16 + 4)
    assert row.bytes_written == 4 * 2 * 16 * 5 * 6


def test_large_layers_take_two_launches():
    """The first leaves the hidden layer in float32, in as many splits as fill 132 SMs."""
    N, C, R, hidden = 128, 2048, 128, 4 * 4 * 128 * 128
    row = explained(
        Map(N, C, R, 7, 7), torch.bfloat16, "meta", lambda x, layers, gate: excite(gate, *layers)
    )
    parameters = 2 * (2 * C * R + C + R)
    counted = [2, 2 * N * C + parameters + hidden, 2 * N * C + hidden]
    assert [row.kernels, row.bytes_read, row.bytes_written] == counted


# Bad input

X, GATE = torch.ones(2, 8, 4, 4), torch.ones(2, 8)
LAYERS = {
    "weight1": torch.ones(3, 8, 1, 1), "bias1": torch.ones(3),
    "weight2": torch.ones(8, 3, 1, 1), "bias2": torch.ones(8),
}  # fmt: skip
GOOD = {
    squeeze: {"x": X},
    excite: {"pooled": GATE, **LAYERS},
    se_scale: {"x": X, "gate": GATE},
    squeeze_excite: {"x": X, **LAYERS},
}
HALVES = {name: layer.half() for name, layer in LAYERS.items()}
NO_HIDDEN = {"weight1": torch.ones(0, 8), "bias1": torch.ones(0), "weight2": torch.ones(8, 0)}
# The error, and the change of good arguments that it names.
INVALID = [
    (squeeze, ValueError, r"x must have shape \[N, C, H, W\], got \[8, 4, 4\]", {"x": X[0]}),
    (squeeze, TypeError, "x must be float32.*got torch.int64", {"x": X.long()}),
    (squeeze, ValueError, "x must have channels and pixels, got .*no pixel", {"x": X[:, :, :0]}),
    (se_scale, ValueError, "x must have channels and pixels",
     {"x": X[:, :0], "gate": GATE[:, :0]}),
    (squeeze_excite, ValueError, "x must have channels and pixels", {"x": X[:, :, :, :0]}),
    (se_scale, ValueError, r"gate must have shape \[N, C\] = \[2, 8\].*flatten",
     {"gate": GATE[:, :, None, None]}),
    (se_scale, TypeError, "gate must have x's dtype, torch.float32, or float32, got torch.float16",
     {"gate": GATE.half()}),
    (se_scale, TypeError, "gate must have x's dtype, torch.float64", {"x": X.double()}),
    (se_scale, ValueError, "gate must be on x's device, cpu, got meta",
     {"gate": GATE.to("meta")}),
    (se_scale, ValueError, "residual must have x's shape", {"residual": X[:1]}),
    (squeeze_excite, TypeError, "residual must have x's dtype", {"residual": X.half()}),
    (se_scale, ValueError, "residual must be on x's device", {"residual": X.to("meta")}),
    (se_scale, ValueError, r"act must be one of \['none', 'relu', 'silu'\], got 'gelu'",
     {"act": "gelu"}),
    (excite, ValueError, r"act must be one of \['relu', 'silu'\], got 'none'", {"act": "none"}),
    (squeeze_excite, ValueError, "out_act must be one of", {"out_act": "relu6"}),
    (excite, ValueError, "weight1 must be a matrix or the weight of a 1x1",
     {"weight1": torch.ones(3, 8, 3, 3)}),
    (excite, ValueError, r"weight1 must have shape \[R, C\] = \[3, 8\]",
     {"weight1": torch.ones(3, 7)}),
    (squeeze_excite, ValueError, r"weight2 must have shape \[C, R\] = \[8, 3\]",
     {"weight2": torch.ones(3, 8)}),
    (excite, ValueError, r"bias1 must have shape \[R\]", {"bias1": torch.ones(8)}),
    (excite, ValueError, r"bias2 must have shape \[K\]", {"bias2": torch.ones(3)}),
    (excite, ValueError, "weight1 must have shape .* with R > 0", NO_HIDDEN),
    (excite, TypeError, "bias2 must have weight1's dtype", {"bias2": torch.ones(8).half()}),
    (squeeze_excite, TypeError, "weights and biases must be torch.float32, got", HALVES),
    (excite, ValueError, "weight2 must be on pooled's device",
     {"weight2": LAYERS["weight2"].to("meta")}),
    (excite, ValueError, "pooled must have shape .*flatten", {"pooled": GATE[:, :, None, None]}),
    (excite, TypeError, "pooled must be float32", {"pooled": GATE.int()}),
    (excite, ValueError, "count must be a positive number of pixels, got 0", {"count": 0}),
    (excite, TypeError, "with count=, pooled holds sums and must be float32",
     {"pooled": GATE.half(), "count": 16}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "error", "message", "change"),
    [pytest.param(*case, id=f"{case[0].__name__}-{'-'.join(case[3])}") for case in INVALID],
)
def test_invalid_arguments(op, error, message, change):
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(**GOOD[op] | change)
