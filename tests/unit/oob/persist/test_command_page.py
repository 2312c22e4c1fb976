"""The page of commands: what a successor knows after each store, and what it refuses."""

from __future__ import annotations

import os

import pytest

from vfiouser_oob.persist.command_page import (
    BEGUN,
    MAX_PAYLOAD,
    NO_REPLY,
    SLOTS,
    WITH_FDS,
    CommandPage,
    Stage,
    Taken,
    read_page,
)
from vfiouser_oob.persist.memory import read_memory
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.transport.fds import OwnedFd


def taken_of(page: CommandPage) -> tuple[Taken, ...]:
    """What a successor would read now."""
    return read_page(read_memory(page, 1 << 24))


def test_the_life_of_a_command() -> None:
    """Each step is seen at once: taken, begun, being answered, gone."""
    with CommandPage.create("test") as page:
        assert taken_of(page) == ()
        page.take(7, 9, b"payload", NO_REPLY)
        expected = Taken(1, 7, 9, Stage.TAKEN, True, False, b"payload")
        assert taken_of(page) == (expected,)
        page.begin()
        assert [each.stage for each in taken_of(page)] == [Stage.BEGUN]
        page.answering()
        assert [each.stage for each in taken_of(page)] == [Stage.ANSWERING]
        page.answered()
        assert taken_of(page) == ()


def test_what_is_begun_at_once_needs_no_second_store() -> None:
    """A command that is executed right away is taken and begun by the same store."""
    with CommandPage.create("test") as page:
        page.take(7, 9, b"", BEGUN | WITH_FDS)
        (taken,) = taken_of(page)
        assert (Stage.BEGUN, True) == (taken.stage, taken.with_fds)
        page.answering()
        assert [each.stage for each in taken_of(page)] == [Stage.ANSWERING]


def test_commands_queue_in_order() -> None:
    """Only the first one has got anywhere; the others were taken."""
    with CommandPage.create("test") as page:
        for number in range(3):
            page.take(number, 5, bytes([number]))
        page.begin()
        assert [(0, 1), (1, 0), (2, 0)] == [(each.id, each.stage) for each in taken_of(page)]
        page.answered()
        assert [(1, 0), (2, 0)] == [(each.id, each.stage) for each in taken_of(page)]


def test_the_ring_goes_round() -> None:
    """Slots are used again and again, and as many commands may wait as there are slots."""
    with CommandPage.create("test", 4) as page:
        for number in range(1000):
            page.take(number, 5, number.to_bytes(2, "big"))
            page.take(number, 6, b"")
            assert [5, 6] == [each.command for each in taken_of(page)]
            page.answered()
            page.answered()
        for _ in range(4):
            assert not page.full
            page.take(1, 1, b"")
        assert page.full
        assert len(taken_of(page)) == 4


def test_the_sequence_goes_round() -> None:
    """After 2^32 commands it begins anew, and nothing is lost or seen twice."""
    with CommandPage.create("test", 8) as page:
        page._taken = page._answered = (1 << 32) - 20  # what four thousand million commands would make of it
        for number in range(8):
            page.take(number, 1, b"")
            page.answered()
        for number in range(20):
            page.take(number, 1, b"")
            page.answered()
            assert taken_of(page) == ()
            page.take(number, 2, b"")
            assert [number] == [each.id for each in taken_of(page)]
            page.answered()


@pytest.mark.parametrize(("size", "kept"), [(0, True), (MAX_PAYLOAD, True), (MAX_PAYLOAD + 1, False), (1 << 20, False)])
def test_large_payloads_are_not_kept(size: int, kept: bool) -> None:
    """The command is known in any case."""
    with CommandPage.create("test") as page:
        page.take(1, 1, b"x" * size)
        page.take(2, 1, b"y")
        first, second = taken_of(page)
        assert (b"x" * size if kept else None) == first.payload
        assert second.payload == b"y"


def test_a_command_of_no_number_that_exists() -> None:
    """What a stranger calls a command is no reason to mistake one for another."""
    with CommandPage.create("test") as page:
        page.take(0xFFFF, 0xFFFF, b"")
        (taken,) = taken_of(page)
        assert (0xFFFF, 127, False, False, Stage.TAKEN) == (
            taken.id,
            taken.command,
            taken.no_reply,
            taken.with_fds,
            taken.stage,
        )


def test_a_successor_goes_on() -> None:
    """What was dealt with is gone, and the sequence goes on."""
    with CommandPage.create("test") as page:
        page.take(1, 1, b"")
        page.take(2, 1, b"")
        page.begin()
        page.answered()
        page.begin()
        fd = OwnedFd(os.dup(page.fileno()))
    with CommandPage.resume(fd) as successor:
        assert fd.closed
        assert taken_of(successor) == ()
        successor.take(3, 1, b"")
        assert [(3, 3, Stage.TAKEN)] == [(each.sequence, each.id, each.stage) for each in taken_of(successor)]


@pytest.mark.parametrize(
    ("at", "data", "words"),
    [
        (0, b"X", "no page of commands"),
        (8, b"\x02", "a newer version, 2; 1 is understood"),
        (8, b"\x00", "an unknown version, 0"),
        (12, b"\x03", "259 slots"),
        (12, b"\x00\x00\x01", "65536 slots"),
        (16, b"\x07", "its progress is 0x7"),
        (23, b"\x07", "its progress is"),
    ],
)
def test_what_is_no_page_is_refused_in_words(at: int, data: bytes, words: str) -> None:
    """Each refusal says what was found."""
    with CommandPage.create("test", SLOTS) as page:
        image = bytearray(read_memory(page, 1 << 24))
    image[at : at + len(data)] = data
    with pytest.raises(UnusableRecord, match=words):
        read_page(bytes(image))
    with pytest.raises(UnusableRecord, match="no page"):
        read_page(b"")


@pytest.mark.parametrize("slots", [0, 3, 1 << 17])
def test_slots_are_a_power_of_two(slots: int) -> None:
    """Anything else is a mistake of ours."""
    with pytest.raises(ValueError, match="power of two"):
        CommandPage.create("test", slots)
