"""What triton_inspect finds in the code of many cases, compiled once in a test run."""

import json
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.made_once import made_once, shared_folder

ROOT = Path(__file__).parents[2]
PROCESSES = 2


def compile_cases(op: str, cases: list) -> list[dict]:
    """Of dicts or dataclasses, in a process without TRITON_INTERPRET."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_inspect", op],
        input=json.dumps(cases, default=vars),
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compile_in_processes(op: str, cases: list) -> list[dict]:
    results = [None] * len(cases)
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = [slice(i, None, PROCESSES) for i in range(PROCESSES)]
        for part, found in zip(
            parts, pool.map(lambda part: compile_cases(op, cases[part]), parts), strict=True
        ):
            results[part] = found
    return results


def compiled_once(op: str, cases: list, factory: pytest.TempPathFactory) -> list[dict]:
    """The results of ``cases``; of several test processes, one compiles and the others wait."""
    which = zlib.crc32(json.dumps(cases, default=vars).encode())
    path = made_once(
        shared_folder(factory) / f"{op}-{which}.json",
        lambda part: part.write_text(json.dumps(compile_in_processes(op, cases))),
    )
    return json.loads(path.read_text())
