"""``python -m benchmarks depth``: its networks, a training, and the page."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks.__main__ import main
from benchmarks.depth import networks, runner, trial
from benchmarks.depth.questions import DEPTHS, QUESTIONS, SCALED, lower_half, spread
from benchmarks.depth.trial import Outcome, Trial


def few_digits(size):
    images, labels, *_ = trial_digits(size)
    return images[:128], labels[:128], images[128:192], labels[128:192]


trial_digits = trial.digits


@pytest.mark.parametrize(("blocks", "layers"), DEPTHS.items())
def test_depth_counts_layers_with_weights_but_for_shortcuts(blocks, layers):
    plain = networks.staged(networks.plain_block, blocks)
    residual = networks.staged(networks.residual_block, blocks)
    counts = [
        sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
        for model in (plain, residual)
    ]
    assert counts == [layers, layers + 2]  # two stages widen their shortcut
    assert residual(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_plain_and_residual_begin_alike():
    """The same layers in the same order: a difference is the shortcut's."""
    shapes = []
    for block in (networks.plain_block, networks.residual_block):
        modules = networks.staged(block, 2).modules()
        shapes.append([m.weight.shape for m in modules if isinstance(m, nn.Conv2d)])
    assert shapes[0] == [shape for shape in shapes[1] if shape[2:] == (3, 3)]


def test_added_features_have_the_parameters_of_concatenated_ones():
    for layers in (2, 4):
        budget = networks.parameters(networks.dense(layers))
        added = networks.parameters(networks.residual_of(budget, layers))
        assert abs(added - budget) < 0.2 * budget


def test_scaled_networks_cost_about_four_bases():
    (question,) = (q for q in QUESTIONS if q.name == "e")
    flops = {
        t.label: trial._mflops(t.make(**t.options), torch.randn(1, 3, t.size, t.size))
        for t in question.trials()
    }
    assert list(flops) == list(SCALED)
    ratios = [flops[label] / flops["base"] for label in SCALED if label != "base"]
    assert 3.5 < min(ratios) and max(ratios) < 5


def test_a_training_learns_and_is_reproducible(monkeypatch):
    monkeypatch.setattr(trial, "digits", few_digits)
    one = Trial("a", "small", networks.staged, {"block": networks.plain_block, "blocks": 1}, 0, 6)
    first, again, other = trial.run(one), trial.run(one), trial.run(replace(one, seed=1))
    assert first.train_loss == again.train_loss != other.train_loss
    assert first.train_loss[-1] < first.train_loss[0] and first.train_error < 0.85
    assert first.parameters == networks.parameters(networks.staged(networks.plain_block, 1))
    assert set(first.gradients) == {"initial", "after an epoch"}
    assert all(len(norms) == 7 and min(norms) > 0 for norms in first.gradients.values())


def test_gradients_are_of_the_weights_and_leave_nothing_behind():
    model = networks.staged(networks.residual_block, 1).train()
    images, labels, *_ = few_digits(32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    norms = trial._gradients(model, images, labels, nn.functional.cross_entropy)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    nn.functional.cross_entropy(model(images), labels).backward()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert norms[0] == pytest.approx(first.weight.grad.norm().item(), rel=1e-4)
    assert lower_half([3.0, 4.0, 9.0, 9.0]) == 5.0


def fake(question, label, seed):
    gradients = {"initial": [1.0, 2.0], "after an epoch": [0.5, 0.0]}
    return Outcome(question, label, seed, 1000, 1.5, 2, 3.0, [1.0, 0.5], 0.25, 0.5, gradients)


def test_the_page_keeps_what_was_written_above_its_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "_outcomes", lambda trials, _: (_fake_of(t) for t in trials))
    words = ["depth", "--results", str(tmp_path), "--seeds", "2"]
    assert main(words) == 0
    page = tmp_path / "README.md"
    page.write_text(page.read_text().replace("# Depth", "# Depth\n\nSeen: much."))
    assert main([*words, "--question", "a"]) == 0
    text = page.read_text()
    assert text.count("Seen: much.") == 1 and text.count(runner.BEGIN) == 1
    for question in QUESTIONS:
        assert f"## ({question.name}) {question.title}" in text
        assert (tmp_path / f"{question.name}-training.svg").is_file()
    assert "0.500 (0.500 to 0.500)" in text and "plain-56" in capsys.readouterr().out
    content = json.loads((tmp_path / runner.FILE).read_text())
    assert len(content["outcomes"]) == 2 * sum(len(q.trials()) for q in QUESTIONS)
    assert {"device", "torch", "commit"} <= set(content["environment"])


def _fake_of(trial):
    return fake(trial.question, trial.label, trial.seed)


def test_spread_tells_mean_and_ends():
    assert spread([0.1, 0.3], "{:.2f}".format) == "0.20 (0.10 to 0.30)"
    assert spread([0.5], "{:.2f}".format) == "0.50"
    assert math.isnan(Outcome("a", "b", 0, 1, 1.0, 1).test_error)
