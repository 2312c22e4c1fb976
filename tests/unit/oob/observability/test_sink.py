"""Log lines on a real pipe whose reader does as it likes."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from typing import TextIO

import pytest

from vfiouser_oob.observability.sink import Sink


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """Both ends of a pipe."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        yield reader, stream
    try:
        os.close(reader)
    except OSError:
        pass


def tell(count: int) -> str:
    """How a sink tells what it lost."""
    return f"lost {count}"


def test_lines_arrive_in_order(pipe: tuple[int, TextIO]) -> None:
    """What a reader takes in time is whole and in order."""
    reader, writer = pipe
    sink = Sink(writer, tell)
    for number in range(100):
        sink.write(f"line {number}")
    assert sink.flush(30)
    assert [f"line {number}" for number in range(100)] == os.read(reader, 65536).decode().splitlines()


def test_a_reader_that_does_not_read_costs_lines_only(pipe: tuple[int, TextIO]) -> None:
    """Nobody waits; what does not fit is counted, and the count is told once the reader reads again."""
    reader, writer = pipe
    line = "x" * 999
    sink = Sink(writer, tell, most_waiting=100_000)
    for _ in range(1000):  # a million bytes: more than the pipe and the sink hold together
        sink.write(line)
    assert not sink.flush(0)
    written = lost = 0
    rest = ""
    # The count is told whenever a line gets through, so a thread that is slow tells it more than once.
    while written + lost + (rest == line) < 1000 and select.select([reader], [], [], 30)[0]:
        *complete, rest = (rest + os.read(reader, 65536).decode()).split("\n")
        written += complete.count(line)
        lost += sum(int(text.removeprefix("lost ")) for text in complete if text.startswith("lost"))
    assert 1000 == written + lost + (rest == line)
    assert lost > 700
    assert sink.flush(30)


def test_a_descriptor_that_somebody_made_non_blocking_loses_nothing(pipe: tuple[int, TextIO]) -> None:
    """Another process that shares the pipe may set O_NONBLOCK; lines wait for room all the same."""
    reader, writer = pipe
    os.set_blocking(writer.fileno(), False)
    sink = Sink(writer, tell)
    lines = [f"{number:0999}" for number in range(300)]  # more than the pipe holds
    for line in lines:
        sink.write(line)
    assert not sink.flush(0.2)
    got = b""
    while len(got) < 300 * 1000:
        assert select.select([reader], [], [], 10)[0], f"the rest was lost after {len(got)} bytes"
        got += os.read(reader, 65536)
    assert lines == got.decode().splitlines()
    assert sink.flush(30)


def test_lines_that_met_a_full_disk_are_counted() -> None:
    """What failed is told by number with the next line that gets through."""
    reader, writer = os.pipe()
    with open("/dev/full", "w") as stream, os.fdopen(reader) as taken:
        sink = Sink(stream, tell)
        for number in range(3):
            sink.write(f"line {number}")
            assert sink.flush(30)
        os.dup2(writer, stream.fileno())
        os.close(writer)
        sink.write("room again")
        sink.close()
        stream.close()
        assert "room again\nlost 3\n" == taken.read()


def test_a_reader_that_has_gone_is_no_error(pipe: tuple[int, TextIO]) -> None:
    """A pipe without a reader swallows the lines."""
    reader, writer = pipe
    os.close(reader)
    sink = Sink(writer, tell)
    sink.write("into the void")
    assert sink.flush(30)
    sink.close()


def test_every_character_can_be_written(pipe: tuple[int, TextIO]) -> None:
    """What came from a file name that is no UTF-8 is written as an escape."""
    reader, writer = pipe
    sink = Sink(writer, tell)
    sink.write("broken \udcff name")
    assert sink.flush(30)
    assert b"broken \\udcff name\n" == os.read(reader, 100)
