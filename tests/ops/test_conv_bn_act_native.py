"""conv_bn_act by the compiled convolution on the CPU, direct and by Winograd's filtering."""

import pytest
import torch

import cvkernels
from cvkernels.functional import BatchNormParams, DerivedWeights, conv_bn_act
from cvkernels.ops.conv_bn_act import native
from cvkernels.ops.conv_bn_act.problem import problem_of
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from tests.support.cases.conv_bn_act import ODD, Conv, make_bn, make_inputs
from tests.support.numerics import assert_matches

pytestmark = pytest.mark.skipif(
    not cvkernels.extension.has("cpu"), reason="the compiled extension is missing"
)
WINOGRAD = {
    "whole-tiles": Conv(32, 8, 8, 32, 3, 3, 1, 1),
    "nothing-divides": Conv(19, 7, 9, 21, 3, 3, 1, 1),
    "no-padding": Conv(16, 9, 6, 40, 3, 3),
    "wide-padding": Conv(24, 5, 5, 16, 3, 3, 1, 2),
    "one-row": Conv(16, 1, 13, 8, 3, 3, 1, 1, N=3),
    "many-tiles": Conv(16, 40, 38, 24, 3, 3, 1, 1),
}


def problem(conv, act="relu", **tensors):
    args, kwargs = make_inputs(conv)
    geometry = tuple(kwargs.values())
    options = dict.fromkeys(("residual", "input_bn", "input_gate", "out")) | tensors
    return problem_of(*args, *geometry, act, *options.values(), None)


@pytest.mark.parametrize("tile", [0, 2, 4])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("conv", WINOGRAD.values(), ids=WINOGRAD.keys())
def test_every_algorithm_matches_the_reference(conv, act, tile):
    args, kwargs = make_inputs(conv, memory_format=torch.channels_last)
    residual = torch.randn_like(conv_bn_act_reference(*args, **kwargs))
    kwargs = {**kwargs, "act": act, "residual": residual}

    def run(x, weight, bias, bn, residual, **_):
        call = native.prepared(problem(conv, act, residual=residual), weight, bias, bn, tile=tile)
        return call(x, residual)

    assert_matches(run, conv_bn_act_reference, args, kwargs)


@pytest.mark.parametrize(
    ("conv", "tile"),
    [
        (Conv(64, 56, 56, 64, 3, 3, 1, 1), 4),
        (Conv(128, 28, 28, 32, 3, 3, 1, 1), 2),
        (Conv(64, 56, 56, 64, 3, 3, 2, 1), 0),
        (Conv(64, 56, 56, 64, 3, 3, 1, 2, dilation=2), 0),
        (Conv(64, 56, 56, 64), 0),
        (Conv(8, 56, 56, 64, 3, 3, 1, 1), 0),
        (Conv(512, 2, 2, 512, 3, 3, 1, 1, N=1), 0),
    ],
)
def test_tiles_are_chosen_where_they_save_time(conv, tile):
    assert native.tile_of(problem(conv)) == tile


VIEWS = {
    "channel-slice": lambda x: x[:, 3:20],
    "window": lambda x: x[:, :, 1:5, 2:6],
    "transposed": lambda x: x.transpose(2, 3),
    "one-pixel": lambda x: x[:, :, :1, :1],
    "one-image": lambda x: x[:1],
    "every-other": lambda x: x[:, :, ::2],
}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_any_view_is_read_and_added(view, layout, kernel):
    x = view(torch.randn(2, 24, 7, 8).contiguous(memory_format=layout))
    C = x.shape[1]
    weight = torch.randn(C, C, kernel, kernel) / C**0.5
    options = {"padding": kernel // 2, "residual": x, "act": "none"}
    assert_matches(conv_bn_act, conv_bn_act_reference, (x, weight), options)


def test_slices_of_one_buffer_are_read_and_written():
    buffer = torch.randn(2, 64, 6, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(20, 24, 3, 3) / 10
    expected = buffer.clone()
    expected[:, 30:50] = conv_bn_act(
        buffer[:, 3:27].clone(), weight, padding=1, residual=buffer[:, 30:50].clone()
    )
    out = buffer[:, 30:50]
    conv_bn_act(buffer[:, 3:27], weight, padding=1, residual=out, out=out)
    assert torch.equal(buffer, expected)


def test_a_window_of_a_buffer_is_written():
    args, kwargs = make_inputs(ODD["channels-not-8"], memory_format=torch.channels_last)
    buffer = torch.zeros(2, 11, 12, 9).contiguous(memory_format=torch.channels_last)
    expected = conv_bn_act(*args, **kwargs)
    conv_bn_act(*args, **kwargs, out=buffer[:, :, 2:11, 1:8])
    assert torch.equal(buffer[:, :, 2:11, 1:8], expected)
    assert buffer.count_nonzero() == expected.count_nonzero()


@pytest.mark.parametrize("conv", [ODD["pointwise-odd"], ODD["channels-not-8"]], ids=["1x1", "3x3"])
@pytest.mark.parametrize("prologue", ["bn", "gate", "bn+gate"])
def test_the_prologue_is_computed_as_the_operand_is_gathered(conv, prologue, memory_format):
    args, kwargs = make_inputs(conv, memory_format=memory_format)
    if "bn" in prologue:
        kwargs["input_bn"] = make_bn(conv.C)._replace(bias=torch.full((conv.C,), 2.0))
    if "gate" in prologue:
        kwargs["input_gate"] = torch.rand(conv.N, conv.C)
    for cache in (None, DerivedWeights()):
        assert_matches(
            lambda *a, cache=cache, **k: conv_bn_act(*a, **k, cache=cache, backend="native"),
            conv_bn_act_reference,
            args,
            kwargs,
        )


@pytest.mark.parametrize("tile", [0, 2, 4])
def test_bits_do_not_depend_on_threads(tile):
    conv = Conv(48, 15, 17, 80, 3, 3, 1, 1)
    (x, *parameters), _ = make_inputs(conv, memory_format=torch.channels_last)
    run = native.prepared(problem(conv), *parameters, tile=tile)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu"])
def test_nan_stays(act):
    x = torch.randn(1, 24, 6, 6).contiguous(memory_format=torch.channels_last)
    x[0, 5, 2, 3] = torch.nan
    y = conv_bn_act(x, torch.randn(12, 24, 1, 1), act=act)
    assert y[0, :, 2, 3].isnan().all() and y.isnan().sum() == 12
    y = conv_bn_act(x, torch.randn(12, 24, 3, 3), padding=1, act=act)
    assert y[0, :, 1:4, 2:5].isnan().all() and not y[0, :, 5].isnan().any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": torch.zeros(3)}, "shift must hold 16 float32 numbers, got shape \\[3\\]"),
        ({"weight": torch.zeros(16)}, "weight must hold 384 float32 numbers"),
        ({"x": torch.zeros(2, 24, 5, 5, dtype=torch.double)}, "x must be float32, got Double"),
        ({"out": torch.zeros(2, 12, 4, 5)}, "out must have shape \\[2, 12, 5, 5\\]"),
        ({"out": torch.zeros(2, 12, 5, 5)}, "out must be channels_last or a channel slice"),
        ({"residual": torch.zeros(2, 12, 5, 5)}, "residual must be channels_last"),
        ({"x": torch.zeros(2, 0, 5, 5)}, "x must have channels"),
        ({"tile": 3}, "tile must be 0, 2 or 4, got 3"),
        ({"tile": 4}, "need a 3x3 kernel of stride 1"),
        ({"act": 4}, "act must be between 0 and 3, got 4"),
        ({"kernel_h": 9}, "no window fits x of shape \\[2, 24, 5, 5\\]"),
    ],
)
def test_the_native_op_refuses_with_the_numbers(changes, message):
    arguments = {
        "x": torch.zeros(2, 24, 5, 5),
        "weight": torch.zeros(384),
        "shift": torch.zeros(16),
        "out": torch.zeros(2, 12, 5, 5).contiguous(memory_format=torch.channels_last),
        **dict.fromkeys(("residual", "input_affine", "input_gate")),
        **dict.fromkeys(("kernel_h", "kernel_w", "stride_h", "stride_w"), 1),
        **dict.fromkeys(("padding_h", "padding_w"), 0),
        **dict.fromkeys(("dilation_h", "dilation_w"), 1),
        "act": 0,
        "tile": 0,
    }
    with pytest.raises(RuntimeError, match=f"conv_bn_act: .*{message}"):
        torch.ops.cvkernels.conv_bn_act_native(**{**arguments, **changes})


def test_opcheck():
    out = torch.zeros(2, 12, 5, 5).contiguous(memory_format=torch.channels_last)
    arguments = (torch.randn(2, 24, 5, 5), torch.randn(384), torch.zeros(16), out, None, None, None)
    geometry = (1, 1, 1, 1, 0, 0, 1, 1)
    torch.library.opcheck(torch.ops.cvkernels.conv_bn_act_native, (*arguments, *geometry, 1, 0))


def test_explain_counts_one_pass_and_the_layout_of_an_image():
    class Call(torch.nn.Module):
        def forward(self, x):
            return conv_bn_act(x, weight, None, bn)

    weight, bn = torch.randn(12, 3, 1, 1), BatchNormParams(torch.ones(12), torch.zeros(12))
    x = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    (row,) = cvkernels.explain(Call(), x).rows
    assert (row.backend, row.kernels, row.bytes_written) == ("native", 1, 4 * 2 * 12 * 25)
    (row,) = cvkernels.explain(Call(), x.contiguous()).rows
    assert row.kernels == 2 and row.bytes_written == 4 * 2 * (12 + 3) * 25
