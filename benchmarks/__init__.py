"""Benchmarks of the ops and networks, run from the repository: ``python -m benchmarks``.

They share the tests' shapes, inputs and tolerance rule, which are found here.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
