"""Runs the steps, each in a process of its own that is ended when its time is over."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.first_light import child, display
from benchmarks.first_light.saved import Saved, Unwritable
from benchmarks.first_light.steps import MACHINE, PACKAGE, PRELOADED, Step, background, steps

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "h200"
SECONDS = 540.0
LEAST = 8.0  # seconds that a step is started for: a process needs some to import torch
POLL = 0.1
GRACE = 15.0  # of a step's seconds, its last ones start no further item
STARTS = 4  # of one step in a run: after an item that hangs or breaks CUDA a new process goes on
BATCH = 128
LOG_BYTES = 2**22  # of earlier runs, kept


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=seconds_of, default=SECONDS, help="in all, at most")
    parser.add_argument("--rehearse", action="store_true", help="all of it without a GPU, tiny")
    parser.add_argument(
        "--results", "--json", type=Path, metavar="FOLDER", help="where first_light.json lies"
    )


def seconds_of(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not LEAST <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least {LEAST:g}, got {text!r}")
    return seconds


def main(options: argparse.Namespace) -> int:
    from benchmarks.harness.command_line import Refused

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rehearsed = Path(tempfile.gettempdir()) / "cvkernels-first-light"
    folder = options.results or (rehearsed if options.rehearse else RESULTS)
    try:
        return Run(folder.resolve(), options.seconds, options.rehearse, steps()).main()
    except (Unwritable, NoMachine) as error:
        raise Refused(str(error)) from None


class NoMachine(Exception):
    """Nothing can be measured here; the message says why."""


class Run:
    """One run: ``steps`` in turn until ``seconds`` are over."""

    machine = MACHINE

    def __init__(
        self,
        folder: Path,
        seconds: float,
        rehearsal: bool,
        chosen: Sequence[Step],
        preloaded: Sequence[str] = PRELOADED,
    ) -> None:
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.saved = Saved(folder, rehearsal)
        self.log = folder / "first_light.log"
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.unlink()
        self.steps = chosen
        self.rehearsal = rehearsal
        self.setting: dict[str, Any] = {"rehearsal": rehearsal, "batch": BATCH}
        predicted = RESULTS / "predicted.json"
        self.setting["predicted"] = str(predicted) if predicted.exists() else ""
        set_environment(rehearsal)
        # One process imports what the steps need, and their processes are forks of it.
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(list(preloaded))
        self.helpers: list[subprocess.Popen] = []
        self.display = display.Display(len(chosen))

    def main(self) -> int:
        try:
            with self.display:
                if reason := self.lacks_machine():
                    raise NoMachine(reason)
                self.start_helpers()
                for step in self.steps:
                    self.run_step(step)
        except KeyboardInterrupt:
            self.saved.take_part()
            print(f"interrupted: {self.saved.path} holds what was measured", file=sys.stderr)
            return 130
        finally:
            self.end_helpers()
            self.saved.drop_part()
        return self.conclude()

    def lacks_machine(self) -> str:
        """Why nothing can be measured; else the batch size is known."""
        self.start_process(self.machine, set(), min(self.machine.seconds, self.left()))
        facts = self.saved.step(self.machine.name)["items"].get("facts", {})
        if facts.get("status") != "done":
            return f"the machine cannot be looked at: {facts.get('note', 'out of time')}"
        if "batch" in facts:
            self.setting["batch"] = facts["batch"]
            if facts["batch"] < BATCH and not self.rehearsal:
                print(f"batch {facts['batch']}: the memory is too small for {BATCH}")
        return facts.get("refused", "")

    def left(self) -> float:
        return self.end - time.monotonic()

    def run_step(self, step: Step) -> None:
        """All that is left of a step, in as many processes as it takes."""
        self.display.step(step.name)
        end = time.monotonic() + step.seconds
        tried: set[str] = set()
        for _ in range(STARTS):
            seconds = min(end - time.monotonic(), self.left())
            if self.saved.is_settled(step.name) or seconds < LEAST:
                break
            known = self.saved.step(step.name)
            known["complete"] = False
            before = {key: row["attempts"] for key, row in known["items"].items()}
            broken = self.start_process(step, tried, seconds)
            now = self.saved.step(step.name)["items"].items()
            tried |= {key for key, row in now if row["attempts"] > before.get(key, 0)}
            if not broken:
                break
        self.collect_helpers()

    def start_process(self, step: Step, tried: set[str], seconds: float) -> bool:
        """Run a step's process for at most ``seconds``; whether an item broke it."""
        request = {
            "step": step.name, "module": step.module, "argument": step.argument,
            "skip": sorted(tried | (self.saved.settled(step.name) - {"facts"})),
            "last": sorted(self.saved.step(step.name)["items"]), "setting": self.setting,
            "part": str(self.saved.part),
            "log": str(self.log),
            "seconds": seconds - min(GRACE, seconds / 3),
        }  # fmt: skip
        self.saved.drop_part()
        start = time.monotonic()
        process = self.forks.Process(target=child.main, args=(request,))
        process.start()
        try:
            status = self.wait(process, start + seconds, seconds / 2)
        finally:
            kill(process.pid)
            process.join()
            said = self.saved.take_part()
            record = self.saved.step(step.name)
            record["seconds"] = round(record["seconds"] + time.monotonic() - start, 1)
            if said.get("items"):
                record["items"].pop(child.START, None)
            self.saved.write()
        running = said.get("running", child.START)
        if status == 0 or not running:  # ended, lost CUDA and said so, or out of time between items
            return status not in (0, None)
        row = {"status": "hung", "note": f"ended after {time.monotonic() - start:.0f} s"}
        if status is not None:
            row = {"status": "died", "note": f"the process ended with status {status}"}
        self.saved.put(step.name, running, row)
        self.saved.write()
        print(f"{step.name}: {running}: {row['status']}, {row['note']}", flush=True)
        return running != child.START

    def wait(self, process: BaseProcess, end: float, longest: float) -> int | None:
        """The process's status; None where it does not end in time, or an item takes longer."""
        item, began = "", time.monotonic()
        while (now := time.monotonic()) < end:
            process.join(POLL)
            if process.exitcode is not None:
                return process.exitcode
            running = self.saved.take_part().get("running", "")
            if running != item:
                item, began = running, now
                self.display.item(item)
            if item not in ("", child.START) and now - began > longest:
                return None
        return None

    def start_helpers(self) -> None:
        """What compiles meanwhile, by processes that give way to the steps."""
        from cvkernels.demo import NETWORKS

        batch = self.setting["batch"]
        wanted = background(tuple(NETWORKS), (batch, 1))
        if self.rehearsal:  # one of each kind, and two cores
            wanted = [next(w for w in wanted if w[0] == kind) for kind, *_ in wanted[-3:]]
        if all(self.saved.is_settled(step.name) for step in self.steps):
            return
        rehearsal = "yes" if self.rehearsal else "no"
        for arguments in wanted:
            module = (f"{PACKAGE}.compile_ahead", *arguments, rehearsal)
            self.helpers.append(helper(module))

    def collect_helpers(self) -> None:
        """Keep what the ended ones say."""
        for ended in [process for process in self.helpers if process.poll() is not None]:
            self.helpers.remove(ended)
            out, _ = ended.communicate()
            with contextlib.suppress(ValueError, IndexError):
                said = json.loads(out.decode().splitlines()[-1])
                self.saved.content.setdefault("compiled ahead", []).append(said)
                self.saved.write()

    def end_helpers(self) -> None:
        self.collect_helpers()
        for process in self.helpers:
            kill(process.pid)
            process.wait()

    def conclude(self) -> int:
        """Print what there is; the status is 1 where something failed."""
        failed = []
        for step in self.steps:
            record = self.saved.step(step.name)
            items = record["items"]
            failed += [f"{step.name}: {key}" for key, row in items.items() if wrong(row)]
            done = sum(row["status"] == "done" for row in items.values())
            note = "" if record["complete"] else ", not complete"
            print(f"{step.name:<28} {done} of {len(items)} items{note}, {record['seconds']:.0f} s")
        self.saved.write()
        for name in failed:
            print(f"failed: {name}", file=sys.stderr)
        print(f"{self.saved.path}, {time.monotonic() - self.start:.0f} s")
        return 1 if failed else 0


def wrong(row: dict[str, Any]) -> bool:
    return row["status"] not in ("done", "unavailable")


def set_environment(rehearsal: bool) -> None:
    """Of every process: caches that are kept from one to the next."""
    caches = Path(tempfile.gettempdir()) / "cvkernels-first-light-caches"
    os.environ["TRITON_CACHE_DIR"] = str(caches / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(caches / "inductor")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    os.environ["PYTHONPATH"] = path
    if rehearsal:
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


def helper(module: Sequence[str]) -> subprocess.Popen:
    """``python -m module``, which gives way to others and ends when this process does."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.nice(10)

    return subprocess.Popen(
        (sys.executable, "-m", *module),
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=prepare,
    )  # fmt: skip


def kill(pid: int | None) -> None:
    """End a process and what it started."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError, TypeError):
            end(pid, signal.SIGKILL)
