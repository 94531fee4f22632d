"""The CUDA ops held to the ops' own tests, compiled for the CPU: see cuda_on_host."""

import contextlib
import re
from unittest import mock

import pytest
import torch

from cvkernels import backend, extension
from cvkernels.functional import avg_pool, dense_concat, max_pool
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.common import native as native_ops
from cvkernels.ops.depthwise_conv_bn_act import cuda as depthwise
from tests.ops import (
    test_avg_pool,
    test_batch_norm_act,
    test_dense_concat,
    test_depthwise_conv_bn_act,
    test_max_pool,
    test_pools,
)
from tests.support import cuda_on_host
from tests.support.cases import depthwise_conv_bn_act as depthwise_cases
from tests.support.cuda_on_host import HostLibrary
from tests.support.made_once import shared_folder
from tests.training import test_convolutions
from tests.training import test_dense_block as test_dense_training

pytestmark = [
    pytest.mark.skipif(bool(cuda_on_host.missing()), reason=cuda_on_host.missing()),
    pytest.mark.skipif(not extension.has("cpu"), reason="the overridden ops are not there"),
]


@pytest.fixture
def host_library(tmp_path_factory):
    """By the name of a .cu file, the library of its ops."""
    folder = shared_folder(tmp_path_factory)

    def library(name: str) -> HostLibrary:
        (source,) = (path for path in cuda_on_host.SOURCES if path.parent.name == name)
        return cuda_on_host.library_of(source, folder)

    return library


@pytest.fixture
def on_host(request, host_library, capfd):
    """The ops of the class's .cu file take the place of the CPU's; no undefined behaviour."""
    with host_library(request.cls.source).in_place_of_the_cpu_ops():
        yield
    assert "runtime error" not in capfd.readouterr().err


@pytest.fixture
def device():
    return torch.device("cpu")


@pytest.fixture
def implementation():
    return "native"


@pytest.fixture
def native():
    pass


def held_to(source, *tests, pool=None):
    """A class of the ops' own tests, run with the ops of a .cu file; ``pool`` is their fixture."""
    members = {test.__name__: staticmethod(test) for test in tests}
    members |= {"source": source, "pool": pytest.fixture(lambda self: pool)}
    return pytest.mark.usefixtures("on_host")(type(f"TestOf_{source}", (), members))


TestMaxPool = held_to(
    "max_pool",
    test_max_pool.test_equals_max_pool2d,
    test_max_pool.test_every_bit_pattern_of_infinities_and_nan,
    test_max_pool.test_every_16_bit_number,
    test_max_pool.test_any_strides,
    test_pools.test_out_is_a_channel_slice,
    test_pools.test_out_beside_x_in_one_buffer,
    pool=max_pool,
)
TestAvgPool = held_to(
    "avg_pool",
    test_avg_pool.test_matches_avg_pool2d,
    test_avg_pool.test_nan_and_infinity_stay_where_their_windows_are,
    test_avg_pool.test_any_strides,
    test_pools.test_out_is_a_channel_slice,
    test_pools.test_out_beside_x_in_one_buffer,
    pool=avg_pool,
)
TestDenseConcat = held_to(
    "dense_concat",
    test_dense_concat.test_moves_bits,
    test_dense_concat.test_norm_and_relu_match_the_reference,
    test_dense_concat.test_parts_of_a_norm,
    test_dense_concat.test_nan_and_infinity_go_through,
    test_dense_concat.test_every_16_bit_number_widens_and_rounds_as_in_torch,
    test_dense_concat.test_any_strides_of_both,
    test_dense_concat.test_source_may_be_broadcast,
)
OfBatchNormAct = held_to(
    "batch_norm_act",
    test_batch_norm_act.test_a_residual_of_other_strides_and_gradients,
    test_batch_norm_act.test_vectors_may_be_absent_or_of_x_s_dtype,
    test_batch_norm_act.test_far_from_zero,
    test_batch_norm_act.test_several_norms_share_one_gradient,
    test_batch_norm_act.test_passes_match_their_references,
)


class TestBatchNormAct(OfBatchNormAct):
    # CPU eager, which they are held to, sums in double: of one channel that is most of it.
    @pytest.mark.parametrize(("act", "adds"), test_batch_norm_act.ENDS)
    @pytest.mark.parametrize("dtype", test_batch_norm_act.DTYPES, ids=str)
    @pytest.mark.parametrize(
        "shape", [s for n, s in test_batch_norm_act.SHAPES.items() if "one-channel" not in n]
    )
    def test_calls(self, shape, dtype, act, adds):
        test_batch_norm_act.check_shape(shape, dtype, act, adds)

    @pytest.mark.parametrize("absent", [(), ("weight",), ("bias",), ("running",)], ids=str)
    @pytest.mark.parametrize("dtype", test_batch_norm_act.DTYPES, ids=str)
    def test_forward(self, absent, dtype, device):
        test_batch_norm_act.test_forward_leaves_vectors_and_running_statistics(
            absent, dtype, "own", device
        )


@pytest.fixture
def where():
    """As if the CPU were a GPU, for whose tensors depthwise_conv_bn_act has CUDA C++."""
    on_gpu = mock.patch.object(backend, "device_type", lambda x: "cuda")
    compiled = mock.patch.object(native_ops, "why_not", lambda *_: "")
    with on_gpu, compiled, backend.use("cuda"):
        yield torch.device("cpu")


# The cases of the op's own tests with channels in packs of 16 bytes, and what only this code has.
DEPTHWISE = {
    name: case
    for name, case in (depthwise_cases.CASES | depthwise_cases.LARGE).items()
    if case[1] % 8 == 0
} | {
    "wide-padding": (1, 16, 3, 4, 3, 1, (4, 3)),
    "wide-padding-5x5": (2, 40, 5, 4, 5, 1, (6, 4)),
    "wide-padding-s2": (1, 24, 4, 3, 5, 2, (5, 7)),
    "padding-of-one-axis": (2, 16, 9, 8, 5, 1, (0, 3)),
    "mobile-kernel": (2, 48, 15, 17, 3, 2, 0),
    "many-images": (19, 8, 7, 7, 5, 1, 2),
    "two-tiles": (1, 8, 4, 120, 3, 1, 1),
    "two-tiles-5x5": (1, 8, 6, 61, 5, 1, 2),
}
# Strips, images, bands of a block, and rows of a band, of two images of 29 x 20 outputs.
CUTS = [(3, 1, 1, 29), (3, 2, 1, 29), (3, 1, 1, 8), (1, 2, 1, 5), (2, 1, 2, 1), (1, 1, 4, 29)]
FILTERS = pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])


@pytest.mark.usefixtures("on_host")
class TestDepthwise:
    source = "depthwise_conv_bn_act"

    @pytest.mark.few(24)
    @pytest.mark.parametrize("dtype", test_depthwise_conv_bn_act.DTYPES, ids=str)
    @pytest.mark.parametrize("case", DEPTHWISE.values(), ids=DEPTHWISE.keys())
    def test_matches_reference(self, case, dtype, where):
        test_depthwise_conv_bn_act.check(*depthwise_cases.make_inputs(case, dtype))

    @pytest.mark.parametrize("act", test_depthwise_conv_bn_act.ACTS)
    @pytest.mark.parametrize("dtype", test_depthwise_conv_bn_act.DTYPES, ids=str)
    def test_every_activation(self, dtype, act, where):
        args, options = depthwise_cases.make_inputs(DEPTHWISE["channels-24"], dtype)
        test_depthwise_conv_bn_act.check(args, options | {"act": act})
        op, reference = (
            test_depthwise_conv_bn_act.depthwise_conv_bn_act,
            test_depthwise_conv_bn_act.depthwise_conv_bn_act_reference,
        )
        test_depthwise_conv_bn_act.assert_matches(op, reference, args, options | {"act": act})

    @FILTERS
    @pytest.mark.parametrize("dtype", test_depthwise_conv_bn_act.DTYPES, ids=str)
    @pytest.mark.parametrize("cut", CUTS, ids=str)
    def test_any_cut_gives_the_same(self, cut, dtype, kernel, stride, where):
        padding = kernel // 2
        case = (2, 40, 29 * stride, 20 * stride, kernel, stride, padding)
        args, options = depthwise_cases.make_inputs(case, dtype)
        with mock.patch.object(depthwise, "cut", lambda *_: depthwise.Cut(*cut)):
            test_depthwise_conv_bn_act.check(args, options)

    @pytest.mark.parametrize("act", test_depthwise_conv_bn_act.ACTS)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_nan_and_infinity(self, value, act, where):
        test_depthwise_conv_bn_act.test_nan_and_infinity_come_through_as_in_pytorch(
            value, act, where
        )

    @FILTERS
    @pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
    def test_padding_is_multiplied_as_zeros(self, value, kernel, stride, where):
        (x, weight, *_), options = depthwise_cases.make_inputs(
            (1, 16, 9, 10, kernel, stride, kernel // 2)
        )
        weight[3, 0, 0, 1] = weight[5, 0, -1, 0] = weight[9, 0, 1, -1] = value
        options["act"] = "none"
        results = test_depthwise_conv_bn_act.squeezed(x, weight, **options)
        padded = torch.nn.functional.pad(x, [kernel // 2] * 4)
        options["padding"] = 0
        expected = test_depthwise_conv_bn_act.expected_of(padded, weight, **options)
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan()) and theirs.isnan().any()
            assert torch.allclose(ours, theirs, atol=1e-3, equal_nan=True)

    @pytest.mark.parametrize("dtype", test_depthwise_conv_bn_act.DTYPES, ids=str)
    def test_silu_of_extreme_values(self, dtype, where):
        # What the GPU's tanh makes of numbers in the thousands is its own affair.
        largest = 120.0 if dtype == torch.bfloat16 else 3e4
        values = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-largest, largest, 0])])
        x = values.view(1, 1, 4, -1).expand(-1, 8, -1, -1).to(dtype)
        weight = torch.zeros(8, 1, 3, 3, dtype=dtype)
        weight[:, 0, 1, 1] = 1.0
        args = (x.contiguous(memory_format=torch.channels_last), weight)
        test_depthwise_conv_bn_act.check(args, {"padding": 1, "act": "silu"})

    def test_sums_do_not_overflow_a_half_dtype(self, where):
        x = torch.full((1, 8, 64, 64), 1000.0, dtype=torch.float16)
        weight = torch.zeros(8, 1, 3, 3, dtype=torch.float16)
        weight[:, :, 1, 1] = 1.0
        x = x.contiguous(memory_format=torch.channels_last)
        _, sums = test_depthwise_conv_bn_act.squeezed(x, weight, padding=1)
        assert torch.equal(sums, torch.full_like(sums, 1000.0 * 64 * 64))

    @pytest.mark.parametrize("start", [8, 3], ids=["aligned", "copied"])
    def test_channel_slices(self, start, where):
        (x, *others), options = depthwise_cases.make_inputs(DEPTHWISE["49-pixels"], torch.bfloat16)
        wide = channels_last(2, 48, 7, 7, dtype=torch.bfloat16)
        test_depthwise_conv_bn_act.check((wide[:, start : start + 24], *others), options)

    def test_vectors_of_any_floating_dtype(self, where):
        squeezed = test_depthwise_conv_bn_act.squeezed
        (x, weight, bias, bn), options = depthwise_cases.make_inputs(
            DEPTHWISE["49-pixels"], torch.bfloat16
        )
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            narrow = bn._replace(**{n: getattr(bn, n).to(dtype) for n in ("weight", "mean", "var")})
            wide = bn._replace(**{n: getattr(narrow, n).float() for n in ("weight", "mean", "var")})
            ours = squeezed(x, weight, bias.to(dtype), narrow, **options)
            same = squeezed(x, weight, bias.to(dtype).float(), wide, **options)
            assert all(map(torch.equal, ours, same))

    def test_what_it_refuses(self, where):
        (x, weight, *_), options = depthwise_cases.make_inputs(DEPTHWISE["49-pixels"])
        for other, reason in (
            ({"x": x.contiguous()}, "needs channels_last"),
            ({"x": x[:, :22], "weight": weight[:22]}, "in packs of 4"),
            ({"stride": 3}, "of stride 1 or 2"),
            ({"dilation": 2}, "not dilated"),
        ):
            arguments = {"x": x, "weight": weight} | options | other
            with pytest.raises(backend.BackendError, match=reason):
                test_depthwise_conv_bn_act.squeezed(**arguments)


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def statistics_and_gradient(x):
    """The passes whose threads share what they sum."""
    mean, var = passes.statistics(x)
    bn = test_batch_norm_act.BatchNormParams(None, None, mean, var)
    slope, offset = (passes.vector_like(x, zero=True) for _ in range(2))
    total = torch.zeros_like(x, dtype=torch.float32)
    d_weight, d_bias, *_ = passes.reduce(x + 1, x, bn, "relu", (slope, offset), total)
    return torch.stack((mean, var, d_weight, d_bias, slope, offset)), total


ORDERS = {
    "max_pool": lambda x: max_pool(x, 3, 2, 1, backend="native"),
    "avg_pool": lambda x: avg_pool(x, 2, backend="native"),
    "dense_concat": lambda x: dense_concat(x.repeat(1, 2, 1, 1), x, 16, backend="native"),
    "batch_norm_act": statistics_and_gradient,
}


def depthwise_in_bands(kernel, stride, dtype):
    (x, *others), options = depthwise_cases.make_inputs(
        (3, 72, 29 * stride, 21, kernel, stride, kernel // 2), dtype
    )
    with mock.patch.object(depthwise, "cut", lambda *_: depthwise.Cut(3, 1, 1, 12)):
        return test_depthwise_conv_bn_act.squeezed(x, *others, **options)


@FILTERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_of_threads_changes_no_depthwise(kernel, stride, dtype, where, host_library, capfd):
    results, library = [], host_library("depthwise_conv_bn_act")
    for reverse in (False, True):
        torch.manual_seed(0)
        with library.in_place_of_the_cpu_ops(reverse):
            results.append(depthwise_in_bands(kernel, stride, dtype))
    assert all(map(torch.equal, *results))
    assert "runtime error" not in capfd.readouterr().err


@pytest.mark.parametrize("channels", [64, 67, 600])
@pytest.mark.parametrize("source", ORDERS)
def test_order_of_threads_and_blocks_changes_nothing(source, channels, host_library, capfd):
    """What a missing barrier or two writers of one element would change."""
    x, library = channels_last(2, channels, 20, 21), host_library(source)
    results = []
    for reverse in (False, True):
        with library.in_place_of_the_cpu_ops(reverse):
            result = ORDERS[source](x)
        results.append(result if isinstance(result, tuple) else (result,))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert "runtime error" not in capfd.readouterr().err


def test_a_variance_beyond_the_numbers_is_infinite(host_library):
    x = channels_last(2, 16, 20, 21) * 1e20
    with host_library("batch_norm_act").in_place_of_the_cpu_ops():
        _, var = passes.statistics(x)
    assert torch.equal(var, passes.statistics(x)[1]) and var.isinf().all()


@pytest.fixture
def all_on_host(host_library, capfd):
    with contextlib.ExitStack() as stack:
        for source in cuda_on_host.SOURCES:
            stack.enter_context(host_library(source.parent.name).in_place_of_the_cpu_ops())
        yield
    assert "runtime error" not in capfd.readouterr().err


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["plain", "memory_efficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_blocks_train(dtype, memory_efficient, device, all_on_host):
    """Passes that write over what they read, and into slices."""
    layout = torch.channels_last
    test_dense_training.test_block_matches_stock(dtype, memory_efficient, layout, device)


def test_inception_modules_train(device, all_on_host):
    """Norms and pools that are computed again in backward, into channel slices."""
    layout = torch.channels_last
    test_convolutions.test_convolutions_and_a_pool_follow_the_rule(torch.float32, layout, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit", ["silu", "none-added", "relu-added", "se-relu-added"])
def test_residual_blocks_train(unit, dtype, device, all_on_host):
    """Norms with a shortcut or SiLU behind them, forward, again and backward."""
    conv, unit = test_convolutions.CONVOLUTIONS["3x3"], test_convolutions.UNITS[unit]
    test_convolutions.test_gradients_follow_the_numerics_rule(
        unit, dtype, conv, device, torch.channels_last
    )


@pytest.mark.parametrize("source", cuda_on_host.SOURCES, ids=lambda path: path.parent.name)
def test_every_launch_is_translated(source):
    text = source.read_text()
    translated = cuda_on_host.translate(text, "some")
    assert translated.count("cuda_on_host::launch(") == text.count("<<<")


@pytest.mark.full
def test_finds_a_missing_barrier_and_a_misaligned_access(tmp_path, capfd):
    """The looking itself: a file that holds such errors is found to."""
    folder = tmp_path / "batch_norm_act"
    folder.mkdir()
    for name, right, wrong in (
        ("pixels.cuh", "    __syncthreads();\n    if (place.row", "    if (place.row"),
        ("cuda.cu", "return C % LANES == 0", "return true; false"),
    ):
        text = (cuda_on_host.ROOT / "csrc/batch_norm_act" / name).read_text()
        assert right in text
        (folder / name).write_text(text.replace(right, wrong))
    library = HostLibrary(folder / "cuda.cu", tmp_path, "broken")
    x, sums = channels_last(2, 72, 20, 21), []
    for reverse in (False, True):
        with library.in_place_of_the_cpu_ops(reverse):
            sums.append(statistics_and_gradient(x[:, :64])[0])
    assert not torch.equal(*sums)
    assert "runtime error" not in capfd.readouterr().err
    with library.in_place_of_the_cpu_ops():
        passes.statistics(x[:, 1:65])
    assert "misaligned address" in capfd.readouterr().err


# What may be left out of the depthwise kernel's steps, each with something to put in its place.
LEFT_OUT = {
    "the barrier before a step": ("__pipeline_wait_prior(Of::STAGES - 2);\n    __syncthreads();",
                                  "__pipeline_wait_prior(Of::STAGES - 2);"),
    "the wait for its rows": ("__pipeline_wait_prior(Of::STAGES - 2);\n", "\n"),
    "the barrier behind the last step": ("step_outside();\n  __syncthreads();", "step_outside();"),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("what", LEFT_OUT)
def test_finds_what_is_left_out_of_a_pipeline(what, tmp_path, where):
    """The looking itself, for copies that are made later than they are asked for."""
    folder = tmp_path / "depthwise_conv_bn_act"
    folder.mkdir()
    original = cuda_on_host.ROOT / "csrc/depthwise_conv_bn_act"
    right, wrong = LEFT_OUT[what]
    text = (original / "kernels.cuh").read_text()
    assert right in text
    (folder / "kernels.cuh").write_text(text.replace(right, wrong))
    # One kernel is enough, and compiles sooner.
    text = re.sub(r"<T, \d, \d>\(call, at, act", "<T, 3, 1>(call, at, act",
                  (original / "cuda.cu").read_text())  # fmt: skip
    text = text.replace("SiluInto<T>{}", "Clamp{-1e30f, 1e30f}").replace(
        "launch<T, K, S, false>", "(void)"
    )
    (folder / "cuda.cu").write_text(text)
    library = HostLibrary(folder / "cuda.cu", tmp_path, "broken_" + tmp_path.name.replace("-", "_"))
    results = []
    for reverse in (False, True):
        torch.manual_seed(0)
        with library.in_place_of_the_cpu_ops(reverse):
            results.append(depthwise_in_bands(3, 1, torch.bfloat16))
    options = {"padding": 1, "act": "none"}
    torch.manual_seed(0)
    args, _ = depthwise_cases.make_inputs((3, 72, 29, 21, 3, 1, 1), torch.bfloat16)
    expected = test_depthwise_conv_bn_act.expected_of(*args, **options)
    right = (torch.allclose(r.float(), e.float(), rtol=0.05, atol=0.1)
             for r, e in zip(results[0], expected, strict=True))  # fmt: skip
    assert not all(map(torch.equal, *results)) or not all(right)
