"""``python -m benchmarks``: measure kernels, networks and training, plot, and guard.

python -m benchmarks kernels [--op NAME] [--case NAME] [--batch N] [--dtype NAME] [--json FILE]
python -m benchmarks models [--network NAME] [--batch N] ...
python -m benchmarks training [--network NAME] [--batch N] ...
python -m benchmarks --all      everything that this machine can run, into benchmarks/results/
python -m benchmarks plots      the plots of benchmarks/results/, as SVG beside the figures
python -m benchmarks guard      speed-ups of the kernels against the committed ones
python -m benchmarks tune       the fastest tiles on this GPU, into cvkernels/tuned/
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks import bench_models, bench_training, everything, guard, kernels, results, tune
from benchmarks.command_line import (
    Refused,
    add_case_options,
    add_options,
    chosen,
    count,
    dtypes_of,
    measure,
)
from benchmarks.environment import default_batch

MODEL_BATCHES = {"cpu": (1, 16), "cuda": (1, 128)}
TRAINING_BATCHES = {"cpu": (8,), "cuda": (128,)}


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(["all" if word == "--all" else word for word in words])
    try:
        return _COMMANDS[options.command](options)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("kernels", help="microbenchmarks of the ops")
    command.add_argument("--op", action="append", choices=kernels.ops(), help="default: all")
    command.add_argument(
        "--compiled",
        choices=("all", "few", "none"),
        default="all",
        help="cases with torch.compile as a peer: seconds for each; few: the quick ones",
    )
    add_case_options(command)
    add_options(command)

    for name, module in (("models", bench_models), ("training", bench_training)):
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        networks = (*bench_models.NETWORKS, *(bench_training.DEPTHS[1:] * (name == "training")))
        command.add_argument("--network", action="append", choices=networks, help="default: all")
        command.add_argument("--batch", action="append", type=count, help="repeatable")
        add_options(command)

    command = commands.add_parser("all", help="everything that this machine can run; also --all")
    everything.add_options(command)
    command = commands.add_parser("plots", help="plots of the results, as SVG beside them")
    command.add_argument("folder", nargs="*", type=Path, help="default: all of benchmarks/results")
    command = commands.add_parser("guard", help="the kernels' speed-ups against committed ones")
    guard.add_options(command)
    command = commands.add_parser("tune", help="the fastest backend and tile on this GPU")
    tune.add_options(command)
    return parser


def _kernels(options: argparse.Namespace) -> int:
    batch = options.batch or default_batch(options.device)
    cases = kernels.cases(
        options.device,
        dtypes_of(options),
        batch,
        options.op,
        quick=options.quick,
        compiled=options.compiled,
    )
    return measure(chosen(cases, options.case), options)


def _models(options: argparse.Namespace) -> int:
    batches = options.batch or MODEL_BATCHES[options.device.type]
    networks = options.network or bench_models.NETWORKS
    return measure(
        bench_models.cases(options.device, dtypes_of(options), batches, networks), options
    )


def _training(options: argparse.Namespace) -> int:
    batches = options.batch or TRAINING_BATCHES[options.device.type]
    networks = options.network or (*bench_models.NETWORKS, *bench_training.DEPTHS[1:])
    return measure(
        bench_training.cases(options.device, dtypes_of(options), batches, networks), options
    )


def _plots(options: argparse.Namespace) -> int:
    from benchmarks import plots

    folders = options.folder or results.machine_folders()
    for path in (path for folder in folders for path in plots.draw(folder)):
        print(path)
    return 0


_COMMANDS = {
    "kernels": _kernels,
    "models": _models,
    "training": _training,
    "all": everything.main,
    "plots": _plots,
    "guard": guard.main,
    "tune": tune.main,
}


if __name__ == "__main__":
    # Who ends it gets what was measured, and no part of --all goes on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
