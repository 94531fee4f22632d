"""The command line: ``python -m cvkernels`` with ``info``, ``verify NAME``, ``explain NAME``,
``profile NAME``, ``classify IMAGES`` or ``demo``; ``--help`` after each has its options.

The exit status is 0, or 1 where ``verify`` finds an error too large or ``classify`` leaves images
out, 2 after an error, which is one line, and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

import cvkernels
from cvkernels.tables import first_line, terminal_columns

# What a shell reports for a process that SIGINT or SIGPIPE ends.
INTERRUPTED, BROKEN_PIPE = 130, 141
# Packages whose name is not that of the module.
PACKAGES = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}


class Parser(argparse.ArgumentParser):
    """Its errors are one line, with the option that was meant where one is near."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        _, unrecognised, words = message.partition("unrecognized arguments: ")
        if unrecognised:
            wrong = words.split()[0].partition("=")[0]
            near = difflib.get_close_matches(wrong, _options_of(self), n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message} (--help lists what there is)\n")


def _options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Of the parser and of its commands."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            found += [o for command in action.choices.values() for o in _options_of(command)]
    return found


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status = _COMMANDS[options.command](options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever reads has seen enough; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, ImportError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {_in_one_line(error)}", file=sys.stderr)
        return 2


def _in_one_line(error: Exception) -> str:
    """With the lines below a heading, where it is one; a missing package with its command."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"{package} is not installed: pip install {PACKAGES.get(package, package)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or not lines[0].endswith(":"):
        return first_line(error)
    return " ".join(lines[:3]) + (f" (and {len(lines) - 3} more)" if len(lines) > 3 else "")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m cvkernels", description=(cvkernels.__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("info", help="versions, devices, what is missing and what mends it")
    for name, purpose in (
        ("verify", "errors of every layer against float64, next to stock PyTorch's"),
        ("explain", "which kernel runs where, bytes moved, and why not where not"),
        ("profile", "the measured time of each step of the frozen network"),
    ):
        _add_of_network(name, commands.add_parser(name, help=purpose))
    _add_classify(commands.add_parser("classify", help="the classes of image files"))
    _add_demo(commands.add_parser("demo", help="stock and ours on photographs, side by side"))
    return parser


def _add_of_network(name: str, command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("name", help="such as resnet50, torchvision/resnet50 or timm/resnet50")
    add("--batch", type=_positive, default=2)
    add("--size", type=_positive, default=224, help="pixels a side")
    add("--dtype", choices=list(_DTYPES), default="float32")
    devices = ["cpu", "cuda"] + ["meta"] * (name == "explain")
    add("--device", choices=devices, default=_default_device())
    if name == "explain":
        frozen = "what freeze makes of it; for cuda without a GPU, the plan that one would get"
        add("--frozen", action="store_true", help=frozen)
    if name == "profile":
        add("--runs", type=_positive, default=20, help="of which times are medians")
        add("--json", type=Path, metavar="FILE", help="write the rows too")
        add("--plot", type=Path, metavar="FILE", help="write a picture too (.svg, .png, .pdf)")


def _add_classify(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, folders and patterns")
    names = "of cvkernels, torchvision or timm, the first that has it; default: %(default)s"
    add("--model", default="tf_efficientnet_lite0", metavar="NAME", help=names)
    weights = (
        "a checkpoint, or a name such as DEFAULT (downloads); the default model's are a package"
    )
    add("--weights", metavar="W", help=weights)
    add("--classes", type=Path, metavar="FILE", help="a class's name on each line")
    add("--precision", choices=["fp32", "bf16", "int8"], default="fp32")
    add("--calibration", metavar="FOLDER", help="images for int8; default: those of IMAGES")
    decibels = "that int8 keeps on them; less is ready sooner; default: %(default)s"
    add("--tolerance", type=float, default=30.0, metavar="DB", help=decibels)
    add("--top", type=_positive, default=5, help="classes of each image; default: %(default)s")
    add("--size", type=_positive, help="pixels a side; default: what the weights were trained on")
    add("--batch", type=_positive, default=16)
    add("--device", choices=["cpu", "cuda"], default=_default_device())
    add("--csv", type=Path, metavar="FILE", help="instead of a table; - is standard output")
    add("--jsonl", type=Path, metavar="FILE", help="JSON lines; - is standard output")


def _add_demo(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("photos", nargs="*", help="image files; default: scikit-image's and scikit-learn's")
    add("--part", action="append", choices=["photographs", "networks"], help="default: both")
    add("--network", action="append", help="of the five, repeatable; default: all")
    add("--weights", help="of the five: a name such as DEFAULT (downloads), or a checkpoint")
    add("--device", choices=["cpu", "cuda"], default=_default_device())
    add("--json", type=Path, metavar="FILE", help="write the rows too")
    add("--plot", type=Path, metavar="FILE", help="write a picture of the photographs' part")
    add("--runs", type=_positive, default=20, help="timed runs of each of the five, at most")


def _info(options: argparse.Namespace) -> int:
    print(cvkernels.info())
    return 0


def _verify(options: argparse.Namespace) -> int:
    verification = cvkernels.verify(*_model_and_example(options))
    print(verification)
    return 0 if verification.ok else 1


def _explain(options: argparse.Namespace) -> int:
    if options.frozen and options.device == "cuda" and not torch.cuda.is_available():
        options.device = "meta"
    print(cvkernels.explain(*_model_and_example(options), frozen=options.frozen))
    return 0


def _profile(options: argparse.Namespace) -> int:
    if options.plot is not None:
        from cvkernels.plots import require_matplotlib

        require_matplotlib()
    profile = cvkernels.profile(*_model_and_example(options), runs=options.runs)
    print(profile.table(min(terminal_columns() or 100, 100)))
    if options.json is not None:
        options.json.write_text(json.dumps(profile.as_dict(), indent=1) + "\n")
    if options.plot is not None:
        profile.plot(options.plot)
    return 0


def _classify(options: argparse.Namespace) -> int:
    from cvkernels.classify import classify

    return classify(options)


def _demo(options: argparse.Namespace) -> int:
    from cvkernels.demo import NETWORKS, check_networks, demo
    from cvkernels.plots import require_matplotlib
    from cvkernels.recognise import recognise

    networks = options.network or tuple(NETWORKS)
    check_networks(networks)
    if options.plot is not None:
        require_matplotlib()
    parts: Sequence[str] = options.part or ("photographs", "networks")
    columns = min(terminal_columns() or 100, 100)
    found: dict[str, Any] = {}
    if "photographs" in parts:
        with _timed("photographs"):
            recognition = recognise(options.photos, device=options.device)
            print(recognition.table(columns))
        found["photographs"] = recognition.as_dict()
        if options.plot is not None:
            recognition.plot(options.plot)
    if "networks" in parts:
        with _timed("networks"):
            table = demo(
                options.photos, networks=networks, weights=options.weights,
                device=options.device, runs=options.runs,
            )  # fmt: skip
            print(table.table(columns))
        found |= table.as_dict()
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


@contextmanager
def _timed(part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"({part}: {time.perf_counter() - start:.0f} s)\n", flush=True)


_COMMANDS = {
    "info": _info, "verify": _verify, "explain": _explain, "profile": _profile,
    "classify": _classify, "demo": _demo,
}  # fmt: skip
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _model_and_example(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    from cvkernels.trained import build

    torch.manual_seed(0)
    dtype = _DTYPES[options.dtype]
    with torch.device(options.device):
        model = build(options.name).to(dtype)
        example = torch.randn(options.batch, 3, options.size, options.size).to(dtype)
    return model, example


if __name__ == "__main__":
    # Names of files may hold what the terminal's encoding does not.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
