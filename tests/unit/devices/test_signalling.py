"""Signalling eventfds that block, by the kernel and by a thread, and reading them."""

from __future__ import annotations

import os
import select
import threading

import pytest

from vfiouser_oob.devices.signalling import KernelSignaller, ThreadSignaller, read_counter
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_oob.transport.reaper import Account

FULL = (1 << 64) - 2


def eventfd(value: int = 0) -> OwnedFd:
    """An eventfd that blocks."""
    fd = OwnedFd(os.eventfd(0))
    if value:
        os.eventfd_write(fd.fileno(), value)
    return fd


def test_the_kernel_signals_as_often_as_it_is_told() -> None:
    """Each signal counts, far beyond what the kernel keeps completions of."""
    signaller = KernelSignaller()
    with eventfd() as fd:
        for _ in range(1000):
            signaller.signal(fd)
        assert 1000 == os.eventfd_read(fd.fileno())
        assert os.get_blocking(fd.fileno())
    signaller.close()


def test_the_kernel_does_not_wait_for_a_full_counter() -> None:
    """A counter that is full stays full, whether or not it blocks, and another one is signalled."""
    signaller = KernelSignaller()
    with eventfd(FULL) as full, eventfd() as other:
        for _ in range(3):
            signaller.signal(full)
            signaller.signal(other)
        assert os.eventfd_read(full.fileno()) >= FULL
        assert 3 == os.eventfd_read(other.fileno())
    signaller.close()


def test_a_descriptor_that_is_no_eventfd_is_an_error() -> None:
    """What is no eventfd is not signalled."""
    signaller = KernelSignaller()
    with OwnedFd(os.memfd_create("x")) as fd, pytest.raises(OSError, match="Invalid argument"):
        signaller.signal(fd)
    signaller.close()


def test_a_thread_signals_and_may_be_held_up() -> None:
    """Where the kernel does not signal, a full eventfd holds up a thread; the next client gets another one."""
    account = Account("test")
    signaller = ThreadSignaller(account)
    with eventfd(FULL) as full, eventfd() as other:
        signaller.signal(full)
        signaller.signal(other)  # behind the one that is full, and dropped with it
        signaller.forget()
        signaller.signal(other)
        assert select.select([other.fileno()], [], [], 30)[0]
        assert 1 == os.eventfd_read(other.fileno())
        assert FULL == os.eventfd_read(full.fileno()), "its owner reads, and the thread goes on"
        assert select.select([full.fileno()], [], [], 30)[0]


def test_reading_never_waits() -> None:
    """A counter of 0 is told at once although the eventfd blocks."""
    with eventfd(5) as fd:
        assert 5 == read_counter(fd)
        with pytest.raises(BlockingIOError):
            read_counter(fd)


def test_threads_that_are_held_up_are_bounded() -> None:
    """Clients that come and go with full eventfds hold up a few threads, then interrupts are dropped."""
    before = threading.active_count()
    account = Account("test")
    signaller = ThreadSignaller(account)
    full = [eventfd(FULL) for _ in range(10)]
    for fd in full:
        signaller.signal(fd)
        signaller.forget()
    assert account.threads == 4
    assert before == threading.active_count(), "they are none that anybody waits for at the end"
    for fd in full:
        os.eventfd_read(fd.fileno())
        fd.close()
