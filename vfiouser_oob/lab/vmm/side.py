"""What a VMM does with the migration interface of one function, whichever generation it speaks."""

from __future__ import annotations

import abc
from enum import Enum
from typing import NamedTuple

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import PAGE_SIZE, ClientMemory
from vfiouser_protocol.errors import VfioUserError


class Generation(Enum):
    """The two ways to migrate that the protocol has had."""

    V1 = "v1"
    V2 = "v2"


class Portion(NamedTuple):
    """A piece of a function's state.

    Args:
        data: the bytes.
        last: nothing more comes for now (pre-copy), or at all (after the stop).
    """

    data: bytes
    last: bool


class MigrationFailed(VfioUserError):
    """A function cannot be migrated, or does not behave; the VM stays where it is."""


class MigrationLost(VfioUserError):
    """A migration failed and nobody knows where the function runs, so the VM must not run anywhere."""


class MigrationSide(abc.ABC):
    """The migration interface of one function, on the source or on the destination.

    Args:
        client: connected to the function.
    """

    generation: Generation

    def __init__(self, client: Client) -> None:
        self._client = client

    # Source

    @abc.abstractmethod
    async def save_setup(self) -> bool:
        """Begin to save while the VM runs.

        Returns:
            Whether there is a pre-copy; otherwise nothing can be read before `stop`.
        """

    @abc.abstractmethod
    async def read(self) -> Portion:
        """Take the next piece of the state."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """The VM has stopped, so the function stops as well; what is read now has an end."""

    @abc.abstractmethod
    async def save_cleanup(self) -> None:
        """The state was read to its end: leave the function stopped."""

    @abc.abstractmethod
    async def cancel(self) -> None:
        """Give the migration up: the function runs again, here."""

    # Destination

    @abc.abstractmethod
    async def load_setup(self) -> None:
        """Begin to load."""

    @abc.abstractmethod
    async def load(self, data: bytes) -> None:
        """Give the next piece of the state."""

    @abc.abstractmethod
    async def start(self) -> None:
        """The VM runs here: what was loaded takes effect, and the function runs."""

    # Dirty pages

    @abc.abstractmethod
    async def start_logging(self, memory: ClientMemory) -> None:
        """Let the function log which pages of `memory` it writes."""

    @abc.abstractmethod
    async def dirty(self, memory: ClientMemory) -> bytes:
        """Read and clear the log.

        Returns:
            A bitmap, one bit per page of `PAGE_SIZE` bytes from the start of `memory`.
        """

    @abc.abstractmethod
    async def stop_logging(self) -> None:
        """Log no more."""

    def close(self) -> None:  # noqa: B027 - only v1 holds anything
        """Give back what the interface holds."""


def check_pages(memory: ClientMemory) -> int:
    """Return the page size for dirty logs of guest memory, in bytes."""
    if memory.base % PAGE_SIZE:
        raise ValueError(f"guest memory at {memory.base:#x} does not begin with a page of {PAGE_SIZE} bytes")
    return PAGE_SIZE
