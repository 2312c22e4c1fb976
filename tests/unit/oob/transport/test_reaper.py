"""Closing in threads: who waits for whom, how many threads there are, and what counts on whose account."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiouser_oob.transport import reaper
from vfiouser_oob.transport.fds import ForeignFd
from vfiouser_oob.transport.reaper import Account, Reaper


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What holds up closes waits for this."""
    event = threading.Event()
    yield event
    event.set()


def threads() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def hold_up(closing: Reaper, account: Account, gate: threading.Event, count: int) -> None:
    """Let closes of an account be held up, and wait until so many are."""
    begun = threading.Semaphore(0)

    def wait() -> None:
        begun.release()
        gate.wait()

    for _ in range(count):
        closing.dispose(account, wait)
    for _ in range(min(count, 2)):
        assert begun.acquire(timeout=30)
    assert not begun.acquire(blocking=False)


def test_a_close_that_is_held_up_holds_up_its_own_account_only(gate: threading.Event) -> None:
    """However many closes of one owner hang, two threads wait for them, and another owner's go on."""
    closing, hostile, innocent = Reaper(), Account("hostile"), Account("innocent")
    before = threads()
    hold_up(closing, hostile, gate, 50)
    closed = threading.Event()
    closing.dispose(innocent, closed.set)
    assert closed.wait(30)
    assert before + 3 >= threads()
    assert hostile.held == 50
    assert not closing.settle(0)
    gate.set()
    assert closing.settle(30)
    assert (0, 0) == (hostile.held, innocent.held)


def test_many_closes_at_once_take_few_threads() -> None:
    """A client that leaves thousands of descriptors costs two threads for a moment."""
    closing, account = Reaper(), Account("leaving")
    before, seen = threads(), []
    for number in range(2000):
        closing.dispose(account, (lambda: seen.append(threads())) if number % 100 == 0 else int)
    assert closing.settle(30)
    assert before + 2 >= max(seen)
    assert account.held == 0


@pytest.mark.parametrize("kept", [{0}, {7}, {299}, {0, 1, 5, 6, 7, 100, 299}, set(range(0, 300, 2)), set()])
def test_descriptors_are_closed_together_and_those_between_them_are_not(kept: set[int]) -> None:
    """A burst takes one call for each row of consecutive numbers, and whatever has the numbers between stays open."""
    closing, account = Reaper(), Account("leaving")
    fds = [os.memfd_create("x") for _ in range(300)]
    owned = [fd for index, fd in enumerate(fds) if index not in kept]
    account.add(len(owned))
    for fd in reversed(owned):
        closing.close(account, fd)
    assert closing.settle(30)
    still = {index for index, fd in enumerate(fds) if Path(f"/proc/self/fd/{fd}").exists()}
    assert (kept, 0) == (still, account.held)
    for index in kept:
        os.close(fds[index])


def held_up(account: Account) -> bool:
    """Whether so much is held up now."""
    return account.held_up


def test_so_much_is_held_up_that_no_more_is_taken(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner whose closes hang is told by the number that waits and by how long it has; a burst alone is none."""
    closing, account = Reaper(), Account("hostile")
    hold_up(closing, account, gate, 600)
    assert not held_up(account), "they have not been held up for long"
    monkeypatch.setattr(reaper, "_HELD_UP_S", 0.0)
    assert held_up(account)
    gate.set()
    assert closing.settle(30)
    assert not held_up(account)


def test_what_was_taken_and_duplicated_is_counted_once_each() -> None:
    """An account knows how many descriptors are open, whoever owns them."""
    account = Account("client")
    first = ForeignFd(os.memfd_create("x"), account)
    second = first.take()
    assert (True, 1) == (first.closed, account.held)
    copy = second.duplicate()
    assert account.held == 2
    copy.close_at_once()
    assert account.held == 1
    os.close(second.detach())
    assert account.held == 0
