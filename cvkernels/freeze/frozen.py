"""``freeze``, and the module that it returns."""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvkernels import backend, record
from cvkernels.freeze import saving
from cvkernels.freeze.backends import is_gpu, read_table, writes_slices
from cvkernels.freeze.capture import capture
from cvkernels.freeze.classifier import convolve_classifier
from cvkernels.freeze.compile import compile_launches
from cvkernels.freeze.cuda_graphs import CudaGraph, Pool, may_be_captured
from cvkernels.freeze.early_gates import gate_early
from cvkernels.freeze.fuse import fuse, own_weights
from cvkernels.freeze.graph import Graph, Op, TensorSpec, fill
from cvkernels.freeze.image import lay_out_image
from cvkernels.freeze.lock import ForkSafeLock
from cvkernels.freeze.ops import Call, Conv
from cvkernels.freeze.plan import Plan, converted, refuse_traces
from cvkernels.freeze.projections import merge_projections
from cvkernels.freeze.quantise import Quantised, quantise
from cvkernels.freeze.report import Report, report
from cvkernels.freeze.siblings import merge_siblings
from cvkernels.functional import DerivedWeights
from cvkernels.memory_use import out_of_memory
from cvkernels.ops.common.errors import InputTypeError, InputValueError
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.tables import first_line

# Shapes of input that a frozen model keeps plans for; the one used longest ago goes first.
CAPACITY = 8
# Shapes that get a CUDA graph, the first ones; others run without, as right.
GRAPHS = 8
# Of the files that ``save`` writes.
FORMAT = 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
# PyTorch's modules that run another one, and the attribute that it is.
WRAPPERS = {
    **dict.fromkeys(("DataParallel", "DistributedDataParallel", "AveragedModel"), "module"),
    "OptimizedModule": "_orig_mod",
}
# Attributes of a frozen model that are not copied or pickled.
_DERIVED = (
    "_plans", "_used", "_clock", "_lock", "_pool", "_caches", "_original", "_example",
    "_seconds_before",
)  # fmt: skip


def freeze(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype | None = None,
    table: Mapping[str, str] | str | Path | None = None,
    calibration: Tensor | Iterable | None = None,
    tolerance: float = 30.0,
) -> Frozen:
    """The fastest form of ``model`` for inference: captured once, folded, prepacked and planned.

    The model is traced by torch.fx, its norms are folded into its convolutions in float64, the
    ops next to each other are fused, and for every input shape a plan says which kernel runs each
    step and where its result lies: in one arena that values share when they do not live at the same
    time, and where concatenations are slices that their parts are written to. The first call with
    an arena records what its native CPU kernels do there, and later calls repeat that without
    Python or a dispatcher between them; on CUDA a plan is one CUDA graph, but for one that calls
    code which may wait for the GPU. ``explain`` and a profiler still see every step.

    Args:
        model: in eval. Its parameters are copied: what changes in them later does not reach the
            frozen model. A child that torch.fx cannot trace, that has a hook, or that is not known
            runs as a copy of itself. Hooks of modules that are traced into are not called.
        example: Tensor[N, C, H, W] on the model's device, as the model will get them. Other N, H
            and W are planned when they come.
        dtype: of weights and maps, the model's if None. In bfloat16 and float16 the frozen model
            takes float32 images as well, and answers them in float32. torch.int8, on CPU, quantises
            the model: it takes and returns float32, and its convolutions multiply bytes.
        table: measured choices of :func:`cvkernels.tune`, or the file that they were saved to.
        calibration: for int8, images as the model will get them, of the example's size: a tensor,
            or an iterable of batches, such as a DataLoader, which may be pairs with labels. The
            ranges of activations are those with the smallest mean squared error on them.
        tolerance: for int8, the signal-to-noise ratio in decibels that outputs keep on these
            images: ``10 * log10(sum(y ** 2) / sum((z - y) ** 2))`` with y those in float32.
            Convolutions that cost more stay in float32: the costliest first, each measured alone.
            ``frozen.report()`` and ``explain`` list them. -inf leaves none.

    Returns:
        A :class:`Frozen`.

    Raises:
        TypeError: model is no module, example or calibration no floating tensor, or dtype not
            listed.
        ValueError: a module of the model is in training mode; the example has another rank, or
            another device than the model; it cannot be captured
            (:class:`cvkernels.freeze.capture.CaptureError`), or a layer does not take the example;
            for int8, calibration images are missing, of another size, NaN or infinite, or the
            device is no CPU.
        MemoryError: the plan does not fit into memory.

    The model is the same and usable after any of these.
    """
    start = time.perf_counter()
    model = _unwrapped(model)
    _check_model(model, example, dtype)
    quantises = dtype == torch.int8
    if quantises and example.device.type != "cpu":
        raise ValueError(f"freeze: torch.int8 is for CPUs, got a model on {example.device}")
    if calibration is not None and not quantises:
        raise ValueError("freeze: calibration= is for dtype=torch.int8")
    asked = torch.float32 if quantises else dtype
    dtype = _dtype_of(model, example, asked)
    choices = read_table(table)
    with _planning(example.device):
        graph, quantised = _fused_graph(model, example, asked, dtype), None
        if quantises:
            graph, quantised = quantise(graph, example, calibration, tolerance)
        frozen = Frozen(graph, dtype, example.device, choices, example.shape[1], quantised)
        frozen.remember(model, example)
        image = example.detach().to(dtype)
        frozen.plan_for(image)
        frozen.start_clock(time.perf_counter() - start)
        if image.is_cuda:
            frozen(image)  # compiles kernels and captures the graph
    return frozen


def planned(model: nn.Module, example: Tensor) -> Plan:
    """The plan that a Hopper GPU gets for a model and images on the meta device.

    Both are in one dtype; nothing is computed or allocated. Raises what :func:`freeze` raises.
    """
    model = _unwrapped(model)
    _check_model(model, example, None, on_meta=True)
    with record.recording(record.Recorder()), _planning(example.device):
        graph = _fused_graph(model, example, None, example.dtype)
        spec = TensorSpec(tuple(example.shape), example.dtype)
        return Plan(graph, spec, example.device, {}, {})


def _fused_graph(
    model: nn.Module, example: Tensor, asked: torch.dtype | None, dtype: torch.dtype
) -> Graph:
    """The model's graph, its weights in ``dtype``; ``asked``: what the caller did, if so."""
    graph = capture(model, asked)
    for node in graph.nodes:
        if isinstance(node.op, Call):
            node.op.to(dtype)
    fuse(graph, graph.infer(TensorSpec(tuple(example.shape), dtype), example.device))
    if writes_slices(dtype, example.device):
        gate_early(graph)
    own_weights(graph, dtype, example.device)
    if writes_slices(dtype, example.device):
        merge_siblings(graph)
        if is_gpu(example.device):
            merge_projections(graph)
            lay_out_image(graph)
        else:
            convolve_classifier(graph)
    return graph


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network in what only trains, averages or compiles it."""
    while type(model).__name__ in WRAPPERS and type(model).__module__.startswith("torch."):
        model = getattr(model, WRAPPERS[type(model).__name__])
    return model


def _check_model(
    model: nn.Module, example: Tensor, dtype: torch.dtype | None, on_meta: bool = False
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, Frozen):
        raise TypeError("freeze: the model is frozen already; freeze the model that it came from")
    if not isinstance(example, Tensor):
        raise TypeError(
            f"freeze: example must be a tensor [N, C, H, W], got {type(example).__name__}; wrap a "
            f"model of several inputs in a module that takes one"
        )
    if not example.is_floating_point() or (dtype is not None and dtype not in DTYPES):
        raise TypeError(
            f"freeze: example must be float32, bfloat16, float16 or float64, and dtype one of "
            f"these or int8, got {example.dtype} and {dtype}"
        )
    if example.dim() != 4 or not example.numel() or (example.is_meta and not on_meta):
        raise ValueError(
            f"freeze: example must be images [N, C, H, W] that hold data, got "
            f"{list(example.shape)} on {example.device}; give a single image a batch of one with "
            f"example[None]"
        )
    for name, module in model.named_modules():
        if module.training and not type(module).__module__.startswith("torch.ao.nn.quantized"):
            where = f"its module {name!r}" if name else "the model"
            raise ValueError(f"freeze: {where} is in training mode; call model.eval() first")
    devices: dict[torch.device, str] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        devices.setdefault(tensor.device, name)
    if devices.keys() - {example.device}:
        others = ", ".join(f"{device} ({name!r})" for device, name in devices.items())
        raise ValueError(
            f"freeze: example must be on the model's device, {others}, got {example.device}; move "
            f"one with .to()"
        )


def _dtype_of(model: nn.Module, example: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return kinds[0] if kinds else example.dtype


@contextlib.contextmanager
def _planning(device: torch.device) -> Iterator[None]:
    """Whatever the caller's modes; out of memory is one error, of Python's allocator and PyTorch's.

    What backends derive from the weights is no part of the call that a plan is made in.
    """
    whole = torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
    try:
        with torch.inference_mode(False), torch.no_grad(), whole, backend.use("auto"):
            with record.paused():
                yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        why = str(error).partition("\n")[0] or "no room"
        raise MemoryError(
            f"freeze: out of memory while planning ({why}); the model is unchanged. Free memory, "
            f"or give a smaller batch"
        ) from error


class Frozen(nn.Module):
    """A frozen model: call it as the model that it came from, without gradients.

    It takes Tensor[N, C, H, W] of the dtype, device and C that it was frozen for, and in bfloat16
    and float16 of float32, too: what it returns is converted back then. Any N, H and W that the
    network takes, any strides. It returns what the model returns, in tensors of its own.
    Several threads may call it at once, with equal results. It can be pickled and deep-copied; what
    is derived from the weights is derived again. It has no parameters: ``state_dict`` is empty. It
    computes in its dtype, under torch.autocast too, and by the backends of its plans, whatever
    :func:`cvkernels.backend.use` asks for. On CPU an image that holds NaN or infinity gives NaN; on
    a GPU a first convolution of stride 2 also spreads it to the output beside those whose window
    holds it.
    """

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype,
        device: torch.device,
        table: Mapping[str, str],
        channels: int,
        quantised: Quantised | None = None,
    ) -> None:
        super().__init__()
        self.training = False
        self.graph = graph
        self.dtype = dtype
        self.device = device
        self.channels = channels
        self.table = dict(table)
        self.quantised = quantised
        self.seconds_to_first_batch = float("nan")
        self._start_empty()

    def _start_empty(self) -> None:
        """Without what is derived from the graph, or remembered for ``verify``."""
        self._plans: dict[tuple, Plan | CudaGraph] = {}
        self._used: dict[tuple, int] = {}
        self._clock = itertools.count()
        self._lock = ForkSafeLock()
        self._pool: Pool | None = None
        self._caches: dict[Op, DerivedWeights] = {}
        self._original: tuple[Any, tuple] | None = None
        self._example: Tensor | None = None
        self._seconds_before: float | None = None

    def forward(self, x: Tensor) -> Any:
        plan = self._plans.get(x.shape) if type(x) is Tensor else None
        if plan is None or x.dtype is not self.dtype or x.device != self.device or x.requires_grad:
            self._check(x)
            if not x.shape[0]:
                return self._empty(x)
            plan = self.plan_for(x)
        self._used[x.shape] = next(self._clock)
        if self._seconds_before is not None:
            return self._first_batch(plan, x)
        return self._run(plan, x)

    def _run(self, plan: Plan | CudaGraph, x: Tensor) -> Any:
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(self.device.type):
            return self._in_dtype_of(x, plan(x))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._in_dtype_of(x, plan(x))

    def _in_dtype_of(self, x: Tensor, result: Any) -> Any:
        """The result, in the images' dtype where they are wider than the model."""
        return result if x.dtype is self.dtype else converted(result, self.dtype, x.dtype)

    def start_clock(self, seconds: float) -> None:
        """The first call completes ``seconds_to_first_batch``, of which ``seconds`` are over."""
        self._seconds_before = seconds

    def _first_batch(self, plan: Plan | CudaGraph, x: Tensor) -> Any:
        start = time.perf_counter()
        result = self._run(plan, x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        before, self._seconds_before = self._seconds_before, None
        if before is not None:
            self.seconds_to_first_batch = before + time.perf_counter() - start
        return result

    def plan_for(self, x: Tensor) -> Plan | CudaGraph:
        """The plan of x's shape, made where there is none."""
        if (plan := self._plans.get(x.shape)) is not None:
            return plan
        with self._lock:
            if x.shape not in self._plans:
                self._make_room()
                with _planning(self.device):
                    spec = TensorSpec(tuple(x.shape), self.dtype)
                    plan = Plan(self.graph, spec, self.device, self._caches, self.table)
                    if x.is_cuda:
                        compile_launches(plan)
                    self._plans[x.shape] = self._captured(plan) if x.is_cuda else plan
            return self._plans[x.shape]

    def _make_room(self) -> None:
        """Drop the plan used longest ago where there are as many as are kept."""
        plans = [shape for shape, plan in self._plans.items() if isinstance(plan, Plan)]
        if len(plans) >= CAPACITY:
            del self._plans[min(plans, key=lambda shape: self._used.get(shape, -1))]
        self._used = {shape: self._used.get(shape, -1) for shape in self._plans}

    def _captured(self, plan: Plan) -> Plan | CudaGraph:
        """The plan as a CUDA graph, while there are few of them; not one that may wait for the
        GPU."""
        if not all(may_be_captured(step) for step, _ in plan.steps):
            return plan
        if sum(isinstance(other, CudaGraph) for other in self._plans.values()) >= GRAPHS:
            return plan
        if self._pool is None:
            self._pool = Pool(self.device)
        return CudaGraph(plan, self._pool)

    def convolutions(self, x: Tensor) -> list[tuple[Conv, Problem]]:
        """The convolutions that a table of choices knows, as they run on x."""
        self._check(x)
        return plan_of(self.plan_for(x)).convolutions()

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"frozen model: the input must be a tensor, got {type(x).__name__}")
        refuse_traces(x)
        if x.dim() != 4 or x.shape[1] != self.channels:
            way_out = "; give a single image a batch of one with x[None]" if x.dim() == 3 else ""
            raise InputValueError(
                f"frozen model: the input must have shape [N, {self.channels}, H, W], got "
                f"{list(x.shape)}{way_out}"
            )
        if x.dtype != self.dtype and (x.dtype != torch.float32 or self.dtype.itemsize != 2):
            raise InputTypeError(
                f"frozen model: the input must be {self.dtype}, got {x.dtype}; convert it with "
                f".to({self.dtype}), or freeze the model with dtype={x.dtype}"
            )
        if x.device != self.device:
            raise InputValueError(
                f"frozen model: the input must be on {self.device}, got {x.device}; move it with "
                f".to(), or freeze the model on {x.device}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "frozen model: the input requires a gradient, and a frozen model has none; call "
                "it under torch.no_grad(), give it x.detach(), or use the model that it came from"
            )

    def _empty(self, x: Tensor) -> Any:
        """What the model returns for no images."""
        one = TensorSpec((1, *x.shape[1:]), self.dtype)
        values = self.graph.infer(one, self.device)
        results = [
            x.new_empty((0, *values[node].shape[1:]), dtype=values[node].dtype)
            if isinstance(values[node], TensorSpec)
            else values[node]
            for node in self.graph.results
        ]
        return self._in_dtype_of(x, fill(self.graph.output, results))

    def report(self) -> Report:
        """What runs for the shape of the latest call: kernels, bytes, memory and backends."""
        if not self._plans:
            raise ValueError("report: there is no plan yet; call the frozen model once")
        latest = max(self._plans, key=lambda shape: self._used.get(shape, -1))
        return report(plan_of(self._plans[latest]), tuple(latest), self.seconds_to_first_batch)

    def remember(self, model: nn.Module, example: Tensor) -> None:
        """Keep what :func:`cvkernels.verify` compares with: no copy, and a weak reference to the
        model."""
        self._original = (weakref.ref(model), stamp(model))
        self._example = example.detach()

    def original(self, model: nn.Module | None = None) -> tuple[nn.Module, Tensor | None]:
        """The model that was frozen, if ``model`` is None, and the example; for ``verify``.

        Raises:
            ValueError: they are gone, or the model has changed since.
        """
        if model is None and self._original is not None:
            model = self._original[0]()
            if model is not None and stamp(model) != self._original[1]:
                raise ValueError(
                    "verify: the parameters of the model have changed since it was frozen; freeze "
                    "it again, or pass the model as it was: verify(frozen, original=model)"
                )
        if model is None:
            raise ValueError(
                "verify: the frozen model was loaded or copied, or the model that it came from is "
                "gone; pass it: verify(frozen, example, original=model)"
            )
        return model, self._example

    def save(self, path: str | Path) -> None:
        """Write the model to a file of plain types that :func:`cvkernels.load_frozen` reads.

        Raises:
            ValueError: the model holds modules or functions that are called as they are; pickle it
                with torch.save(frozen, path), and load it with weights_only=False.
        """
        about = {"format": FORMAT, "channels": self.channels, "table": dict(self.table)}
        about |= {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        about["quantised"] = None if self.quantised is None else tuple(self.quantised)
        torch.save(about | saving.encode(self.graph), path)

    def train(self, mode: bool = True) -> Frozen:
        if mode:
            raise RuntimeError(
                "train: a frozen model cannot be trained, its norms are folded away; train the "
                "model that it came from, and freeze that again"
            )
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        if requires_grad:
            raise RuntimeError(
                "requires_grad_: a frozen model has no gradients; use the model that it came from"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        moved = fn(probe)
        if (moved.dtype, moved.device) != (probe.dtype, probe.device):
            raise RuntimeError(
                f"to: a frozen model stays {self.dtype} on {self.device}; move or convert the "
                f"model that it came from, and freeze that again (dtype= converts, too)"
            )
        return self

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in _DERIVED}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._start_empty()

    def extra_repr(self) -> str:
        how = f", {self.quantised}" if self.quantised is not None else ""
        return f"{len(self.graph.nodes) - 1} ops, dtype={self.dtype}, device={self.device}{how}"


def load_frozen(path: str | Path) -> Frozen:
    """The frozen model that ``frozen.save(path)`` wrote, on the device that it was frozen on.

    Nothing but tensors and plain types is read (``torch.load`` with ``weights_only=True``).

    Raises:
        ValueError: the file is damaged, holds something else, or was written by a newer version.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"load_frozen: {path} is no frozen model of this version; write one with "
            f"frozen.save(path)"
        )
    try:
        dtype, device = getattr(torch, content["dtype"]), torch.device(content["device"])
        quantised = content["quantised"]
        quantised = None if quantised is None else Quantised(*quantised)
        graph, table = saving.decode(content), content["table"]
        return Frozen(graph, dtype, device, table, content["channels"], quantised)
    # Whatever a file that only seems to be one holds in the place of the parts.
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"load_frozen: {path} is damaged: {first_line(error)}") from error


def _read(path: str | Path) -> Any:
    """What torch.save wrote there; torch.load itself does not compare the sums of the parts."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the sum of {part} is wrong")
        return torch.load(path, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    # Reading bytes that are no file of torch.save's may raise anything.
    except Exception as error:  # noqa: BLE001
        raise ValueError(
            f"load_frozen: {path} cannot be read, it is damaged or no file of frozen.save(path): "
            f"{first_line(error)}"
        ) from error


def plan_of(plan: Plan | CudaGraph) -> Plan:
    """The steps themselves, of a CUDA graph too."""
    return plan.plan if isinstance(plan, CudaGraph) else plan


def stamp(model: nn.Module) -> tuple:
    """What changes when a parameter or buffer does."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
