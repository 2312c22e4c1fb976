"""Ownership of file descriptors: the one form in which a descriptor goes from room to room.

Rule 1: *a descriptor has one owner at every moment*: an `OwnedFd`. A plain number is used inside one system call and
        never kept, since it may be another client's by the time that it is used again.
Rule 2: *whoever keeps a descriptor takes it* (`take`). What it was taken out of is empty from then on, so closing that,
        however often, closes nothing.
Rule 3: *a descriptor of another process is a `ForeignFd`*: closing it may take as long as that process likes, so a
        thread does it (`reaper`), and it counts on its owner's account until it is closed.
Rule 4: *descriptors that came with a message are lent to its handler*. The connection closes what the handler did not
        take, once the message is done with, on every path; handlers never close them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

from vfiouser_oob.transport.reaper import REAPER, STRANGERS, Account


class HasFileno(Protocol):
    """A descriptor that is lent for one call: an `OwnedFd`, a socket, a file."""

    def fileno(self) -> int:
        """Return the descriptor's number."""
        ...


class LentFd:
    """The number of a descriptor that its owner keeps open while it is lent.

    Args:
        fd: descriptor number; it stays its owner's.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor's number."""
        return self._fd


class OwnedFd:
    """One descriptor and the duty to close it.

    Args:
        fd: descriptor number; this object owns it from now on.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor's number.

        Raises:
            ValueError: it was closed or handed on.
        """
        if self._fd < 0:
            raise ValueError("the descriptor was closed or handed on")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether the descriptor was closed or handed on."""
        return self._fd < 0

    def duplicate(self) -> Self:
        """Return a second owner of the same open file (close-on-exec)."""
        return type(self)(os.dup(self.fileno()))

    def take(self) -> Self:
        """Move the descriptor to a new owner; this one is empty from now on.

        Raises:
            ValueError: it was closed or handed on already.
        """
        return type(self)(self.detach())

    def detach(self) -> int:
        """Give the descriptor away: the caller owns the returned number."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def close_at_once(self) -> None:
        """Close the descriptor here and now; only where that cannot wait for anybody (see `reaper`)."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._fd if self._fd >= 0 else 'closed'})"


class ForeignFd(OwnedFd):
    """A descriptor that another process sent, and the duty to close it without waiting for that process.

    Args:
        fd: descriptor number; this object owns it from now on.
        account: whose it is, where it is counted.
    """

    __slots__ = ("_account",)

    def __init__(self, fd: int, account: Account = STRANGERS) -> None:
        super().__init__(fd)
        self._account = account
        account.add(1)

    def duplicate(self) -> Self:
        """Return a second owner of the same open file (close-on-exec), which counts as well."""
        return type(self)(os.dup(self.fileno()), self._account)

    def take(self) -> Self:
        """Move the descriptor to a new owner; this one is empty from now on."""
        return type(self)(self.detach(), self._account)

    def detach(self) -> int:
        """Give the descriptor away: the caller owns the returned number, which is not counted any more."""
        fd = super().detach()
        self._account.remove()
        return fd

    def close(self) -> None:
        """Close the descriptor soon; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            REAPER.close(self._account, fd)

    def close_at_once(self) -> None:
        """Close the descriptor here and now."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._account.remove()
            os.close(fd)


def close_fds(fds: Iterable[OwnedFd]) -> None:
    """Close descriptors that nobody kept; those that were taken are left alone.

    Args:
        fds: their former owners.
    """
    for fd in fds:
        fd.close()


def take_fds(fds: Iterable[OwnedFd]) -> list[OwnedFd]:
    """Move descriptors to new owners, all of them."""
    return [fd.take() for fd in fds]
