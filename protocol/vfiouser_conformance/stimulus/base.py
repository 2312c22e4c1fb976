"""What a device profile offers to the cases."""

from __future__ import annotations

from typing import Protocol

from vfiouser_conformance.case import NotApplicable
from vfiouser_conformance.link import RawLink


class Stimulus(Protocol):
    """Makes a device that it knows do things; it works on a fresh connection after `prepare`.

    Every method takes the connection first. A profile that cannot do something raises `NotApplicable`.
    """

    #: As given with --device-profile.
    name: str
    #: Transfers have a multiple of this size, at such addresses, in bytes.
    granule: int
    #: Largest transfer of one order, in bytes.
    largest: int

    @property
    def in_use(self) -> bool:
        """Whether there is something to put back."""

    def prepare(self, link: RawLink) -> None:
        """Bring the device up, with bus mastering on; called once per connection, before anything else."""

    def release(self, link: RawLink) -> None:
        """Put back what the profile uses of the device, on a connection that was prepared."""

    def start_read(self, link: RawLink, address: int, count: int) -> None:
        """Make the device read so many bytes of client memory; does not wait for the end."""

    def start_write(self, link: RawLink, address: int, count: int) -> None:
        """Make the device write so many bytes to client memory; does not wait for the end."""

    def finish(self, link: RawLink) -> int:
        """Wait for the end of what was started; returns 0 or an error number (a positive one if it is not known)."""

    def load(self, link: RawLink, data: bytes) -> None:
        """Say what the next `start_write` writes."""

    def taken(self, link: RawLink, count: int) -> bytes:
        """What the last `start_read` read."""

    def raise_irq(self, link: RawLink, index: int, vector: int) -> None:
        """Make the device raise an interrupt of MSI, MSI-X, ERR or REQ once."""

    def set_intx(self, link: RawLink, asserted: bool) -> None:
        """Drive the device's INTx line."""

    def failing_access(self, link: RawLink, number: int) -> tuple[int, int]:
        """Make accesses of 4 bytes fail with this error number; returns region and offset of such a place."""

    def scratch(self) -> tuple[int, int, int]:
        """Region, offset and width in bytes of a register that holds what is written and that a reset clears."""

    def change_state(self, link: RawLink, seed: int) -> None:
        """Give the device a state of its own that its migration has to carry."""

    def state(self, link: RawLink) -> bytes:
        """What identifies that state."""


class NoStimulus:
    """The methods that a profile may leave out: each says that the device cannot do it."""

    name = "none"
    granule = 1
    largest = 0

    def prepare(self, link: RawLink) -> None:
        """Nothing to bring up."""

    @property
    def in_use(self) -> bool:
        """Nothing to put back."""
        return False

    def release(self, link: RawLink) -> None:
        """Nothing to put back."""

    def load(self, link: RawLink, data: bytes) -> None:
        """Cannot choose what is written."""
        raise _cannot(self.name, "write data of our choice")

    def taken(self, link: RawLink, count: int) -> bytes:
        """Cannot show what was read."""
        raise _cannot(self.name, "show what it read")

    def raise_irq(self, link: RawLink, index: int, vector: int) -> None:
        """Cannot raise single interrupts."""
        raise _cannot(self.name, "raise an interrupt of our choice")

    def set_intx(self, link: RawLink, asserted: bool) -> None:
        """Cannot drive INTx."""
        raise _cannot(self.name, "drive its INTx line")

    def failing_access(self, link: RawLink, number: int) -> tuple[int, int]:
        """Cannot fail."""
        raise _cannot(self.name, "fail accesses")

    def scratch(self) -> tuple[int, int, int]:
        """Has no such register."""
        raise _cannot(self.name, "hold a value in a register that a reset clears")

    def change_state(self, link: RawLink, seed: int) -> None:
        """Has no state of its own."""
        raise _cannot(self.name, "be given a state of its own")

    def state(self, link: RawLink) -> bytes:
        """Has no state of its own."""
        raise _cannot(self.name, "show its state")


def _cannot(name: str, what: str) -> NotApplicable:
    return NotApplicable(f"the device of profile {name!r} cannot {what}")
