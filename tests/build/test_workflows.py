"""CI runs what the repository has: .ci/run, and the cells of .ci/matrix that users have."""

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.source_builds import ROOT

yaml = pytest.importorskip("yaml")

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def loaded(path):
    return yaml.safe_load(path.read_text())


def commands_of(workflow):
    return [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]


@pytest.fixture(scope="module")
def matrix():
    loader = importlib.machinery.SourceFileLoader("ci_matrix", str(ROOT / ".ci/matrix"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("ci_matrix", loader))
    sys.modules["ci_matrix"] = module
    loader.exec_module(module)
    yield module
    del sys.modules["ci_matrix"]


@pytest.fixture(scope="module")
def ci():
    return loaded(ROOT / ".github/workflows/ci.yml")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_each_workflow_names_its_jobs_machines_and_steps(path):
    workflow = loaded(path)
    assert True in workflow  # YAML 1.1 reads the key "on" so
    for job in workflow["jobs"].values():
        assert job["runs-on"] and all("run" in step or "uses" in step for step in job["steps"])


def test_ci_runs_what_contributors_run(ci):
    assert ".ci/run" in commands_of(ci)


def test_the_documents_are_built_by_one_script(ci):
    assert ".ci/docs python site" in commands_of(ci)
    assert '.ci/docs .venv/bin/python "$scratch/site"' in (ROOT / ".ci/run").read_text()
    script = (ROOT / ".ci/docs").read_text()
    assert "mkdocs build --strict -f docs/mkdocs.yml" in script and "tests/docs" in script


def test_ci_runs_cells_of_the_matrix(ci, matrix):
    (command,) = [run for run in commands_of(ci) if run.startswith(".ci/matrix")]
    axes = dict(ci["jobs"]["matrix"]["strategy"]["matrix"])
    skipped = [(entry["python"], entry["torch"]) for entry in axes["exclude"]]
    included = axes["include"]
    for name in ("python", "torch", "build"):
        command = command.replace(f"${{{{ matrix.{name} }}}}", ",".join(axes[name]))
    cell = command.split()[-1]
    cells = [c for c in matrix.cells_of([cell]) if (c.python, c.torch) not in skipped]
    assert {c.wheel for c in cells} == {"compiled", "pure"}
    assert {c.build for c in cells} == {"cpu", "cuda"}
    for extra in included:
        assert matrix.cells_of(
            ["/".join((extra["python"], extra["torch"], extra["build"], "pure"))]
        )


def test_all_say_the_same_pythons_and_the_oldest_torch(ci):
    axes = ci["jobs"]["matrix"]["strategy"]["matrix"]
    pythons = axes["python"]
    assert pythons == ci["jobs"]["wheels"]["strategy"]["matrix"]["python"]
    assert re.findall(r"Python :: (3\.\d+)", PYPROJECT) == pythons
    assert re.findall(r'"cp3(\d+)-\*"', PYPROJECT) == [python[2:] for python in pythons]
    assert f'requires-python = ">={pythons[0]}"' in PYPROJECT
    assert axes["torch"][0] == re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1] + ".0"


@pytest.mark.parametrize(
    "cell", ["3.11/2.13.0/cpu", "3.11/2.13.0/rocm/pure", "3.11/2.13.0/cpu/sdist"]
)
def test_matrix_refuses_other_cells(cell, matrix):
    with pytest.raises(SystemExit, match="a cell is PYTHON/TORCH/.*, got"):
        matrix.cells_of([cell])


def run_matrix(*arguments):
    command = [sys.executable, str(ROOT / ".ci/matrix"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("options", "status"), [((), 0), (("--require-all",), 1)])
def test_matrix_says_what_it_does_not_run(options, status, tmp_path):
    result = run_matrix("--wheels", str(tmp_path), *options, "3.99/2.13.0/cpu/compiled,pure")
    assert result.returncode == status, result.stderr
    heads, _, *rows = result.stdout.splitlines()
    assert heads.startswith("| Python | torch | build | wheel | passed |") and len(rows) == 2
    assert all(row.endswith("| not run: no Python 3.99 here |") for row in rows)


def test_matrix_wants_the_wheels_first(tmp_path):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    result = run_matrix("--wheels", str(tmp_path), f"{version}/2.13.0/cpu/pure")
    assert result.returncode and "must have one wheel py3-none-any, it has 0" in result.stderr


@pytest.mark.parametrize(
    ("outcome", "fails"),
    [
        ({"passed": 3}, False),
        ({"passed": 3, "failed": 1}, True),
        ({}, True),
        ({"skipped": 9}, True),
    ],
)
def test_matrix_fails_where_tests_do(outcome, fails, matrix):
    assert matrix.Outcome(**outcome).failing(require_all=False) == fails


def test_release_wheels_leave_torch_out():
    repair = re.search(r'repair-wheel-command = "(.+)"', PYPROJECT)[1]
    assert "--exclude 'libtorch*.so'" in repair
    assert PYPROJECT.count('-image = "manylinux_2_28"') == 2
    uses = [step.get("uses", "") for step in loaded(ROOT / ".github/workflows/wheels.yml")["jobs"]
            ["compiled"]["steps"]]  # fmt: skip
    assert any(use.startswith("pypa/cibuildwheel@") for use in uses)


def test_scripts_can_be_run():
    for path in Path(ROOT / ".ci").iterdir():
        assert path.stat().st_mode & 0o111, path
