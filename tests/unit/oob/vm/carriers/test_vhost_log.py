"""The log of written pages: bits at the right place, and no file that could be cut off under us."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from carrierbed.vhostclient import sealed_file
from vfiouser_oob.transport.fds import ForeignFd
from vfiouser_oob.transport.reaper import REAPER, Account
from vfiouser_oob.vm.carriers.vhost_log import LogRefused, VhostLog

SIZE = 8192
PAGE = 4096


@pytest.fixture
def file() -> Iterator[ForeignFd]:
    """A log's file."""
    with ForeignFd(sealed_file(SIZE)) as fd:
        yield fd
    assert REAPER.settle(5)


@pytest.mark.parametrize(
    ("address", "length", "expected"),
    [
        (0, 1, {0}),
        (8 * PAGE - 1, 1, {0}),
        (8 * PAGE - 1, 2, {0, 1}),
        (24 * PAGE, 16 * PAGE, {3, 4}),
        (0, 0, set()),
        ((SIZE - 1) * 8 * PAGE, 100 * PAGE, {SIZE - 1}),
        (SIZE * 8 * PAGE, PAGE, set()),
        (1 << 63, PAGE, set()),
    ],
)
def test_marks_are_where_qemu_looks(file: ForeignFd, address: int, length: int, expected: set[int]) -> None:
    """A byte for eight pages; beyond the log there is no memory that QEMU would send."""
    log = VhostLog(file, SIZE, 0, Account("test"))
    log.mark(address, length)
    content = os.pread(file.fileno(), SIZE, 0)
    assert {at for at, byte in enumerate(content) if byte} == expected
    assert all(content[at] == 0xFF for at in expected)
    log.close()
    log.mark(0, 1)
    log.close()


@pytest.mark.parametrize(
    ("size", "offset"), [(SIZE + 1, 0), (0, 0), (PAGE, 1), (PAGE, SIZE), (1 << 63, 0), (1 << 31, 0), (PAGE, 1 << 63)]
)
def test_a_log_that_is_not_in_its_file_is_refused(file: ForeignFd, size: int, offset: int) -> None:
    """Nothing is mapped."""
    with pytest.raises(LogRefused):
        VhostLog(file, size, offset, Account("test"))


def test_a_file_that_could_be_cut_off_is_refused() -> None:
    """So that nobody can end this process by making it shorter; nor is it anything but a memory file."""
    with ForeignFd(sealed_file(SIZE, sealed=False)) as fd, pytest.raises(LogRefused, match="become shorter"):
        VhostLog(fd, SIZE, 0, Account("test"))
    reader, writer = os.pipe()
    os.close(writer)
    with ForeignFd(reader) as fd, pytest.raises(LogRefused):
        VhostLog(fd, SIZE, 0, Account("test"))
    assert REAPER.settle(5)
