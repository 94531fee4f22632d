"""What a default wheel without CUDA ops is: its name, tags, contents, metadata and size."""

import re
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from email import message_from_bytes
from pathlib import Path

import pytest

from cvkernels import extension
from tests.support.made_once import made_once, shared_folder
from tests.support.source_builds import (
    LINUX,
    ROOT,
    copy_of_the_sources,
    environment,
    run,
    setup,
)

MEGABYTE = 10**6
MOST_CPU, MOST_CUDA = 3 * MEGABYTE, 20 * MEGABYTE


def build(folder):
    """The wheel of the sdist, as an installer that finds no wheel makes it."""
    folder.mkdir()
    source = copy_of_the_sources(folder / "source")
    made = setup(source, "sdist", CVKERNELS_BUILD="cpu")
    assert made.returncode == 0, made.stderr
    (sdist,) = (source / "dist").glob("*.tar.gz")
    options = ("-q", "--no-build-isolation", "--no-deps", "-w", str(folder), str(sdist))
    made = run("-m", "pip", "wheel", *options, env=environment(CVKERNELS_BUILD="cpu"))
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.fixture(scope="module")
def wheel(tools, tmp_path_factory):
    folder = made_once(shared_folder(tmp_path_factory) / "wheel", build)
    (path,) = folder.glob("*.whl")
    return path


@LINUX
@pytest.mark.full
@pytest.mark.long
def test_default_wheel(wheel):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_")
    assert wheel.stat().st_size <= MOST_CPU
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        files = {Path(name).name: archive.read(name) for name in names if ".dist-info/" in name}
    version = message_from_bytes(files["METADATA"])["Version"]
    assert wheel.name == f"cvkernels-{version}-{tag}-{tag}-{platform}.whl"

    described = message_from_bytes(files["WHEEL"])
    assert described["Root-Is-Purelib"] == "false"
    assert described.get_all("Tag") == [f"{tag}-{tag}-{platform}"]

    packaged = {name for name in names if ".dist-info/" not in name}
    compiled = f"cvkernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "cvkernels").rglob("*.py")}
    tables = {str(path.relative_to(ROOT)) for path in (ROOT / "cvkernels/tuned").glob("*.json")}
    assert packaged == python | tables | {compiled, "cvkernels/py.typed"}
    assert set(files) == {"METADATA", "WHEEL", "RECORD", "LICENSE", "top_level.txt"}


@LINUX
@pytest.mark.full
def test_metadata_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Name"] == "cvkernels" and metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    always = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    # No torch is excluded for being newer: the compiled part keeps to the stable ABI.
    assert [re.match(r"[\w.>=]+", text)[0] for text in always] == ["torch>=2.11", "triton>=3.6"]


@LINUX
@pytest.mark.full
def test_wheel_is_manylinux(wheel):
    pytest.importorskip("auditwheel")
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    shown = " ".join(subprocess.run(command, capture_output=True, text=True).stdout.split())
    assert re.search(r'constrains the platform tag to "manylinux_2_\d+_\w+"', shown), shown


@pytest.mark.skipif(not extension.has("cpu"), reason="the compiled part is not installed")
def test_installed_objects_fit_their_wheels():
    folder = Path(extension.__file__).parent
    packed = {path.name: len(zlib.compress(path.read_bytes())) for path in folder.glob("_C*.so")}
    python = sum(len(zlib.compress(path.read_bytes())) for path in folder.rglob("*.py"))
    cpu = sum(size for name, size in packed.items() if name != "_C_cuda.so")
    assert cpu + python <= MOST_CPU
    assert sum(packed.values()) + python <= MOST_CUDA
