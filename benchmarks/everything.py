"""``python -m benchmarks --all``: every benchmark in turn, each in a process of its own.

The parts write into ``results/<machine>.partial/``; when all are there, that folder takes the place
of ``results/<machine>/`` whole (notes in Markdown stay), and the README's tables and the plots are
made anew. After Ctrl-C what was measured stays in the partial folder, and ``--resume`` goes on.
A part ends by itself when its minutes are spent, and says which rows it did not reach.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import kernels
from benchmarks.harness import sticky
from benchmarks.harness.command_line import Refused
from benchmarks.harness.environment import ROOT, default_device
from benchmarks.output import readme, results
from cvkernels.demo import NETWORKS

# Minutes that a run takes at most, and a part of it before it is stopped.
TOTAL = {"cpu": 60.0, "cuda": 20.0}
PART = 8.0
GRACE = 60  # seconds, to write what was measured
# Of kernels' parts: ops with many shapes, and of each other one.
KERNEL_MINUTES = {"conv_bn_act": 3.0, "depthwise_conv_bn_act": 3.0, "squeeze_excite": 2.0}
FEW_KERNEL_MINUTES = 1.0
STOPS = (signal.SIGINT, signal.SIGTERM)
OUT_OF_TIME = 124  # status of a part that was stopped


class Part(NamedTuple):
    """``python -m <arguments>``, which writes ``<name>.json`` and is to end within ``minutes``."""

    name: str
    arguments: tuple[str, ...]
    minutes: float


def parts(device: str) -> list[Part]:
    """What there is to measure on a "cpu" or "cuda", what matters most first."""
    cpu = device == "cpu"

    def of_networks(kind: str, seconds: str, minutes: float) -> list[Part]:
        options = ("--seconds", seconds)
        return [_part(kind, n, ("--network", n, *options), minutes) for n in NETWORKS]

    made = of_networks("models", *(("12", 4) if cpu else ("4", 1.5)))
    made += of_networks("training", *(("15", 1.2) if cpu else ("4", 0.8)))
    depths = ("--network", "densenet169", "--network", "densenet201")
    made.append(_part("training", "depths", depths, 1))
    for op in kernels.ops():
        options = ("--op", op, "--compiled", "few", "--seconds", "0.5" if cpu else "0.2")
        minutes = KERNEL_MINUTES.get(op, FEW_KERNEL_MINUTES)
        made.append(_part("kernels", op, options, minutes if cpu else minutes / 2))
    if cpu:
        options = ("--dtype", "bf16", "--seconds", "12")
        made += [_part("models", f"bf16-{n}", ("--network", n, *options), 3) for n in NETWORKS]
        options = ("--dtype", "int8", "--seconds", "12")
        for name in NETWORKS:
            of_network = ("benchmarks", "models", "--network", name, *options)
            made.append(Part(f"int8-{name}", of_network, 2))
        for op in kernels.ops():
            options = ("--op", op, "--dtype", "bf16", "--compiled", "none", "--seconds", "0.3")
            minutes = KERNEL_MINUTES.get(op, FEW_KERNEL_MINUTES) / 2
            made.append(_part("kernels", f"bf16-{op}", options, minutes))
    runs = ("cvkernels", "demo", "--part", "networks", "--runs", "9", "--device", device)
    return [*made, Part("demo", runs, 2)]


def _part(kind: str, name: str, options: tuple[str, ...], minutes: float) -> Part:
    return Part(f"{kind}-{name}", ("benchmarks", kind, *options), minutes)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="measure only what is missing")
    parser.add_argument(
        "--part", action="append", metavar="NAME", help="only these, of a run to be resumed"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--machine", help="the folder's name; default: the processor's")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="where it lies")


def main(options: argparse.Namespace) -> int:
    device = default_device()
    planned = parts(device.type)
    if options.list:
        for part in planned:
            print(f"{part.name:<36} {part.minutes:g} min  python -m {' '.join(part.arguments)}")
        return 0
    unknown = set(options.part or ()) - {part.name for part in planned}
    if unknown:
        raise Refused(f"no part is named {', '.join(sorted(unknown))}; --list prints the names")
    if device.type == "cpu":
        print("torch finds no CUDA device: the CPU is measured", file=sys.stderr)
    machine = options.machine or results.machine_name(device)
    partial = options.results / f"{machine}.partial"
    keep = options.resume or options.part is not None
    prepare(partial, keep)
    chosen = [part for part in planned if not options.part or part.name in options.part]
    try:
        failed = run_parts(chosen, partial, 60 * TOTAL[device.type], run_process)
    except KeyboardInterrupt:
        print(f"interrupted: {partial} holds what was measured; go on with --all --resume")
        return 130
    missing = [part.name for part in planned if not is_complete(partial, part)]
    if missing:
        print(f"not measured yet: {', '.join(missing)}; {partial} holds the rest (--all --resume)")
        return 1 if failed else 0
    folder = replace_whole(options.results / machine, partial)
    _draw(folder)
    if options.results == results.RESULTS:
        readme.write()  # after the plots, which it shows
    print(f"measured: {folder}")
    return 1 if failed else 0


def prepare(partial: Path, keep: bool) -> None:
    """An empty folder, or with ``keep`` what there is; refused now if nothing can be written."""
    try:
        if partial.exists() and not keep:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        probe = partial / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise Refused(f"cannot write results to {partial}: {error.strerror}") from error


def run_parts(
    chosen: Sequence[Part],
    partial: Path,
    seconds: float,
    run: Callable[[Sequence[str], float], int],
) -> list[str]:
    """Run those that are not complete, ``seconds`` in all; the names of those that went wrong."""
    end = time.monotonic() + seconds
    failed = []
    for index, part in enumerate(chosen):
        if is_complete(partial, part):
            continue
        left = (end - time.monotonic()) / 60
        if left <= 0:
            print(f"{seconds / 60:g} minutes are spent before {part.name}", file=sys.stderr)
            break
        minutes = min(part.minutes, left)
        path = partial / f"{part.name}.json"
        limit = () if part.arguments[0] == "cvkernels" else ("--minutes", f"{minutes:.2f}")
        command = (sys.executable, "-m", *part.arguments, *limit, "--json", str(path))
        print(f"[{index + 1}/{len(chosen)}] {part.name}", file=sys.stderr, flush=True)
        status = run(command, 60 * PART)
        if status == sticky.STATUS:  # the cases after the one that broke CUDA
            status = run((*command, "--go-on"), 60 * PART)
        if status == 130:
            raise KeyboardInterrupt
        if status == OUT_OF_TIME and path.exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "out_of_time": True}))
        if status != 0:
            failed.append(part.name)
            print(f"{part.name} ended with status {status}", file=sys.stderr)
    return failed


def run_process(command: Sequence[str], seconds: float) -> int:
    """The command's status. Ctrl-C and the end of the time reach it as an interrupt, which it obeys
    by writing what it has; it is 124 for the time."""

    # In a session of its own, so that the terminal does not interrupt it a second time; and obeying
    # interrupts where this process, in a shell's background, ignores them.
    def obey() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    # Not between the start of the process and the moment that this one knows it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=obey)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        raise
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        _interrupt(process)
        return OUT_OF_TIME
    except KeyboardInterrupt:
        _interrupt(process)
        raise


def _interrupt(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def is_complete(folder: Path, part: Part) -> bool:
    """Whether the part ran to its end; one that its time ended counts, with the rows it has."""
    path = folder / f"{part.name}.json"
    if not path.exists():
        return False
    content = json.loads(path.read_text())
    return content.get("complete", True) or content.get("out_of_time", False)


def replace_whole(folder: Path, partial: Path) -> Path:
    """``partial`` in ``folder``'s place; notes in Markdown stay."""
    if folder.exists():
        for notes in folder.glob("*.md"):
            shutil.copy2(notes, partial)
        shutil.rmtree(folder)
    return partial.rename(folder)


def _draw(folder: Path) -> None:
    try:
        from benchmarks.output import plots
    except ImportError as error:
        print(f"no plots: {error.name} is missing; pip install 'cvkernels[bench]'", file=sys.stderr)
        return
    plots.draw(folder)
