"""Descriptors have one owner: closing twice on purpose, and what becomes of the number meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from vfiouser_oob.transport.fds import OwnedFd, close_fds, take_fds


def new_file() -> int:
    """A descriptor, on the lowest number that is free."""
    return os.memfd_create("owned")


def test_closing_twice_leaves_the_next_owner_of_the_number_alone() -> None:
    """The number belongs to somebody else once it was closed; a second close touches nothing."""
    fd = OwnedFd(new_file())
    number = fd.fileno()
    fd.close()
    assert number == new_file()
    fd.close()
    close_fds([fd, fd])
    os.fstat(number)
    os.close(number)


def test_what_was_taken_is_closed_by_its_new_owner_only() -> None:
    """A queue that closes what a handler took closes nothing."""
    queued = [OwnedFd(new_file()), OwnedFd(new_file())]
    kept = take_fds(queued)
    close_fds(queued)
    assert [True, True] == [fd.closed for fd in queued]
    for fd in kept:
        os.fstat(fd.fileno())
    close_fds(kept)


@pytest.mark.parametrize("use", [OwnedFd.fileno, OwnedFd.take, OwnedFd.detach, OwnedFd.duplicate])
def test_an_empty_owner_gives_no_number(use: Callable[[OwnedFd], object]) -> None:
    """What was closed or taken cannot be used: not its number, which is somebody else's."""
    fd = OwnedFd(new_file())
    fd.take().close()
    with pytest.raises(ValueError, match="closed or handed on"):
        use(fd)


def test_a_lost_descriptor_is_reported_and_closed() -> None:
    """An owner that is forgotten is a bug that tests see, and no leak."""
    owners = [OwnedFd(new_file())]
    number = owners[0].fileno()
    with pytest.warns(ResourceWarning, match="never closed"):
        owners.clear()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
