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
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

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
    request = package.compile_model(converted, "CPU", options).create_infer_request()
    given = (example, images.numpy())

    def call(x: Tensor) -> Tensor:
        nonlocal given
        if x is not given[0]:
            given = (x, x.float().numpy())
        out = request.infer([given[1]], share_inputs=True, share_outputs=True)
        return torch.from_numpy(out[0]).to(x.dtype)

    return call


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
        package = "torch-tensorrt" if name == "torch_tensorrt" else "'cvkernels[bench]'"
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
