"""The journal: what a successor reads, what is refused, and what memory it takes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from journalkit import Model, change, plain, steps
from vfiouser_oob.persist.journal import journal as journal_module
from vfiouser_oob.persist.journal.journal import SMALLEST, Journal, read_journal
from vfiouser_oob.persist.journal.layout import ACTIVE, PAGE, read_history
from vfiouser_oob.persist.memory import read_memory
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.stream_memory import CommandStage, StreamMemory
from vfiouser_oob.transport.fds import OwnedFd

SUPPORT = Path(__file__).resolve().parents[3] / "support"


def image_of(journal: Journal) -> bytes:
    """What is in the memory now."""
    return read_memory(journal, 1 << 28)


def copy_of(image: bytes) -> OwnedFd:
    """Memory with this in it."""
    fd = OwnedFd(os.memfd_create("copy", os.MFD_CLOEXEC))
    os.write(fd.fileno(), image)
    return fd


def test_what_is_put_is_read() -> None:
    """Records come back by kind and key; what was dropped or forgotten does not."""
    journal = Journal.create("test")
    assert {} == read_journal(journal).records
    journal.put(1, b"a", b"1")
    journal.put(1, b"b", b"2")
    journal.put(1, b"a", b"3")
    journal.put(2, b"", b"")
    journal.put(3, b"x", b"")
    journal.drop(1, b"b")
    journal.drop(1, b"b")
    journal.drop(9, b"b")
    journal.forget(3)
    journal.forget(9)
    history = read_journal(journal)
    assert {1: {b"a": b"3"}, 2: {b"": b""}} == plain(history.records)
    assert (7, False) == (history.changes, history.torn)
    journal.close()


@pytest.mark.parametrize(
    ("kind", "key", "value"), [(256, b"", b""), (-1, b"", b""), (0, bytes(1 << 16), b"")], ids=["kind", "sign", "key"]
)
def test_what_no_frame_can_hold_changes_nothing(kind: int, key: bytes, value: bytes) -> None:
    """A record that is too large is refused before anything is changed."""
    journal = Journal.create("test")
    with pytest.raises(ValueError, match="a record of kind"):
        journal.put(kind, key, value)
    assert {} == plain(journal.records) == plain(read_journal(journal).records)
    journal.close()


def test_a_torn_record_ends_the_history_and_the_next_process_goes_on() -> None:
    """Half of a frame is left out, said, and left behind by whoever goes on."""
    journal = Journal.create("test")
    journal.put(1, b"a", b"whole")
    before = len(image_of(journal).rstrip(b"\0"))
    journal.put(1, b"b", b"torn" * 100)
    image = image_of(journal)
    journal.close()
    fd = copy_of(image[: before + 200].ljust(len(image), b"\0"))
    history = read_journal(fd)
    assert ({1: {b"a": b"whole"}}, True) == (history.records, history.torn)
    with Journal.resume(fd, history) as successor:
        assert fd.closed
        successor.put(1, b"c", b"more")
        history = read_journal(successor)
        assert ({1: {b"a": b"whole", b"c": b"more"}}, False) == (history.records, history.torn)


def with_version(image: bytes, version: int) -> bytes:
    """The same journal, said to be of another version."""
    return image[:8] + version.to_bytes(4, "little") + image[12:]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda image: b"", "0 bytes"),
        (lambda image: b"X" + image[1:], "not a journal"),
        (lambda image: with_version(image, 2), "a newer version, 2; 1 is understood"),
        (lambda image: with_version(image, 0), "an unknown version, 0"),
        (lambda image: image[:ACTIVE] + bytes(8) + image[ACTIVE + 8 :], "a segment that it does not have"),
        (lambda image: image[: PAGE + SMALLEST - 1], "a segment that it does not have"),
        (lambda image: image[:PAGE] + b"\xff" + image[PAGE + 1 :], "the head of its segment"),
    ],
    ids=["empty", "magic", "newer", "older", "nowhere", "short", "segment"],
)
def test_what_is_no_journal_is_refused_in_words(bad: Callable[[bytes], bytes], words: str) -> None:
    """Each refusal says what was found."""
    with Journal.create("test") as journal:
        journal.put(1, b"a", b"1")
        image = image_of(journal)
    with pytest.raises(UnusableRecord, match=words):
        read_history(bad(image))


def test_something_else_in_its_place_is_refused() -> None:
    """A descriptor of another kind is not read from."""
    reader, writer = (OwnedFd(number) for number in os.pipe())
    with reader, writer, pytest.raises(UnusableRecord, match="not a file"):
        read_journal(reader)


def test_many_changes_take_little_memory() -> None:
    """What is over is given back: a hundred thousand changes of a few records stay in two small segments."""
    with Journal.create("test") as journal:
        for number in range(100_000):
            journal.put(1, (number % 50).to_bytes(2, "big"), number.to_bytes(8, "big"))
        status = os.fstat(journal.fileno())
        assert status.st_size <= PAGE + 3 * SMALLEST
        assert status.st_blocks * 512 <= PAGE + 2 * SMALLEST
        assert plain(journal.records) == plain(read_journal(journal).records)


@pytest.mark.slow
def test_a_journal_grows_and_shrinks_with_what_it_knows() -> None:
    """65 535 maps fit, and when they are gone so is their memory."""
    with Journal.create("test") as journal:
        for number in range(65_535):
            journal.put(2, number.to_bytes(8, "big"), bytes(40))
        assert plain(journal.records) == plain(read_journal(journal).records)
        journal.forget(2)
        for number in range(200_000):
            journal.put(1, b"x", number.to_bytes(8, "big"))
        assert {1: {b"x": (199_999).to_bytes(8, "big")}} == plain(read_journal(journal).records)
        assert os.fstat(journal.fileno()).st_blocks * 512 <= PAGE + 2 * SMALLEST


def test_a_record_larger_than_a_segment() -> None:
    """The next segment is made as large as is needed."""
    with Journal.create("test") as journal:
        journal.put(1, b"large", bytes(10 * SMALLEST))
        journal.put(1, b"small", b"1")
        assert plain(journal.records) == plain(read_journal(journal).records)


def test_without_memory_the_history_has_no_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written is an error, and so is all that follows, until there is memory again for all of it."""
    with Journal.create("test") as journal:
        monkeypatch.setattr(journal_module, "MAX_SIZE", PAGE)
        keys = (number.to_bytes(2, "big") for number in range(10_000))
        last = fill(journal, keys)
        written = {1: {key: value for key, value in journal.records[1].items() if key != last}}
        assert written == plain(read_history(image_of(journal)).records)
        with pytest.raises(OSError, match="at most"):
            journal.put(1, b"", b"")
        assert written == plain(read_history(image_of(journal)).records)
        monkeypatch.undo()
        journal.put(2, b"", b"")
        assert plain(journal.records) == plain(read_journal(journal).records)
        assert b"" in journal.records[1]


def fill(journal: Journal, keys: Iterator[bytes]) -> bytes:
    """Put records until there is no memory; returns the key of the one that was not written."""
    for key in keys:
        try:
            journal.put(1, key, bytes(100))
        except OSError as error:
            assert "at most" in str(error)  # noqa: PT017
            return key
    raise AssertionError("there was always memory")


def test_a_process_without_room_for_files_makes_none() -> None:
    """RLIMIT_FSIZE is no obstacle for the error to be told; nothing is left open."""
    before = set(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            Journal.create("test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert before == set(os.listdir("/proc/self/fd"))


def test_a_killed_writer_leaves_a_part_of_its_history() -> None:
    """Processes that go on with one journal are killed in the middle of it; each finds what the one before had done."""
    seed, done = 11, 0
    model: Model = {}
    script = steps(seed)
    with Journal.create("killed") as journal:
        for hundreds in (0, 2, 7, 1, 12, 3):
            with StreamMemory.create("killed") as page:
                _write_and_be_killed(journal, page, (seed, done), hundreds)
                image = read_memory(page, 1 << 20)
            state = int.from_bytes(image[16:24], "little")
            answered = state >> 32
            for step in islice(script, answered):
                change(model, *step)
            done += answered
            found = plain(read_journal(journal).records)
            if plain(model) != found:
                # The one command that was begun and not answered had been carried out.
                assert state >> 24 & 0xFF == CommandStage.BEGUN
                change(model, *next(script))
                done += 1
            assert plain(model) == found
    assert done > 2400


def _write_and_be_killed(journal: Journal, page: StreamMemory, numbers: tuple[int, ...], hundreds: int) -> None:
    arguments = [str(number) for number in (journal.fileno(), page.fileno(), *numbers)]
    with subprocess.Popen(
        [sys.executable, "-m", "journalkit", *arguments],
        stdout=subprocess.PIPE,
        pass_fds=(journal.fileno(), page.fileno()),
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        assert len(writer.stdout.read(hundreds)) == hundreds
        writer.kill()
