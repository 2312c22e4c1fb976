"""A state through a pipe: whole before its end has come, and never taken for whole when it is not."""

from __future__ import annotations

import os
import struct

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vfiouser_oob.transport.fds import ForeignFd
from vfiouser_oob.transport.reaper import REAPER, Account
from vfiouser_oob.transport.worker import Worker
from vfiouser_oob.vm.carriers import state_pipe
from vfiouser_oob.vm.carriers.state_pipe import TRAIL, PipedStateReader, PipeEnd, PipeError, hold_for, write_state


def end(number: int) -> PipeEnd:
    """One end of a pipe, with a thread of its own."""
    account = Account("test")
    return PipeEnd(ForeignFd(number, account), Worker(account))


async def nothing() -> None:
    """Nobody has to be told."""


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 20 << 20])
async def test_a_state_is_whole_before_its_end(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader has it while the last byte is held back, and the end is noticed after that."""
    reader, writer = os.pipe()
    state = os.urandom(size)
    release = trio.Event()
    incoming = end(reader)
    reading = PipedStateReader(incoming, size)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_state, end(writer), state, release.wait)
        assert await reading.state() == state
        before = reading.ended
        release.set()
        await reading.end()
    assert (before, reading.ended) == (False, True)
    incoming.close()
    assert REAPER.settle(5)


def packed(size: int, *, magic: bytes = b"oobstate", version: int = 1, trail: int = 4) -> bytes:
    """A head by hand."""
    return struct.pack("<8sIIQ", magic, version, trail, size)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "broke off"),
        (packed(10)[:-1], "broke off"),
        (packed(10, magic=b"garbage!"), "not a state that this program saved"),
        (packed(10, version=2), "not a state that this program saved"),
        (packed(101), "at most 100"),
        (packed(1 << 62), "at most 100"),
        (packed(10, trail=TRAIL + 1), "at most 100"),
        (packed(10) + bytes(9), "broke off"),
        (packed(10) + bytes(13), "broke off"),
        (packed(10) + bytes(15), "more bytes"),
    ],
)
async def test_what_is_no_whole_state_is_refused(data: bytes, reason: str) -> None:
    """Before more is kept than is allowed."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    incoming = end(reader)
    reading = PipedStateReader(incoming, 100)
    with pytest.raises(PipeError, match=reason):
        await both(reading)
    incoming.close()
    assert REAPER.settle(5)


async def both(reading: PipedStateReader) -> None:
    """Read to the end."""
    await reading.state()
    await reading.end()


async def test_a_reader_that_goes_is_an_error() -> None:
    """QEMU ended, or did not want it; the last byte's `before_end` is not reached."""
    reader, writer = os.pipe()
    os.close(reader)

    async def unreachable() -> None:
        raise AssertionError

    with pytest.raises(PipeError, match="does not accept the state"):
        await write_state(end(writer), bytes(1000), unreachable)
    assert REAPER.settle(5)


async def test_a_descriptor_stays_open_while_a_thread_uses_it() -> None:
    """Its number may be another client's otherwise by the time that the thread goes on."""
    reader, writer = os.pipe()
    account = Account("test")
    incoming = PipeEnd(ForeignFd(reader, account), Worker(account))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(PipedStateReader(incoming, 100).state)
        await wait_all_tasks_blocked(0.02)
        nursery.cancel_scope.cancel()
    incoming.close()
    assert account.held == 1
    os.close(writer)
    with trio.fail_after(5):
        while account.held:
            await trio.lowlevel.checkpoint()
    assert REAPER.settle(5)


def test_the_last_byte_is_held_back_by_size() -> None:
    """Long enough for the destination to take the state, and never long."""
    assert hold_for(0) == state_pipe.HOLD_S
    assert hold_for(1 << 40) == state_pipe.HOLD_MAX_S
    assert state_pipe.HOLD_S < hold_for(0, 0.01) < hold_for(0, 0.02) < hold_for(0, 10.0) == state_pipe.HOLD_MAX_S
