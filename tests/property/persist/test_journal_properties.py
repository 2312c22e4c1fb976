"""The journal against a plain dict, over compactions and crashes; what is damaged reads as a part of its history."""

from __future__ import annotations

import os
from functools import cache
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from journalkit import Model, change, plain, steps
from vfiouser_oob.persist.journal.journal import Journal, read_journal
from vfiouser_oob.persist.journal.layout import PAGE, History, read_history
from vfiouser_oob.persist.memory import read_memory
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.transport.fds import OwnedFd

kinds = st.integers(0, 3) | st.just(255)
keys = st.binary(max_size=3) | st.just(b"k" * 300)
values = st.binary(max_size=40) | st.integers(0, 9000).map(bytes)


class JournalMachine(RuleBasedStateMachine):
    """What a successor would read is what the model says, after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal.create("model")
        self.model: Model = {}

    @rule(kind=kinds, key=keys, value=values)
    def put(self, kind: int, key: bytes, value: bytes) -> None:
        """A record is put."""
        for target in (self.journal, self.model):
            change(target, "put", kind, key, value)

    @rule(kind=kinds, count=st.integers(1, 900), value=values)
    def put_many(self, kind: int, count: int, value: bytes) -> None:
        """Many are put, so that segments follow each other."""
        for number in range(count):
            self.put(kind, number.to_bytes(2, "big"), value[:60])

    @rule(kind=kinds, key=keys | st.integers(0, 900).map(lambda number: number.to_bytes(2, "big")))
    def drop(self, kind: int, key: bytes) -> None:
        """A record goes, if it is there."""
        for target in (self.journal, self.model):
            change(target, "drop", kind, key, b"")

    @rule(kind=kinds)
    def forget(self, kind: int) -> None:
        """All of a kind go."""
        for target in (self.journal, self.model):
            change(target, "forget", kind, b"", b"")

    @rule()
    def crash(self) -> None:
        """The process is gone; another one goes on."""
        fd = OwnedFd(os.dup(self.journal.fileno()))
        self.journal.close()
        self.journal = Journal.resume(fd, read_journal(fd))

    @invariant()
    def a_successor_reads_the_model(self) -> None:
        """Nothing is lost, nothing is added, nothing is torn."""
        history = read_journal(self.journal)
        assert self.model_plain == plain(history.records) == plain(self.journal.records)
        assert not history.torn

    @property
    def model_plain(self) -> Model:
        """The model without empty kinds."""
        return plain(self.model)

    def teardown(self) -> None:
        """Give the memory back."""
        self.journal.close()


JournalMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestJournalMachine = pytest.mark.slow(JournalMachine.TestCase)


@cache
def example() -> tuple[bytes, History, list[Model]]:
    """A journal with a base and changes behind it: its image, its history, and what was true after each change."""
    journal = Journal.create("example")
    model: Model = {}
    states: list[Model] = []
    for step in islice(steps(7), 700):
        change(journal, *step)
        change(model, *step)
        states.append(plain(model))
    image = read_memory(journal, 1 << 24)
    journal.close()
    history = read_history(image)
    assert plain(history.records) == states[-1]
    assert history.generation > 2
    # Steps that changed nothing are not written; what was true is the same before and after.
    return image, history, states


def reads_as_a_part(image: bytes, *, erased: bool = False) -> bool | None:
    """Whether all of the history is read; None if it is refused. Asserts that what is read was true once.

    Args:
        image: a journal.
        erased: its end is zeros. From between two frames on, the memory held just that before the next one was written.
    """
    _, history, states = example()
    try:
        found = read_history(image)
    except UnusableRecord:
        return None
    assert plain(found.records) in states
    assert found.changes <= history.changes
    if found.changes < history.changes and not erased:
        assert found.torn or len(image) < history.place.end
    return found.changes == history.changes and not found.torn


def _written() -> int:
    """Offset behind the last frame."""
    image, history, _ = example()
    return len(image[: history.place.end].rstrip(b"\0"))


@pytest.mark.slow
@given(st.data())
@settings(max_examples=300)
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    """In what is written, any other value of any byte ends the history before it, or has the journal refused."""
    image, history, _ = example()
    at = data.draw(st.integers(history.place.start, _written() - 1))
    if history.place.start + 20 <= at < history.place.start + 24:
        return  # nobody's bytes
    bad = bytearray(image)
    bad[at] ^= data.draw(st.integers(1, 255))
    assert not reads_as_a_part(bytes(bad))


@given(st.integers(0, 23), st.integers(1, 255))
def test_a_changed_head_is_noticed(at: int, flip: int) -> None:
    """No other head leads to a history, but for the four bytes that say nothing."""
    image, _, _ = example()
    bad = bytearray(image)
    bad[at] ^= flip
    assert reads_as_a_part(bytes(bad)) is (True if 12 <= at < 16 else None)


def test_an_end_between_two_frames_is_a_whole_history() -> None:
    """With nothing behind a frame the journal is as it was then: shorter, true once, and not torn."""
    image, history, _ = example()
    cut = _written()
    while reads_as_a_part(image[:cut] + bytes(len(image) - cut), erased=True):
        cut -= 1
    torn = [read_history(image[:at] + bytes(len(image) - at)).torn for at in range(cut - 200, cut)]
    assert {True, False} == set(torn)
    assert history.changes > read_history(image[:cut] + bytes(len(image) - cut)).changes


@given(st.data())
@settings(max_examples=200)
def test_what_is_cut_reads_as_a_part(data: st.DataObject) -> None:
    """A journal whose end is missing, or was never written, is a shorter history or none."""
    image, history, _ = example()
    at = data.draw(st.integers(0, _written() - 1))
    missing = image[:at]
    assert reads_as_a_part(missing) is None
    zeroed = image[:at] + bytes(len(image) - at)
    if at < PAGE or at < history.place.start:
        assert reads_as_a_part(zeroed, erased=True) is None
    else:
        assert reads_as_a_part(zeroed, erased=True) is not None or at <= _base_end()


def _base_end() -> int:
    image, history, _ = example()
    return int.from_bytes(image[history.place.start + 8 : history.place.start + 16], "little")


@given(st.binary(max_size=200))
def test_rubbish_is_refused(data: bytes) -> None:
    """What is no journal is called so, whatever it is."""
    assert reads_as_a_part(data) is None
    assert reads_as_a_part(data.ljust(2 * PAGE, b"\xff")) is None
