"""The command line: ``python -m cvkernels info | verify NAME | explain NAME | demo``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import cvkernels


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cvkernels", description=cvkernels.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, what is missing and what mends it")
    for name, purpose in (
        ("verify", "errors of every layer against float64, next to stock PyTorch's"),
        ("explain", "which kernel runs where, bytes moved, and why not where not"),
    ):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("name", help="a builder, such as resnet50")
        command.add_argument("--batch", type=_positive, default=2)
        command.add_argument("--size", type=_positive, default=224, help="pixels a side")
        command.add_argument("--dtype", choices=list(_DTYPES), default="float32")
        devices = ["cpu", "cuda"] + ["meta"] * (name == "explain")
        command.add_argument("--device", choices=devices, default=_default_device())
        if name == "explain":
            frozen = "what freeze makes of it; for cuda without a GPU, the plan that one would get"
            command.add_argument("--frozen", action="store_true", help=frozen)
    demo = commands.add_parser("demo", help="stock and ours on real photographs, side by side")
    demo.add_argument("photos", nargs="*", help="image files; default: those of scikit-learn")
    demo.add_argument("--network", action="append", help="of the five, repeatable; default: all")
    demo.add_argument("--weights", help="a name such as DEFAULT (downloads), or a checkpoint")
    demo.add_argument("--device", choices=["cpu", "cuda"], default=_default_device())
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the rows too")
    demo.add_argument("--runs", type=_positive, default=20, help="timed runs of each")
    options = parser.parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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


def _demo(options: argparse.Namespace) -> int:
    from cvkernels.demo import NETWORKS, demo

    table = demo(
        options.photos,
        networks=options.network or tuple(NETWORKS),
        weights=options.weights,
        device=options.device,
        runs=options.runs,
    )
    print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(table.as_dict(), indent=1) + "\n")
    return 0


_COMMANDS = {"info": _info, "verify": _verify, "explain": _explain, "demo": _demo}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _model_and_example(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    dtype = _DTYPES[options.dtype]
    with torch.device(options.device):
        model = cvkernels.create_model(options.name).eval().to(dtype)
        example = torch.randn(options.batch, 3, options.size, options.size).to(dtype)
    return model, example


if __name__ == "__main__":
    sys.exit(main())
