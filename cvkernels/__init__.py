"""Fused kernels for the five classic image classifiers, in drop-in modules.

See README.md for a tour. Importing this package needs torch alone: what else is missing is one line
in :func:`cvkernels.info`.
"""

from importlib.metadata import PackageNotFoundError, version

import torch

# Before the imports, which an older torch would fail at one of its own that are newer.
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(
        f"cvkernels needs torch >= 2.11, this is torch {torch.__version__}: "
        "pip install --upgrade torch"
    )

from cvkernels import backend, functional, models, nn
from cvkernels.backend import BackendError
from cvkernels.explain import explain
from cvkernels.freeze.frozen import freeze, load_frozen
from cvkernels.freeze.tune import tune
from cvkernels.info import info
from cvkernels.models import create_model, list_models
from cvkernels.nn.fused.module import refresh
from cvkernels.patch import patch, restore
from cvkernels.profile import profile
from cvkernels.verify import verify

try:
    __version__ = version("cvkernels")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BackendError",
    "backend",
    "create_model",
    "explain",
    "freeze",
    "functional",
    "info",
    "list_models",
    "load_frozen",
    "models",
    "nn",
    "patch",
    "profile",
    "refresh",
    "restore",
    "tune",
    "verify",
]
