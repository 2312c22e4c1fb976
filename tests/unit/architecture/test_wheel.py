"""What a user installs: the wheel that is really built from this tree."""

from __future__ import annotations

import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from vfiouser_oob import __version__

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built once."""
    builder = WheelBuilder(str(ROOT))
    path = next(builder.build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"]))
    with zipfile.ZipFile(path) as archive:
        # A copy in memory: the archive's directory is read now, and its file is closed.
        archive.extractall(Path(path).parent / "content")
        return archive


def test_exactly_five_packages(wheel: zipfile.ZipFile) -> None:
    """The wheel has the five packages and their metadata at top level, and nothing that would collide."""
    top = {name.split("/")[0] for name in wheel.namelist()}
    metadata = f"vfiouser_oob-{__version__}.dist-info"
    packages = {"vfiouser_oob", "vfiouser_conformance", "vfiouser_protocol", "vfiouser_agents", "vfiouser_soc"}
    assert packages | {metadata} == top


def test_every_module_is_in_it(wheel: zipfile.ZipFile) -> None:
    """What is in the source tree is in the wheel, markers for type checkers and what is published too."""
    expected = set()
    for base in (ROOT, ROOT / "protocol", ROOT / "agents"):
        for package in base.glob("vfiouser_*"):
            for path in package.rglob("*"):
                if path.suffix in (".py", ".proto") or path.name == "py.typed":
                    expected.add(path.relative_to(base).as_posix())
    files = {
        f"vfiouser_oob/files/{path.relative_to(ROOT / 'packaging').as_posix()}"
        for path in (ROOT / "packaging").rglob("*")
        if path.is_file()
    }
    assert expected | files == {
        name for name in wheel.namelist() if name.startswith(("vfiouser_",)) and ".dist-info" not in name
    }


def test_the_sdist_has_the_same_files(tmp_path: Path) -> None:
    """Whoever builds from the sdist gets what the wheel has: the packages, and what `install-files` lays out."""
    path = next(SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"packaging/{path.relative_to(ROOT / 'packaging').as_posix()}" for path in
            (ROOT / "packaging").rglob("*") if path.is_file()} <= names  # fmt: skip
    assert {"vfiouser_oob/cli/main.py", "agents/vfiouser_soc/soc.py", "protocol/vfiouser_protocol/codec.py"} <= names
    assert not any(name.startswith((".cache", ".venv")) for name in names)


def test_metadata(wheel: zipfile.ZipFile) -> None:
    """Version, licence and the command are in the metadata."""
    content = Path(str(wheel.filename)).parent / "content" / f"vfiouser_oob-{__version__}.dist-info"
    metadata = Parser().parsestr((content / "METADATA").read_text())
    assert (__version__, "Apache-2.0", ">=3.11") == (
        metadata["Version"],
        metadata["License-Expression"],
        metadata["Requires-Python"],
    )
    assert "vfiouser-oob = vfiouser_oob.cli.main:main" in (content / "entry_points.txt").read_text()
