"""Steps that measure nothing, and a run of them: ``python -m tests.support.first_light_steps``.

Its arguments are the folder, the seconds, and the steps as "name:seconds". Items write their names
into ``executed`` in the folder that the environment names.
"""

import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.first_light import runner
from benchmarks.first_light.steps import Step
from benchmarks.harness.sticky import ContextLost

HERE = "tests.support.first_light_steps"


def noted(name, then=lambda: None):
    def item():
        with open(Path(os.environ["FIRST_LIGHT_TEST"]) / "executed", "a") as file:
            file.write(f"{name}\n")
        time.sleep(0.05)
        then()
        return {"value": name}

    return name, item


def fail():
    raise ValueError("no such\nthing")


def lose():
    raise ContextLost("CUDA is lost to this process")


def items(setting, kind):
    if kind == "machine":
        yield "facts", lambda: {"batch": 2}
    elif kind == "refused":
        yield "facts", lambda: {"refused": "there is no such machine"}
    elif kind == "hangs":
        yield from (noted("before"), noted("hanging", lambda: time.sleep(60)), noted("after"))
    elif kind == "dies":
        yield from (noted("dying", lambda: os._exit(3)), noted("left"))
    elif kind == "loses":
        yield from (noted("losing", lose), noted("rest"))
    elif kind == "fails":
        yield from (noted("failing", fail), noted("fine"))
    elif kind == "slow":
        yield from (noted(f"slow {index}", lambda: time.sleep(0.5)) for index in range(8))
    else:
        yield from (noted(f"{kind} {index}") for index in range(8))


class Run(runner.Run):
    machine = Step("machine", HERE, 30, "machine")

    def start_helpers(self):
        pass


def run(folder, seconds, *chosen):
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runner.LEAST = 0.2
    os.environ["FIRST_LIGHT_TEST"] = str(folder)
    steps = []
    for one in chosen:
        name, _, limit = one.partition(":")
        if name == "refused":
            Run.machine = Step("machine", HERE, 30, "refused")
        steps.append(Step(name, HERE, float(limit or 30), name))
    return Run(Path(folder), float(seconds), True, steps, ()).main()


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
