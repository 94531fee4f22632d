"""``python -m benchmarks``: measure kernels, networks and training, plot, and guard.

python -m benchmarks kernels [--op NAME] [--case NAME] [--batch N] [--dtype NAME] [--json FILE]
python -m benchmarks models [--network NAME] [--batch N] ...
python -m benchmarks training [--network NAME] [--batch N] ...
python -m benchmarks --all      everything that this machine can run, into benchmarks/results/
python -m benchmarks memory     what autograd keeps of a training pass, counted without computing
python -m benchmarks plots      the plots of benchmarks/results/, as SVG beside the figures
python -m benchmarks readme     the tables of README.md and of benchmarks/results/*/README.md
python -m benchmarks guard      speed-ups of the kernels against the committed ones
python -m benchmarks tune       the fastest tiles on this GPU, into cvkernels/tuned/
python -m benchmarks predict    times of the frozen networks on an H200, by a model
python -m benchmarks launches   their Triton kernels, compiled for three GPUs
python -m benchmarks depth      why the five networks are built as they are, on digits
python -m benchmarks first_light   what matters most of a GPU, in nine minutes
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks import (
    bench_models,
    bench_training,
    everything,
    kernels,
    launches,
    predict,
    saved_memory,
    tune,
)
from benchmarks.depth import runner as depth
from benchmarks.first_light import runner
from benchmarks.harness import command_line, sticky
from benchmarks.harness.command_line import Refused, add_network_options, add_options, dtypes_of
from benchmarks.harness.environment import default_batch
from benchmarks.harness.sticky import ContextLost
from benchmarks.output import guard, readme, results

NETWORKS = {"models": bench_models, "training": bench_training}


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
    except ContextLost as error:
        print(f"error: {error}; go on in a new process", file=sys.stderr)
        return sticky.STATUS


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
    command.add_argument("--case", action="append", help="a case's name, or a pattern: 'layer4*'")
    command.add_argument(
        "--batch", type=command_line.count, help="images; default: 16 on CPU, 128 on a GPU"
    )
    command.add_argument("--quick", action="store_true", help="fewer cases and fewer rounds")
    add_options(command)

    for name, module in NETWORKS.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        add_network_options(command, module.NETWORKS)
        if module is bench_training:
            command.add_argument(
                "--compile", action="store_true", help="steps of torch.compile too: minutes more"
            )
        add_options(command, quantised=module is bench_models)

    command = commands.add_parser("all", help="everything that this machine can run; also --all")
    everything.add_options(command)
    command = commands.add_parser("plots", help="plots of the results, as SVG beside them")
    command.add_argument("folder", nargs="*", type=Path, help="default: all of benchmarks/results")
    commands.add_parser("readme", help="the tables of the README and of each machine's")
    commands.add_parser("memory", help="what autograd keeps of a training pass")
    command = commands.add_parser("guard", help="the kernels' speed-ups against committed ones")
    guard.add_options(command)
    command = commands.add_parser("tune", help="the fastest backend and tile on this GPU")
    tune.add_options(command)
    command = commands.add_parser("predict", help="times of the frozen networks, by a model")
    predict.add_options(command)
    command = commands.add_parser("launches", help="the frozen networks' Triton kernels, compiled")
    launches.add_options(command)
    command = commands.add_parser("depth", help="why the networks are built so, on digits")
    depth.add_options(command)
    command = commands.add_parser("first_light", help="what matters most of a GPU, in nine minutes")
    runner.add_options(command)
    return parser


def _kernels(options: argparse.Namespace) -> int:
    batch = options.batch or default_batch(options.device)
    kinds = {"quick": options.quick, "compiled": options.compiled}
    cases = kernels.cases(options.device, dtypes_of(options), batch, options.op, **kinds)
    return command_line.measure(command_line.chosen(cases, options.case), options)


def _networks(options: argparse.Namespace) -> int:
    module = NETWORKS[options.command]
    batches = options.batch or module.BATCHES[options.device.type]
    networks = options.network or module.NETWORKS
    more = {"compiles": True} if getattr(options, "compile", False) else {}
    cases = module.cases(options.device, dtypes_of(options), batches, networks, **more)
    return command_line.measure(cases, options)


def _plots(options: argparse.Namespace) -> int:
    from benchmarks.output import plots

    folders = options.folder or results.machine_folders()
    for path in (path for folder in folders for path in plots.draw(folder)):
        print(path)
    return 0


def _readme(options: argparse.Namespace) -> int:
    readme.write()
    return 0


def _memory(options: argparse.Namespace) -> int:
    print(saved_memory.table())
    return 0


_COMMANDS = {
    "kernels": _kernels,
    **dict.fromkeys(NETWORKS, _networks),
    "all": everything.main,
    "plots": _plots,
    "readme": _readme,
    "memory": _memory,
    "guard": guard.main,
    "tune": tune.main,
    "predict": predict.main,
    "launches": launches.main,
    "depth": depth.main,
    "first_light": runner.main,
}


if __name__ == "__main__":
    # Termination is an interrupt: what was measured is kept, and no part of --all goes on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
