"""The CUDA ops held to the ops' own tests, compiled for the CPU: see cuda_on_host."""

import contextlib

import pytest
import torch

from cvkernels import extension
from cvkernels.functional import avg_pool, dense_concat, max_pool
from cvkernels.ops.batch_norm_act import passes
from tests.ops import (
    test_avg_pool,
    test_batch_norm_act,
    test_dense_concat,
    test_max_pool,
    test_pools,
)
from tests.support import cuda_on_host
from tests.support.cuda_on_host import HostLibrary
from tests.support.made_once import shared_folder
from tests.training import test_convolutions
from tests.training import test_dense_block as test_dense_training

pytestmark = [
    pytest.mark.skipif(bool(cuda_on_host.missing()), reason=cuda_on_host.missing()),
    pytest.mark.skipif(not extension.has("cpu"), reason="the overridden ops are not there"),
]
LIBRARIES: dict[str, HostLibrary] = {}


@pytest.fixture
def host_library(tmp_path_factory):
    """By the name of a .cu file, the library of its ops."""
    folder = shared_folder(tmp_path_factory)

    def library(name: str) -> HostLibrary:
        if name not in LIBRARIES:
            (source,) = (path for path in cuda_on_host.SOURCES if path.parent.name == name)
            LIBRARIES[name] = HostLibrary(source, folder)
        return LIBRARIES[name]

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
