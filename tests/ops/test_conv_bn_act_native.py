"""conv_bn_act by the compiled convolution on the CPU, direct and by Winograd's filtering."""

import pytest
import torch

import cvkernels
from cvkernels.functional import BatchNormParams, conv_bn_act
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.conv_bn_act import native
from cvkernels.ops.conv_bn_act.problem import Parameters, problem_of
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from tests.support.cases.conv_bn_act import ODD, Conv, make_inputs
from tests.support.cases.views import STRIDED
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


ONCE = Call(torch.empty(0), "cpu", "native", once=True)


def problem(conv, act="relu", **tensors):
    args, kwargs = make_inputs(conv)
    geometry = tuple(kwargs.values())
    return problem_of(*args, *geometry, act, **tensors)


@pytest.mark.parametrize("tile", [0, 2, 4])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gates"])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("conv", WINOGRAD.values(), ids=WINOGRAD.keys())
def test_every_algorithm_matches_the_reference(conv, act, gated, tile):
    args, kwargs = make_inputs(conv, memory_format=torch.channels_last)
    residual = torch.randn_like(conv_bn_act_reference(*args, **kwargs))
    kwargs = {**kwargs, "act": act, "residual": residual}
    kwargs["output_gate"] = torch.rand(conv.N, conv.K) if gated else None

    def run(x, weight, bias, bn, residual, output_gate, **_):
        p = problem(conv, act, residual=residual, output_gate=output_gate)
        parameters = Parameters(weight, bias, bn)
        return native.plan(p, ONCE, parameters, (), None, tile)(
            x, residual, output_gate=output_gate
        )

    assert_matches(run, conv_bn_act_reference, args, kwargs)


@pytest.mark.parametrize(
    ("conv", "algorithm"),
    [
        (Conv(64, 56, 56, 64, 3, 3, 1, 1), 4),
        (Conv(128, 28, 28, 32, 3, 3, 1, 1), 4),
        (Conv(64, 10, 10, 64, 3, 3, 1, 1), 2),
        (Conv(64, 56, 56, 64, 3, 3, 2, 1), 0),
        (Conv(64, 56, 56, 64, 3, 3, 1, 2, dilation=2), 0),
        (Conv(64, 56, 56, 64), 0),
        (Conv(8, 56, 56, 64, 3, 3, 1, 1), 0),
        (Conv(512, 2, 2, 512, 3, 3, 1, 1, N=1), 0),
    ],
)
def test_tiles_are_chosen_where_they_save_time(conv, algorithm):
    assert native.algorithm_of(problem(conv)) == algorithm


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_view_is_read_and_added(view, memory_format, kernel):
    x = view(torch.randn(2, 48, 11, 12).contiguous(memory_format=memory_format))
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


@pytest.mark.parametrize("tile", [0, 2, 4])
def test_bits_do_not_depend_on_threads(tile):
    conv = Conv(48, 15, 17, 80, 3, 3, 1, 1)
    (x, *parameters), _ = make_inputs(conv, memory_format=torch.channels_last)
    run = native.plan(problem(conv), ONCE, Parameters(*parameters), (), None, tile)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


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
