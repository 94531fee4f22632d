"""What every op promises of its calls: the choice of a backend, its results, torch.compile."""

import pytest
import torch

from cvkernels import backend, functional, record
from cvkernels.backend import BackendError
from tests.support.cases.every_op import OPS, PLANNED, calls_on
from tests.support.numerics import tensors_in

pytestmark = pytest.mark.usefixtures("native")

CHANNELS_LAST = torch.channels_last
# dense_concat takes nothing that needs a gradient, and says so.
LEARNING = [op for op in PLANNED if op != "dense_concat"]
WITH_TRITON = [op for op in PLANNED if op not in ("max_pool", "avg_pool", "dense_concat")]

each_op = pytest.mark.parametrize("op", PLANNED)


def call_on(op, shape=(2, 8, 5, 6), dtype=torch.float32, memory_format=CHANNELS_LAST, device="cpu"):
    x = torch.randn(shape, device=device).to(dtype)
    return calls_on(x.contiguous(memory_format=memory_format))[op]


class TestChoice:
    @each_op
    def test_auto_is_native_where_it_can_and_use_is_obeyed(self, op):
        call = call_on(op)
        planned = call.plan()
        assert (planned.op, planned.backend) == (op, "native") and planned.reason
        assert planned.traffic.kernels >= 1 and planned.traffic.bytes_read > 0
        assert backend.chosen(op, *call.arguments, **call.options) == "native"
        assert call.plan(backend="reference").reason == "requested"
        with backend.use("reference"):
            assert backend.chosen(op, *call.arguments, **call.options) == "reference"
            assert call.plan().reason == "requested"
            assert call.plan(backend="native").backend == "native"

    @pytest.mark.parametrize("op", OPS)
    def test_every_op_can_be_asked(self, op):
        assert backend._plans[op] is getattr(functional, op).plan
        assert op in PLANNED or op == "batch_norm_act"  # which has no inference

    def test_of_norms_that_train_and_of_arguments_by_name(self):
        x = torch.randn(2, 8, 5, 5).contiguous(memory_format=CHANNELS_LAST)
        assert backend.chosen("batch_norm_act", x) == "native"
        assert backend.chosen("max_pool", x=x, kernel_size=2) == "native"

    @each_op
    @pytest.mark.parametrize("name", ["triton", "cudnn", "onednn", "magic"])
    def test_what_is_no_backend_of_the_op(self, op, name):
        call = call_on(op)
        if name == "magic":
            error, message = ValueError, "backend must be one of .* got 'magic'"
        elif (name == "triton" and op in WITH_TRITON) or (name, op) == ("onednn", "conv_bn_act"):
            assert call.plan(backend=name).backend == name
            return
        elif "conv" in op:
            error, message = BackendError, f"{op}: backend '{name}' cannot run"
        else:
            error, message = BackendError, f"{op}: there is no backend '{name}'; use 'auto', '"
        with pytest.raises(error, match=message):
            call(backend=name)

    @pytest.mark.parametrize("op", LEARNING)
    def test_the_reference_runs_where_a_gradient_is_needed(self, op):
        learning = call_on(op).map(lambda t: t.clone().requires_grad_())
        planned = learning.plan()
        assert planned.backend == "reference" and "a gradient is needed" in planned.reason
        with torch.no_grad():
            assert learning.plan().backend == "native"
        if "conv" not in op:  # whose gradients are written by hand, for every forward
            with pytest.raises(BackendError, match=f"{op}: .*a gradient is needed.*use backend="):
                learning(backend="native")

    @pytest.mark.parametrize("op", ["squeeze", "excite", "conv_bn_act", "depthwise_conv_bn_act"])
    def test_the_reference_runs_in_float64(self, op):
        call = call_on(op, dtype=torch.float64)
        assert call.plan().backend == "reference"
        for name in ("native", "triton"):
            with pytest.raises(BackendError, match=f"{op}: .*(float64|float16)"):
                call.plan(backend=name)

    @each_op
    def test_meta_tensors_are_the_references_but_under_explain(self, op):
        call = call_on(op, device="meta")
        planned = call.plan()
        assert planned.backend == "reference" and "got meta" in planned.reason
        with record.recording(record.Recorder()) as recorder:
            results = tensors_in(call())
        (row,) = recorder.calls
        name = "triton" if op in WITH_TRITON else "native"
        assert (row.op, row.backend) == (op, "cuda" if op == "depthwise_conv_bn_act" else name)
        assert all(t.device.type == "meta" for t in results)

    @each_op
    def test_a_reference_under_explain_says_why(self, op):
        reasons, recorder = [], record.Recorder()
        recorder.fallback = lambda reason: reasons.append(reason) or record.paused()
        with record.recording(recorder):
            call_on(op)(backend="reference")
        assert reasons == [f"{op}: requested"] and recorder.calls == []


class TestResults:
    @each_op
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_have_the_dtype_and_layout_of_x(self, op, dtype, memory_format, implementation):
        """The compiled convolutions' outputs are channels_last, the reference's as PyTorch's."""
        call = call_on(op, dtype=dtype, memory_format=memory_format)
        planned = call.plan(backend="reference" if implementation == "reference" else "auto")
        layout = CHANNELS_LAST if "conv" in op else memory_format
        for result in tensors_in(planned(*call.data)):
            if result.dim() == 4:
                assert result.dtype == dtype
                assert planned.backend == "reference" or result.is_contiguous(memory_format=layout)

    @each_op
    @pytest.mark.parametrize("shape", [(2, 8, 5, 6), (1, 8, 1, 1)], ids=["map", "pixel"])
    def test_are_never_views(self, op, shape, memory_format, implementation):
        call = call_on(op, shape, memory_format=memory_format)
        before = [t.clone() for t in tensors_in([call.arguments, call.options])]
        for result in tensors_in(call(backend=implementation)):
            result.fill_(7.0)
        after = tensors_in([call.arguments, call.options])
        assert all(map(torch.equal, before, after))

    @each_op
    @pytest.mark.parametrize("threads", [2, 3, 4])
    @pytest.mark.parametrize("shape", [(1, 136, 20, 21), (3, 72, 65, 66), (9, 136, 20, 21)],
                             ids=["image", "large-images", "images"])  # fmt: skip
    def test_do_not_depend_on_threads(self, op, threads, shape, memory_format):
        call = call_on(op, shape, memory_format=memory_format)
        results, before = [], torch.get_num_threads()
        try:
            for count in (1, threads):
                torch.set_num_threads(count)
                results.append(tensors_in(call(backend="native")))
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, *results))

    @each_op
    def test_are_those_in_inference_mode(self, op, memory_format, implementation):
        call = call_on(op, memory_format=memory_format)
        expected = tensors_in(call(backend=implementation))
        with torch.inference_mode():
            actual = tensors_in(call(backend=implementation))
        assert all(map(torch.equal, actual, expected))

    @each_op
    def test_of_no_image_are_empty(self, op, memory_format, implementation):
        call = call_on(op, (0, 8, 5, 6), memory_format=memory_format)
        assert not any(t.numel() for t in tensors_in(call(backend=implementation)))

    @each_op
    @pytest.mark.few(16)
    @pytest.mark.parametrize("name", ["auto", "native", "reference"])
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_are_those_of_one_compiled_graph(self, op, name, dynamic):
        call, function = call_on(op, (2, 16, 9, 11)), getattr(functional, op)
        arguments, options, places = call.arguments, call.options, call.places

        def run(*data):
            # By places: torch 2.13 loses what dataclasses.replace changes in a dynamic graph.
            given = list(arguments)
            for place, tensor in zip(places, data, strict=True):
                given[place] = tensor * 2
            return [t + 1 for t in tensors_in(function(*given, **options, backend=name))]

        torch._dynamo.reset()
        with torch.no_grad():
            compiler = "aot_eager" if name == "reference" else "inductor"
            compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=compiler)
            for actual, expected in zip(compiled(*call.data), run(*call.data), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
                assert actual.stride() == expected.stride()
