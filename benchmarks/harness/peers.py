"""What stock networks are deployed with, each peer as a function of the stock network.

A peer that is not installed raises :class:`PeerMissing` with the command that installs it.
``example`` is the network's input, to which the peers may specialise.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.case import PeerMissing

Network = Callable[[Tensor], Tensor]


def compiled(model: nn.Module, example: Tensor) -> Network:
    """torch.compile with its defaults, static in its shapes."""
    return torch.compile(model, dynamic=False)


def frozen(model: nn.Module, example: Tensor) -> Network:
    """torch.compile that takes the parameters for constants, folds the norms and prepacks."""
    # As an option too: else dynamo takes what it compiled of the same model without freezing.
    function = torch.compile(model, dynamic=False, options={"freezing": True})
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        function(example)  # compiles here: later calls need no patch
    return function


def autotuned(model: nn.Module, example: Tensor) -> Network:
    """torch.compile's longest search, with CUDA graphs."""
    return torch.compile(model, dynamic=False, mode="max-autotune")


def openvino(model: nn.Module, example: Tensor) -> Network:
    """OpenVINO on as many threads as PyTorch, tuned for latency.

    In float32, or for bfloat16 in that, as it chooses itself on processors that have it: then of a
    float32 network and images, which are converted in its first call alone.
    """
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(example.dtype)
    if precision is None:
        raise PeerMissing(f"openvino is measured in float32 and bfloat16, not in {example.dtype}")
    package = _imported("openvino")
    wide, images = copy.deepcopy(model).float(), example.float()
    with _quiet():
        converted = package.convert_model(wide, example_input=images, input=list(example.shape))
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return _inferred(package.compile_model(converted, "CPU", options), example)


def _inferred(compiled: Any, example: Tensor) -> Network:
    """What OpenVINO compiled, as a function of a tensor that it is given in float32."""
    request = compiled.create_infer_request()
    given = (example, example.float().numpy())

    def call(x: Tensor) -> Tensor:
        nonlocal given
        if x is not given[0]:
            given = (x, x.float().numpy())
        out = request.infer([given[1]], share_inputs=True, share_outputs=True)
        return torch.from_numpy(out[0]).to(x.dtype)

    return call


def openvino_int8(model: nn.Module, example: Tensor, images: Tensor) -> Network:
    """OpenVINO quantised by NNCF's post-training quantisation with its defaults."""
    package, nncf = _imported("openvino"), _imported("nncf")
    with _quiet():
        converted = package.convert_model(model, example_input=example, input=list(example.shape))
        whole = len(images) // len(example) * len(example)
        batches = [batch.numpy() for batch in images[:whole].split(len(example))]
        quantised = nncf.quantize(converted, nncf.Dataset(batches), subset_size=len(batches))
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return _inferred(package.compile_model(quantised, "CPU", options), example)


def onnxruntime_int8(model: nn.Module, example: Tensor, images: Tensor) -> Network:
    """ONNX Runtime's static quantisation, QDQ with weights by channel and activations unsigned."""
    package = _imported("onnxruntime")
    tools = importlib.import_module("onnxruntime.quantization")
    calibrated = importlib.import_module("onnxruntime.quantization.shape_inference")
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("float.onnx", "ready.onnx", "int8.onnx")]
        torch.onnx.export(model, (example,), paths[0], dynamo=False, input_names=["x"])
        calibrated.quant_pre_process(paths[0], paths[1])
        whole = len(images) // len(example) * len(example)
        batches = iter([{"x": b.numpy()} for b in images[:whole].split(len(example))])

        class Reader(tools.CalibrationDataReader):
            def get_next(self) -> dict | None:
                return next(batches, None)

        tools.quantize_static(
            paths[1], paths[2], Reader(), quant_format=tools.QuantFormat.QDQ, per_channel=True,
            activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8,
        )  # fmt: skip
        options = package.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = package.InferenceSession(paths[2], options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def inductor_int8(model: nn.Module, example: Tensor, images: Tensor) -> Network:
    """torch.compile of the network as torchao's quantiser for x86 processors leaves it."""
    pt2e = _imported("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    with _quiet(), torch.no_grad():
        exported = torch.export.export(model, (example,), strict=True).module()
        prepared = pt2e.prepare_pt2e(exported, quantizer)
        whole = len(images) // len(example) * len(example)
        for batch in images[:whole].split(len(example)):
            prepared(batch)
        converted = pt2e.convert_pt2e(prepared)
        with torch._inductor.config.patch(freezing=True):
            function = torch.compile(converted, dynamic=False, options={"freezing": True})
            function(example)
    return function


def onnxruntime(model: nn.Module, example: Tensor) -> Network:
    """ONNX Runtime, every graph optimisation, on as many threads as PyTorch."""
    if example.dtype != torch.float32:
        raise PeerMissing(f"onnxruntime has no convolution in {example.dtype} on CPUs")
    package = _imported("onnxruntime")
    _imported("onnxscript")
    with _quiet():
        exported = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    options = package.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # its own warnings about constants it folds
    content = exported.model_proto.SerializeToString()
    session = package.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return call


def tensorrt(model: nn.Module, example: Tensor) -> Network:
    """Torch-TensorRT in example's dtype."""
    package = _imported("torch_tensorrt")
    return package.compile(model, ir="dynamo", inputs=[example], enabled_precisions={example.dtype})


@functools.cache
def warm_up() -> None:
    """Import what compiles, so that no variant's time to the first batch has that in it."""
    torch.compile(lambda x: x + 1)(torch.ones(2))
    for name in ("openvino", "onnxruntime", "onnxscript"):
        with contextlib.suppress(PeerMissing):
            _imported(name)


def graphed(function: Network, example: Tensor) -> Network:
    """``function`` in a CUDA graph; it takes the example's values whatever it is called with."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):  # what is allocated and tuned on first use must not be captured
            function(example)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = function(example)

    def call(x: Tensor) -> Tensor:
        graph.replay()
        return out

    call.eager = function
    return call


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = {"torch_tensorrt": "torch-tensorrt", "torchao": "torchao"}.get(
            name.partition(".")[0], "'cvkernels[bench]'"
        )
        raise PeerMissing(f"{name} is not installed; pip install {package}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print and warn of on their way."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
