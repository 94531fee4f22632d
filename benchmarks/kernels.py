"""The cases of every op: those of all ``benchmarks/bench_<op>.py`` but the networks'."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness.case import Case

NETWORKS = {"models", "training"}


def ops() -> list[str]:
    stems = (path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return sorted({stem.removeprefix("bench_") for stem in stems} - NETWORKS)


def cases(
    device: torch.device,
    dtypes: list[torch.dtype],
    batch: int,
    chosen: Sequence[str] | None = None,
    quick: bool = False,
    compiled: str = "all",
) -> list[Case]:
    """The cases of the chosen ops, or of all.

    quick: those that each op calls its quick ones.
    compiled: the cases with torch.compile as a peer: "all", the "few" quick ones, or "none".
    """
    made = []
    for op in chosen or ops():
        make = functools.partial(
            importlib.import_module(f"benchmarks.bench_{op}").cases, device, dtypes, batch
        )
        few = {(case.op, case.id) for case in make(quick=True)} if compiled == "few" else set()
        for case in make(quick=quick):
            keep = compiled == "all" or (case.op, case.id) in few
            made.append(case if keep else _without_compile(case))
    return made


def _without_compile(case: Case) -> Case:
    variants = {name: make for name, make in case.variants.items() if name != "compile"}
    return replace(case, variants=variants)
