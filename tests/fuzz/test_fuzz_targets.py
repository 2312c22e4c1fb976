"""The fuzz targets hold for the corpus in the tree and for a moment of fuzzing; `make fuzz` goes on for minutes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fuzzkit.guided import fuzz as fuzz_slowly
from fuzzkit.rounds import CORPUS
from fuzzkit.rounds import fuzz as fuzz_fast
from fuzzkit.seeds import seeds
from fuzzkit.targets import TARGETS

SECONDS = 1.0


def inputs(name: str) -> list[bytes]:
    """The corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str) -> None:
    """What was a finding once, and what reaches far, raises nothing; there is a seed for each target."""
    found = inputs(name)
    assert len(found) >= len(seeds()[name])
    for data in found:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_moment_of_fuzzing(name: str, tmp_path: Path) -> None:
    """Generated inputs raise nothing either, with atheris where it is installed and with our own loop elsewhere."""
    if importlib.util.find_spec("atheris") is None:
        assert fuzz_slowly(TARGETS[name], inputs(name), SECONDS) > 0
    else:
        runs, log = fuzz_fast(name, SECONDS, tmp_path)
        assert log is None, log
        assert runs > 0


def test_a_finding_is_told() -> None:
    """Our own loop finds its way through nested checks by coverage, and says which input it was."""
    from vfiouser_protocol.header import unpack_header

    def run(data: bytes) -> None:
        if len(data) == 16 and unpack_header(data)[1] == 0x7F:
            raise KeyError("found")

    with pytest.raises(KeyError) as caught:
        fuzz_slowly(run, [bytes(16)], 60.0)
    assert "the input was" in caught.value.__notes__[0]
