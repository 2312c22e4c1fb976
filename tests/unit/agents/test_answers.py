"""The rules about what an agent may answer, each with what breaks it."""

from __future__ import annotations

import pytest

from vfiouser_agents.answers import check_chunk, check_report
from vfiouser_agents.api import Chunk, DirtyReport, Phase, Range
from vfiouser_agents.errors import ProtocolError

PRECOPY, FINAL = Phase.PRECOPY, Phase.FINAL


@pytest.mark.parametrize(
    ("chunk", "phase"),
    [
        (Chunk(b"1234"), PRECOPY),
        (Chunk(b"1234"), FINAL),
        (Chunk(b"", drained=True), PRECOPY),
        (Chunk(b"1", drained=True), PRECOPY),
        (Chunk(b"", eof=True), FINAL),
    ],
)
def test_a_chunk_that_keeps_the_rules(chunk: Chunk, phase: Phase) -> None:
    """It is given back as it is."""
    assert check_chunk(chunk, 4, phase) is chunk


@pytest.mark.parametrize(
    ("chunk", "phase", "why"),
    [
        (Chunk(b"12345"), FINAL, "gave 5 bytes of state; 4 were asked for"),
        (Chunk(b""), FINAL, "neither eof nor drained"),
        (Chunk(b""), PRECOPY, "neither eof nor drained"),
        (Chunk(b"1", eof=True), PRECOPY, "eof in pre-copy"),
        (Chunk(b"1", drained=True), FINAL, "drained for a stopped function"),
    ],
)
def test_a_chunk_that_breaks_them(chunk: Chunk, phase: Phase, why: str) -> None:
    """The error says which rule."""
    with pytest.raises(ProtocolError, match=why):
        check_chunk(chunk, 4, phase)


def test_a_report_is_about_its_range() -> None:
    """A bitmap has a bit for each page, and ranges stay within what was asked for."""
    for good in (DirtyReport(b"\1\1"), DirtyReport(ranges=(Range(4096, 4096), Range(36864, 4096)))):
        assert check_report(good, 4096, 9 * 4096, 4096) is good
    for bad, why in (
        (DirtyReport(b"\1"), "has 1 bytes; 2 are needed"),
        (DirtyReport(ranges=(Range(0, 8192),)), "leave 36864 bytes at 0x1000"),
        (DirtyReport(ranges=(Range(36864, 8192),)), "leave 36864 bytes"),
    ):
        with pytest.raises(ProtocolError, match=why):
            check_report(bad, 4096, 9 * 4096, 4096)
