"""Compiles the kernels of many launches at once, in threads, and loads them on their GPU."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from triton import AsyncCompileMode, FutureKernel, JITFunction

from cvkernels.ops.common.launches import Launched
from cvkernels.tables import first_line

_one_at_a_time = threading.Lock()
# Of a number of kernels: gives what is called after each of them.
Bar = Callable[[int], AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def _no_bar(total: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


def compile_all(
    launched: Iterable[tuple[str, Launched]],
    device: torch.device | None = None,
    bar: Bar = _no_bar,
    workers: int | None = None,
) -> int:
    """Compile what the launches need and load it on ``device``; the number of distinct kernels.

    Triton's passes and LLVM do not hold Python's lock, and ptxas and the compiler of a launcher are
    processes: threads suffice. A launch comes with the name of its layer. Without a device nothing
    is loaded. ``workers`` are threads, one for each core if None.

    Raises:
        RuntimeError: a kernel does not compile or load; the message names the layer.
    """
    executor = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), "compile")
    launched = [one for one in launched if isinstance(one[1].launch.kernel, JITFunction)]
    try:
        with _one_at_a_time, _without_collector(), _on(device):
            return contextvars.copy_context().run(_compile, launched, device, bar, executor)
    except BaseException:
        _forget_unfinished(launched)
        raise
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _compile(
    launched: Iterable[tuple[str, Launched]],
    device: torch.device | None,
    bar: Bar,
    executor: Executor,
) -> int:
    # Left with the context: its own end would wait for what was cancelled.
    AsyncCompileMode(executor, ignore_errors=True).__enter__()
    pending, loading = _submitted(launched), []
    with bar(len(pending)) as advance:
        for layer, one, kernel in pending:
            with _naming(layer):
                kernel = _finished(one, kernel)
            loading.append((layer, executor.submit(_load, kernel, device)))
            advance()
    for layer, future in loading:
        with _naming(layer):
            future.result()
    return len(pending)


def _submitted(launched: Iterable[tuple[str, Launched]]) -> list[tuple[str, Launched, Any]]:
    """Each kernel once, with the first launch of it and that one's layer."""
    pending: dict[int, tuple[str, Launched, Any]] = {}
    for layer, one in launched:
        with _naming(layer):
            kernel = one.launch.warmup(*one.operands)
        if kernel is not None:  # None: a hook of Triton's has compiled it
            pending.setdefault(id(kernel), (layer, one, kernel))
    return list(pending.values())


def _finished(one: Launched, kernel: Any) -> Any:
    """The compiled kernel. Where a thread fails, this one compiles it: the error is then its own,
    and not one of threads."""
    if not isinstance(kernel, FutureKernel):  # compiled before
        return kernel
    try:
        return kernel.result()
    except Exception:  # noqa: BLE001 - a compiler may raise anything
        _forget_unfinished([("", one)])
        return contextvars.Context().run(one.launch.warmup, *one.operands)


def _forget_unfinished(launched: Iterable[tuple[str, Launched]]) -> None:
    """Have later launches compile what failed or was cancelled: Triton 3.8 keeps the futures."""
    for kernel in {launch.kernel for _, (launch, _) in launched}:
        for kernels, *_ in kernel.device_caches.values():
            for key, compiled in list(kernels.items()):
                if isinstance(compiled, FutureKernel) and compiled.kernel is None:
                    del kernels[key]


def _load(kernel: Any, device: torch.device | None) -> None:
    """Build the kernel's launcher and load its code, as the first launch would."""
    if device is not None:
        with _on(device):
            _ = kernel.run


def _on(device: torch.device | None) -> AbstractContextManager[object]:
    """The device as the current one, which Triton compiles for and loads on."""
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """CPython 3.11.7 and others fail where threads change within ast.parse: they do where the
    collector calls Python code there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"freeze: the Triton kernel of {layer or 'the model'} does not compile "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
