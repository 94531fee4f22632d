"""Importing the package needs torch alone; what else is missing is one line in info()."""

import subprocess
import sys
import textwrap

import pytest

RUN = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import cvkernels

model = cvkernels.models.resnet18(num_classes=4).eval()
with torch.no_grad():
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)
assert not LAZY & set(sys.modules), LAZY & set(sys.modules)
print(cvkernels.info())
"""


def run(missing, lazy=()):
    code = f"MISSING, LAZY = {set(missing)!r}, {set(lazy)!r}\n" + textwrap.dedent(RUN)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["triton", "torchvision", "timm"])
def test_imports_and_runs_without(name):
    lines = [line for line in run({name}).splitlines() if line.startswith(name)]
    assert len(lines) == 1 and " no " in lines[0] and f"pip install {name}" in lines[0]


def test_imports_and_runs_without_any_of_them():
    run({"triton", "torchvision", "timm", "PIL", "sklearn", "rich"})


def test_importing_and_a_cpu_forward_import_nothing_optional():
    run((), lazy={"triton", "torchvision", "timm", "sklearn", "rich", "matplotlib"})
