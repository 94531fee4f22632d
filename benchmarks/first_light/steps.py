"""The steps of first_light in the order of their value, each with its seconds."""

from __future__ import annotations

from typing import NamedTuple

PACKAGE = "benchmarks.first_light"
FAMILIES = (
    "conv_bn_act", "depthwise_conv_bn_act", "squeeze_excite", "batch_norm_act", "max_pool",
    "avg_pool", "dense_concat",
)  # fmt: skip


class Step(NamedTuple):
    """``items(setting, argument)`` of a module, which are to be measured within ``seconds``."""

    name: str
    module: str
    seconds: float
    argument: str = ""


# Imported once, by the process that the steps' processes are forks of.
PRELOADED = tuple(
    f"{PACKAGE}.{name}"
    for name in "child facts rates right networks plans convolutions large_kernels peers counters "
    "".split()
)
MACHINE = Step("machine", f"{PACKAGE}.facts", 60)


def steps() -> list[Step]:
    made = [Step("rates", f"{PACKAGE}.rates", 40)]
    made += [Step(f"right-{op}", f"{PACKAGE}.right", 40, op) for op in FAMILIES]
    made.append(Step("right-networks", f"{PACKAGE}.right", 60, "networks"))
    made.append(Step("networks", f"{PACKAGE}.networks", 140))
    made.append(Step("plans", f"{PACKAGE}.plans", 90))
    made.append(Step("convolutions", f"{PACKAGE}.convolutions", 100))
    made.append(Step("kernels", f"{PACKAGE}.large_kernels", 60))
    made.append(Step("peers", f"{PACKAGE}.peers", 100))
    made.append(Step("counters", f"{PACKAGE}.counters", 60, "ncu"))
    made.append(Step("memcheck", f"{PACKAGE}.counters", 90, "memcheck"))
    return made


def background(networks: tuple[str, ...], batches: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Arguments of the processes that compile meanwhile."""
    frozen = [("plan", name, str(batch)) for batch in batches for name in networks]
    return [*frozen, ("convolutions", "", str(batches[0])), ("inductor", "", str(batches[0]))]
