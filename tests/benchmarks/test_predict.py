"""``python -m benchmarks predict``: what is committed is what the model says now."""

import argparse
import json

import pytest

import cvkernels
from benchmarks import predict

pytestmark = pytest.mark.skipif(
    bool(cvkernels.backend.lacks_triton("cuda")), reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def found():
    return predict.predictions()


def test_the_committed_predictions_are_of_these_plans(found):
    """Else run ``python -m benchmarks predict``."""
    committed = predict.FILE.read_text()
    assert predict.text_of(found) == committed
    assert json.loads(committed) == json.loads(json.dumps(found))


def test_every_step_of_every_network_is_predicted(found):
    networks = [(entry["network"], entry["batch"]) for entry in found["networks"]]
    assert networks == [(name, batch) for name in predict.TARGETS for batch in predict.BATCHES]
    for entry in found["networks"]:
        assert len(entry["steps"]) > 50
        for step in entry["steps"]:
            assert step["predicted_us"] > step["memory_us"] and step["bound"]
        total = sum(step["predicted_us"] for step in entry["steps"])
        assert entry["predicted_ms"] == pytest.approx(total / 1e3, rel=1e-3)
        slower = entry["predicted_images_per_s_if"]["L2 delivers 6 TB/s"]
        faster = entry["predicted_images_per_s_if"]["a launch hides all of its shorter time"]
        assert slower <= entry["predicted_images_per_s"] < faster
        rate = 1e3 * entry["batch"] / entry["predicted_ms"]
        assert entry["predicted_images_per_s"] == pytest.approx(rate, rel=1e-3)


def test_predictions_are_called_that(found, tmp_path, capsys):
    path = tmp_path / "predicted.json"
    assert predict.main(argparse.Namespace(json=path)) == 0
    printed = capsys.readouterr().out
    assert "predicted img/s" in printed and "predicted for NVIDIA H200, not measured" in printed
    written = json.loads(path.read_text())
    assert "none is measured" in written["predicted"]
    for entry in written["networks"]:
        times = [key for key in entry if key.endswith(("_ms", "_us"))]
        assert all(key.startswith("predicted") or key == "input_copy_us" for key in times)
    assert len(written["assumptions"]) > 5 and written["gpu"]["l2"] == 7.5e12
