"""What a keeper keeps, and what the messages of sd_notify(3) make of it. Pure: descriptors are whatever the caller has.

Rule 1: *whoever sends is not trusted*: what is too long, too much or nonsense is refused with a reason, and changes
        nothing.
Rule 2: *every descriptor that comes is either kept or released* by the message that it came with, and released ones are
        the caller's to close. A barrier is nothing else: its descriptor is released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

H = TypeVar("H")
#: systemd reads no more of a message.
MAX_MESSAGE = 4096
MAX_NAME = 255
#: The name of what comes without one.
NO_NAME = "stored"
#: What the manager above is told as well.
FORWARDED = frozenset(
    {"READY", "RELOADING", "STOPPING", "STATUS", "ERRNO", "EXIT_STATUS", "MONOTONIC_USEC", "WATCHDOG"}
    | {"EXTEND_TIMEOUT_USEC"}
)


@dataclass(frozen=True, slots=True)
class KeeperLimits:
    """What a keeper keeps at most.

    Args:
        descriptors: how many.
        names_size: bytes of their names, each with a colon: they go into one variable of the environment.
    """

    descriptors: int = 4096
    names_size: int = 120_000


@dataclass(frozen=True, slots=True)
class Kept(Generic[H]):
    """A descriptor that is kept.

    Args:
        name: what it is kept as.
        handle: the descriptor.
        watched: it goes when its peer has hung up.
    """

    name: str
    handle: H
    watched: bool


@dataclass(frozen=True, slots=True)
class MessageOutcome(Generic[H]):
    """What came of a message.

    Args:
        released: descriptors that nobody has any more.
        forwarded: what the manager above is to be told, without what only a keeper understands; by key.
        refused: why something of it was not done; None if all was.
    """

    released: tuple[H, ...] = ()
    forwarded: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None


class Store(Generic[H]):
    """The descriptors that are kept, in the order in which they came.

    Args:
        limits: how many there may be.
    """

    def __init__(self, limits: KeeperLimits) -> None:
        self._limits = limits
        self._kept: list[Kept[H]] = []
        self._names_size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Kept[H]]:
        return iter(tuple(self._kept))

    def take(self, message: bytes, handles: Sequence[H]) -> MessageOutcome[H]:
        """Do what a message says.

        Args:
            message: the datagram.
            handles: descriptors that came with it; owned by what is returned and by the store from now on.
        """
        every = tuple(handles)
        if len(message) > MAX_MESSAGE:
            return MessageOutcome(every, refused=f"a message of more than {MAX_MESSAGE} bytes")
        try:
            fields = dict(_fields(message.decode()))
        except ValueError:
            return MessageOutcome(every, refused="a message that is not made of lines KEY=VALUE")
        forwarded = {key: value for key, value in fields.items() if key in FORWARDED}
        name = fields.get("FDNAME", NO_NAME)
        if not _is_name(name):
            return MessageOutcome(every, forwarded, f"{name[:40]!r} as the name of a descriptor")
        if fields.get("FDSTOREREMOVE") == "1":
            return MessageOutcome(every + self._remove(name), forwarded)
        if fields.get("FDSTORE") == "1":
            reason = self._keep(name, every, watched=fields.get("FDPOLL") != "0")
            return MessageOutcome(every if reason else (), forwarded, reason)
        # A barrier, or descriptors that came by mistake.
        return MessageOutcome(every, forwarded)

    def _keep(self, name: str, handles: Sequence[H], *, watched: bool) -> str | None:
        """Keep descriptors, all of them or none; returns why not."""
        size = (len(name) + 1) * len(handles)
        if len(self._kept) + len(handles) > self._limits.descriptors:
            return f"more than {self._limits.descriptors} descriptors"
        if self._names_size + size > self._limits.names_size:
            return f"more than {self._limits.names_size} bytes of names"
        self._names_size += size
        self._kept += [Kept(name, handle, watched) for handle in handles]
        return None

    def _remove(self, name: str) -> tuple[H, ...]:
        return self._release([kept for kept in self._kept if kept.name == name])

    def release(self, gone: Sequence[Kept[H]]) -> tuple[H, ...]:
        """Give up what has hung up, or everything.

        Args:
            gone: what is kept no more.

        Returns:
            Its descriptors, to be closed.
        """
        return self._release(gone)

    def _release(self, gone: Sequence[Kept[H]]) -> tuple[H, ...]:
        leaving = set(map(id, gone))
        released = tuple(kept.handle for kept in self._kept if id(kept) in leaving)
        self._names_size -= sum(len(kept.name) + 1 for kept in self._kept if id(kept) in leaving)
        self._kept = [kept for kept in self._kept if id(kept) not in leaving]
        return released


def _fields(text: str) -> Iterator[tuple[str, str]]:
    for line in text.split("\n"):
        if line:
            key, equals, value = line.partition("=")
            if not equals or not key:
                raise ValueError(line)
            yield key, value


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME and text.isascii() and text.isprintable() and ":" not in text
