"""Configuration space as the client last wrote it, for the stream's `pci` record and to notice function-level resets.

Every client of a function has one, whether the function has an agent or not: what stock QEMU keeps of a function's
registers is written anew after a migration, and this is where it comes from (`vm.replay`).

Values read back are no good for that: they have status bits, hidden bits and bits that mean something else when
written. So what is carried is what was written, and the destination writes it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from construct import Int8ul, Int16ul, Padding, Struct

from vfiouser_protocol.constants import IrqIndex
from vfiouser_protocol.packed import packed
from vfiouser_protocol.pci_caps import ExpressControl
from vfiouser_protocol.pci_header import ConfigOffset

_SIZE = 4096
_VERSION = 1
#: A `pci` record: this, then as many runs as it says, each with its bytes behind it.
PCI_LAYOUT = Struct("version" / Int8ul, Padding(1), "runs" / Int16ul)
RUN_LAYOUT = Struct("start" / Int16ul, "length" / Int16ul)
_COUNT = packed(PCI_LAYOUT)
_RUN = packed(RUN_LAYOUT)
_COMMAND = 4
_STATUS = 6
_CAPABILITIES = 0x34
_CAP_LIST = 0x10
_CAP_EXPRESS = 0x10
_CAP_AF = 0x13
_AF_CONTROL = 4
_AF_FLR = 0x01
#: What a guest does not restore after a function-level reset: from, to.
_ADDRESSES = (
    (ConfigOffset.BAR0, ConfigOffset.BAR0 + 24),
    (ConfigOffset.ROM, ConfigOffset.ROM + 4),
    (ConfigOffset.INTERRUPT_LINE, ConfigOffset.INTERRUPT_LINE + 1),
)
#: PCI capabilities are dwords in 256 bytes: more links than this are a circle.
_MAX_CAPS = 48


class ConfigObserver(Protocol):
    """Takes down what configuration space is."""

    def config_written(self, offset: int, data: bytes) -> None:
        """A doubleword: its four bytes as last written, and one byte for each that says whether it was."""

    def config_forgotten(self) -> None:
        """Nothing of it counts any more."""


class ConfigShadow:
    """What the client wrote to region 7 since the last reset."""

    def __init__(self) -> None:
        #: How often the client has set up MSI-X vectors, which it does when the guest changes their table. What is in
        #: the table it does not tell.
        self.vector_changes = 0
        self._values = bytearray(_SIZE)
        self._written = bytearray(_SIZE)
        #: Bytes that ask for a function-level reset: offset and mask.
        self._flr: dict[int, int] = {}
        #: Takes down what changes, for another process.
        self.observer: ConfigObserver | None = None

    def learn(self, head: bytes) -> None:
        """Find the registers that reset the function.

        Args:
            head: the first 256 bytes of configuration space, as read.

        Spec: PCI Express, Device Control bit 15; PCI Advanced Features, AF Control bit 0.
        """
        if len(head) < 256 or not head[_STATUS] & _CAP_LIST:
            return
        position = head[_CAPABILITIES] & ~3
        for _ in range(_MAX_CAPS):
            if position < 0x40 or position > 0xFC:
                return
            if head[position] == _CAP_EXPRESS:
                self._flr[position + ExpressControl.DEVICE_CONTROL + 1] = ExpressControl.INITIATE_FLR >> 8
            elif head[position] == _CAP_AF:
                self._flr[position + _AF_CONTROL] = _AF_FLR
            position = head[position + 1] & ~3

    def note(self, offset: int, data: bytes) -> bool:
        """Note a write.

        Args:
            offset: in region 7.
            data: what is written.

        Returns:
            Whether it asks for a function-level reset; the shadow is to be cleared once that was done.
        """
        end = min(offset + len(data), _SIZE)
        data = data[: max(0, end - offset)]
        self._values[offset:end] = data
        self._written[offset:end] = b"\1" * len(data)
        self._tell(offset, end)
        reset = False
        for position, mask in self._flr.items():
            if offset <= position < end and self._values[position] & mask:
                self._values[position] &= ~mask
                reset = True
        return reset

    def note_interrupts(self, index: int) -> None:
        """Note that the client has set up interrupts.

        Args:
            index: IrqIndex.
        """
        if index == IrqIndex.MSIX:
            self.vector_changes += 1

    def clear(self, *, keep_addresses: bool = False) -> None:
        """Forget what was written, as a reset does.

        Args:
            keep_addresses: leave BARs, ROM address and interrupt line. Right for a function-level reset by the guest of
                a VMM that emulates these registers, such as QEMU: the guest finds them unchanged, and does not write
                them again.
        """
        kept = [(slice(*each), self._values[slice(*each)], self._written[slice(*each)]) for each in _ADDRESSES]
        self._values = bytearray(_SIZE)
        self._written = bytearray(_SIZE)
        if keep_addresses:
            for where, values, written in kept:
                self._values[where] = values
                self._written[where] = written
        if self.observer is not None:
            self.observer.config_forgotten()
            if keep_addresses:
                for first, last in _ADDRESSES:
                    self._tell(first, last)

    def _tell(self, start: int, end: int) -> None:
        """Tell the observer of the doublewords that some bytes are in."""
        if self.observer is None:
            return
        for at in range(start & ~3, end, 4):
            self.observer.config_written(at, bytes(self._values[at : at + 4] + self._written[at : at + 4]))

    def restore(self, doublewords: Mapping[int, bytes]) -> None:
        """Take over what another process was told.

        Args:
            doublewords: by offset, what the observer was told.
        """
        for at, data in doublewords.items():
            if at <= _SIZE - 4 and len(data) == 8:
                self._values[at : at + 4] = data[:4]
                self._written[at : at + 4] = data[4:]

    def take(self, other: ConfigShadow) -> None:
        """Take what was written according to another shadow of the same function."""
        self._values[:] = other._values
        self._written[:] = other._written
        for start, end in self._runs():
            self._tell(start, end)

    def copy(self) -> ConfigShadow:
        """Return a shadow of its own with the same content."""
        other = ConfigShadow()
        other._values[:] = self._values
        other._written[:] = self._written
        other._flr.update(self._flr)
        return other

    def encode(self) -> bytes:
        """Return the payload of a `pci` record: runs of bytes as last written."""
        runs = list(self._runs())
        body = b"".join(_RUN.pack(start, end - start) + self._values[start:end] for start, end in runs)
        return _COUNT.pack(_VERSION, len(runs)) + body

    def decode_under(self, payload: bytes) -> None:
        """Take a `pci` record for all that was not written here: what this side's client wrote wins.

        Args:
            payload: the record's payload.

        Raises:
            ValueError: it is damaged or of another version.
        """
        if len(payload) < _COUNT.size:
            raise ValueError(f"a pci record of {len(payload)} bytes")
        version, count = _COUNT.unpack_from(payload)
        if version != _VERSION:
            raise ValueError(f"a pci record of version {version}, this daemon reads {_VERSION}")
        position = _COUNT.size
        for _ in range(count):
            if position + _RUN.size > len(payload):
                raise ValueError("a pci record that is cut off")
            start, length = _RUN.unpack_from(payload, position)
            position += _RUN.size
            if position + length > len(payload) or start + length > _SIZE:
                raise ValueError(f"a pci record whose run {start:#x}+{length:#x} leaves it")
            for index in range(length):
                if not self._written[start + index]:
                    self._values[start + index] = payload[position + index]
                    self._written[start + index] = 1
            position += length

    def writes(self) -> Iterator[tuple[int, bytes]]:
        """The writes that bring a function to this state: naturally aligned, the command register last."""
        last: list[tuple[int, bytes]] = []
        for start, end in self._runs():
            position = start
            while position < end:
                size = next(size for size in (4, 2, 1) if position % size == 0 and position + size <= end)
                if position == _COMMAND and size == 4:
                    size = 2
                piece = (position, bytes(self._values[position : position + size]))
                if position >> 2 == _COMMAND >> 2:
                    if position < _STATUS:
                        last.append(piece)
                else:
                    yield piece
                position += size
        yield from last

    def _runs(self) -> Iterator[tuple[int, int]]:
        position = self._written.find(1)
        while position >= 0:
            end = self._written.find(0, position)
            end = _SIZE if end < 0 else end
            yield position, end
            position = self._written.find(1, end)
