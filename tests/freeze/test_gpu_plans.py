"""Frozen plans for a GPU, made without one: models and images on the meta device."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

import cvkernels
from cvkernels.freeze import backends
from cvkernels.freeze.frozen import freeze, planned
from cvkernels.ops.conv_bn_act import cudnn, halo, tiles, tuning

pytestmark = pytest.mark.skipif(
    bool(cvkernels.backend.lacks_triton("cuda")), reason="Triton is not installed"
)
META = torch.device("meta")
NETWORKS = ("googlenet", "resnet50", "densenet121", "seresnet50", "efficientnet_b0")
IMAGES = (128, 3, 224, 224)


def network(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    with META:
        return getattr(cvkernels.models, name)(**options).eval().to(torch.bfloat16)


def images(shape=IMAGES, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=META)


@pytest.fixture(scope="module")
def plans():
    return {name: planned(network(name), images()) for name in NETWORKS}


@pytest.mark.parametrize("name", ["googlenet", "resnet50", "seresnet50"])
def test_cudnn_runs_what_the_rule_gives_it_but_slices(plans, name):
    plan = plans[name]
    ours = {step.source for step, _ in plan.steps if step.backend == "cudnn"}
    slices = {step.source for step in plan.memory.steps if plan.memory.slices(step)}
    expected = set()
    for node, convolution in plan.lowered.planned.items():
        problem = node.op.problem(plan.lowered.values[node.inputs[0]])
        if tuning.heuristic(problem, (9, 0)).backend == "cudnn" and node not in slices:
            assert convolution.chosen.name == "cudnn"
            expected.add(node)
    assert ours == expected
    assert len(ours) == {"googlenet": 0, "resnet50": 3, "seresnet50": 3}[name]


@pytest.mark.parametrize(("name", "count"), [("densenet121", 58), ("googlenet", 5)])
def test_the_halo_kernel_runs_3x3_of_few_output_channels(plans, name, count):
    """Into slices too; each is still measured against Triton's tiles."""
    ours = [step for step, _ in plans[name].steps if step.backend == "halo"]
    assert len(ours) == count and all(step.op.conv.weight.shape[2:] == (3, 3) for step in ours)
    assert {step.op.conv.weight.shape[0] for step in ours} <= {32, 48, 64}
    assert any(plans[name].memory.slices(step) for step in ours)
    for step in ours:
        problem = step.op.conv.problem(step.inputs[0].value)
        names = [backend.name for backend in backends.possible(problem, META, sliced=True)]
        assert names[0] == "halo" and any(name.startswith("triton") for name in names)
        assert len([name for name in names if name.startswith("halo")]) > 2


def test_a_table_of_tune_names_a_halo_tile(plans):
    step = next(step for step, _ in plans["densenet121"].steps if step.backend == "halo")
    problem = step.op.conv.problem(step.inputs[0].value)
    tile = halo.tiles(problem, (9, 0))[2]
    chosen = backends.choose(problem, META, {backends.key(problem): tile.name})
    assert chosen.name == tile.name != "halo" and chosen.writes


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_has_several_candidates(plans, name):
    for _, problem in plans[name].convolutions():
        candidates = [backend.name for backend in backends.possible(problem, META)]
        assert len(set(candidates)) == len(candidates) > 1
        assert ("cudnn" in candidates) == (not cudnn.why_not(problem))


@pytest.mark.parametrize("name", NETWORKS)
def test_explain_shows_the_frozen_plan_with_its_tiles(plans, name):
    explained = cvkernels.explain(network(name), images(), frozen=True)
    shown = Counter(row.backend for row in explained.rows if row.op == "conv")
    planned_convs = [
        step.backend
        for step, run in plans[name].steps
        if step.op.name == "conv" and run is not None and step.backend != "cvkernels"
    ]
    assert not Counter(planned_convs) - shown
    live = cvkernels.explain(network(name), images())
    assert explained.totals["kernels"] <= live.totals["kernels"]
    assert "planned cuda device" in str(explained)


def test_a_frozen_plan_is_explained_with_predicted_times():
    explained = cvkernels.explain(network("resnet50"), images(), frozen=True)
    assert all(row.predicted_us > 0 and row.bound for row in explained.rows if row.kernels)
    assert explained.predicted_us == sum(row.predicted_us for row in explained.rows)
    lines = str(explained).splitlines()
    assert "predicted us  bound" in lines[0] and lines[-2].startswith("total")
    rate = 128e6 / explained.predicted_us
    assert lines[-1].startswith("predicted for NVIDIA H200, not measured: ")
    assert lines[-1].endswith(f"for 128 images, {rate:,.0f} img/s")


def test_other_reports_predict_nothing():
    model = cvkernels.models.resnet18().eval()
    on_cpu = cvkernels.explain(model, torch.randn(1, 3, 32, 32), frozen=True)
    live = cvkernels.explain(model, images((1, 3, 32, 32)))
    for explained in (on_cpu, live):
        assert explained.predicted_us is None and "predicted" not in str(explained)
        assert {row.predicted_us for row in explained.rows} == {None}


def test_a_measured_table_changes_backend_and_tile_of_a_frozen_step(tmp_path, monkeypatch, plans):
    (first, second) = [
        node
        for node, convolution in plans["resnet50"].lowered.planned.items()
        if node.layer in ("layer1.1.conv2", "layer1.1.conv3")
    ]
    values = plans["resnet50"].lowered.values
    keys = [tuning.key(node.op.problem(values[node.inputs[0]])) for node in (first, second)]
    tile = tiles.Config("triton", 64, 64, 32, 4, 4)
    entries = {key: vars(tile) for key in keys}
    table = {
        "device": "NVIDIA H200", "capability": [9, 0], "op": "conv_bn_act", "torch": "2.11.0",
        "triton": "3.6.0", "commit": "0", "entries": entries,
    }  # fmt: skip
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    loaded = {}
    monkeypatch.setattr(tuning, "_entries", lambda device: loaded)
    try:
        tuning.load_table(path)
        changed = planned(network("resnet50"), images())
    finally:
        tuning.choose.cache_clear()
    of = {step.layer: step.backend for step, _ in changed.steps}
    before = {step.layer: step.backend for step, _ in plans["resnet50"].steps}
    assert before["layer1.1.conv2"] == "cudnn" and before["layer1.1.conv3"] != tile.name
    assert of["layer1.1.conv2"] == of["layer1.1.conv3"] == tile.name


def test_a_table_of_tune_names_the_backend(plans):
    lowered = plans["resnet50"].lowered
    node = next(n for n in lowered.planned if n.layer == "layer1.0.conv1")
    problem = node.op.problem(lowered.values[node.inputs[0]])
    others = backends.possible(problem, META)
    chosen = backends.choose(problem, META, {backends.key(problem): others[-1].name})
    assert chosen.name == others[-1].name != others[0].name


def test_an_explained_model_is_left_as_it_was():
    model = cvkernels.models.resnet18().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explained = cvkernels.explain(model, images((2, 3, 64, 64)), frozen=True)
    assert explained.rows
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32


def test_frozen_explains_the_plan_of_this_device_too():
    model, x = cvkernels.models.resnet18().eval(), torch.randn(2, 3, 64, 64)
    rows = freeze(model, x).report().rows
    explained = cvkernels.explain(model, x, frozen=True).rows
    convolutions = [(row.layer, row.kernels) for row in rows if row.op.startswith("conv")]
    shown = [(row.layer, row.kernels) for row in explained if "conv" in row.op]
    assert len(shown) > 16 and shown == convolutions


@pytest.mark.parametrize("example", [None, (1, 2), (torch.ones(1), torch.ones(1))])
def test_other_examples_are_refused(example):
    with pytest.raises(TypeError, match="explain: example must be a tensor"):
        cvkernels.explain(nn.Identity(), example, frozen=True)


def test_images_without_data_are_not_frozen():
    with META, pytest.raises(ValueError, match="that hold data"):
        freeze(cvkernels.models.resnet18().eval(), torch.empty(1, 3, 64, 64))
