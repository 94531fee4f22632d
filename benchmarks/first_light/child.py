"""The process of one step: measures its items and writes each down at once.

A request has the step's module and argument, the names of items to leave out and of those to
measure last, the setting, the file to write, a log, and the seconds after which no further item is
started.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.first_light.saved import write_json
from benchmarks.harness.sticky import STATUS, ContextLost, check_context

START = "its start"


class Part:
    """What the runner reads of this process."""

    def __init__(self, path: Path, step: str) -> None:
        self.path = path
        self.said: dict[str, Any] = {"step": step, "running": "", "ended": False, "items": {}}

    def running(self, key: str) -> None:
        self.said["running"] = key
        write_json(self.path, self.said)

    def put(self, key: str, row: dict[str, Any]) -> None:
        self.said["items"][key] = {"id": uuid.uuid4().hex, **finite(row)}
        self.said["running"] = ""
        write_json(self.path, self.said)

    def end(self) -> None:
        self.said["ended"] = True
        write_json(self.path, self.said)


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become text."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main(request: dict[str, Any]) -> None:
    """In a process group of its own, which ends when the runner does."""
    os.setsid()
    threading.Thread(target=end_with_runner, daemon=True).start()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(run(request))


def end_with_runner() -> None:
    runner = multiprocessing.parent_process()
    assert runner is not None
    runner.join()
    os.killpg(0, signal.SIGKILL)


def run(request: dict[str, Any]) -> int:
    end = time.monotonic() + request["seconds"]
    part = Part(Path(request["part"]), request["step"])
    part.running(START)
    module = importlib.import_module(request["module"])
    setting = getattr(module, "Setting", dict)(**request["setting"])
    arguments = [request["argument"]] if request["argument"] else []
    skip, last = set(request["skip"]), set(request["last"])
    wanted = [
        (key, measure) for key, measure in module.items(setting, *arguments) if key not in skip
    ]
    for key, measure in sorted(wanted, key=lambda item: item[0] in last):
        if time.monotonic() > end:
            return 0
        part.running(key)
        start = time.perf_counter()
        try:
            row = attempt(measure)
        except ContextLost as error:
            part.put(key, {"status": "lost CUDA", "note": str(error)})
            return STATUS
        part.put(key, {**row, "seconds": round(time.perf_counter() - start, 2)})
    part.end()
    return 0


def attempt(measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    try:
        return {"status": "done", **(measure() or {})}
    except Exception as error:  # noqa: BLE001 - the other items count too
        traceback.print_exc()
        check_context(error)
        first_line = (str(error).splitlines() or [""])[0]
        return {"status": "failed", "note": f"{type(error).__name__}: {first_line}"}
