"""Ownership of file descriptors.

Rule 1: a descriptor has exactly one owner at a time; handing it on means that the receiver closes it.
Rule 2: descriptors that arrive with a message belong to whoever handles the message, on every path: what a handler
        does not keep is closed when the handler is done.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from types import TracebackType


def close_fds(fds: Iterable[int]) -> None:
    """Close plain descriptors that nobody kept.

    Args:
        fds: descriptor numbers; each is closed once, one that is closed already is passed over.
    """
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


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

    def duplicate(self) -> OwnedFd:
        """Return a second owner of the same open file (close-on-exec)."""
        return OwnedFd(os.dup(self.fileno()))

    def detach(self) -> int:
        """Give the descriptor away: the caller owns the returned number."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> OwnedFd:
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
        return f"OwnedFd({self._fd if self._fd >= 0 else 'closed'})"
