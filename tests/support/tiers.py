"""Which tests run: those of the default tier, all (--full), or those marked fast (-m fast).

The default tier has every test function but those marked full. Of one with many combinations of
parameters it runs those that cover pairs of values, at most MOST of them, or ``few(count)``: a
fault that needs three values at once is left to the full tier. ``few(count, together=True)`` takes
the same parameters in each function of a module, where it is making ready for them that takes long.

Functions marked pairwise have, in every tier, only the combinations that cover pairs of values: of
parameters that do not meet in the code, three at once find what two do.
"""

from __future__ import annotations

import itertools
import os
import random
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

MOST = 7  # combinations of one function's parameters

Combination = dict[str, Hashable]


def covering(
    combinations: Sequence[Combination], seed: int = 0, most: int | None = None
) -> set[int]:
    """The places of combinations that have, together, each pair of values of two parameters; at
    most so many of them."""
    order = list(range(len(combinations)))
    random.Random(seed).shuffle(order)
    seen: set[tuple] = set()
    chosen = set()
    for place in order:
        if len(chosen) == most:
            break
        values = sorted(combinations[place].items(), key=lambda item: item[0])
        pairs = set(itertools.combinations(values, min(2, len(values))))
        if not pairs <= seen:
            seen |= pairs
            chosen.add(place)
    return chosen


def parameters_of(cases: Iterable) -> list[Combination]:
    """Of each case; a value is one object in all combinations, and need not be hashable."""
    return [{key: id(v) for key, v in case.callspec.params.items()} for case in cases]


def beyond_pairs(items: Iterable) -> set:
    """The items that no tier runs, of functions marked pairwise."""
    functions = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairwise"):
            functions[item.nodeid.partition("[")[0]].append(item)
    out = set()
    for name, cases in functions.items():
        chosen = covering(parameters_of(cases), zlib.crc32(name.encode()))
        out |= {case for place, case in enumerate(cases) if place not in chosen}
    return out


def left_out(items: Iterable) -> set:
    """The items that only the full tier runs."""
    functions, out = defaultdict(list), set()
    for item in items:
        if item.get_closest_marker("full"):
            out.add(item)
        elif hasattr(item, "callspec"):
            functions[item.nodeid.partition("[")[0]].append(item)
    modules = defaultdict(list)
    for name, cases in functions.items():
        few = cases[0].get_closest_marker("few")
        if few and few.kwargs.get("together"):
            modules[name.partition("::")[0], few.args[0]] += cases
        elif few or len(cases) > MOST:
            most = few.args[0] if few else MOST
            chosen = covering(parameters_of(cases), zlib.crc32(name.encode()), most)
            out |= {case for place, case in enumerate(cases) if place not in chosen}
    for (_, count), cases in modules.items():
        names = sorted({case.callspec.id for case in cases}, key=lambda n: zlib.crc32(n.encode()))
        out |= {case for case in cases if case.callspec.id not in names[:count]}
    return out


def longest_first(items: Sequence) -> list:
    """The items with those marked long at the beginning of each process' share, which is as many
    neighbouring ones as each other's: the last to run are short, and no process waits long."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    order, size = [], -(-len(items) // processes)
    for process in range(processes):
        own = long[process::processes]
        rest = max(0, size - len(own))
        order += own + others[:rest]
        others = others[rest:]
    return order + others


def asked(request, parameter: str) -> list:
    """The values of the parameter that the requesting module's tests run with, in their order."""
    values = [
        item.callspec.params[parameter]
        for item in request.session.items
        if item.module is request.module
        and hasattr(item, "callspec")
        and parameter in item.callspec.params
    ]
    return list({id(value): value for value in values}.values())


def use_all_cores(config) -> None:
    """Run one process of one thread on each core, where the command line names folders alone and
    sets neither --numprocesses nor --dist."""
    option = config.option
    if not hasattr(option, "numprocesses") or hasattr(
        config, "workerinput"
    ):  # no xdist, or one of its processes
        return
    told = option.numprocesses is not None or option.dist != "no"
    folders = all(os.path.isdir(argument) for argument in config.args)
    if told or option.usepdb or option.collectonly or not folders:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes
    option.numprocesses, option.dist = usable_cores(), "worksteal"


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
