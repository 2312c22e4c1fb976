"""Guest memory as a VMM has it: one shared file, mapped here and by the device, or reached by messages."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from types import TracebackType

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.dma import DmaServer
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import DmaMapFlags
from vfiouser_protocol.errors import DmaFault

PAGE_SIZE = mmap.PAGESIZE


class ClientMemory(DmaServer):
    """A memfd that plays guest RAM, with a simple allocator of whole pages.

    It serves DMA_READ and DMA_WRITE as well, so that a device without the descriptor works the same.

    Args:
        size: bytes, not 0; rounded up to whole pages.
        base: DMA address of its first byte.
    """

    def __init__(self, size: int, base: int = 0) -> None:
        self.base = base
        self.size = -(-size // PAGE_SIZE) * PAGE_SIZE
        self._fd = OwnedFd(os.memfd_create("client-memory", os.MFD_CLOEXEC))
        try:
            os.ftruncate(self._fd.fileno(), self.size)
            self._map = mmap.mmap(self._fd.fileno(), self.size)
        except BaseException:
            self._fd.close()
            raise
        self._view = memoryview(self._map)
        self._next = 0
        self._written: int | None = None
        #: Accesses that the device made by messages.
        self.message_reads = 0
        self.message_writes = 0

    def fileno(self) -> int:
        """Return the file's descriptor; it stays this object's."""
        return self._fd.fileno()

    @property
    def free_bytes(self) -> int:
        """Bytes that were not allocated yet."""
        return self.size - self._next

    def allocate(self, size: int, align: int = PAGE_SIZE) -> int:
        """Set pages aside; they are zero and stay allocated until `close`.

        Args:
            size: bytes; rounded up to whole pages.
            align: alignment of the DMA address in bytes, a power of two.

        Returns:
            The DMA address.

        Raises:
            MemoryError: not enough is left.
        """
        start = -(-(self.base + self._next) // align) * align - self.base
        end = start + -(-size // PAGE_SIZE) * PAGE_SIZE
        if end > self.size:
            raise MemoryError(f"{size} bytes of client memory wanted; {self.free_bytes} are left")
        self._next = end
        return self.base + start

    def view(self, address: int, count: int) -> memoryview:
        """Return the memory itself, to read and write; release it before `close`.

        Args:
            address: DMA address.
            count: bytes.

        Raises:
            DmaFault: it lies outside.
        """
        start = address - self.base
        if start < 0 or count < 0 or start + count > self.size:
            raise DmaFault(
                f"{count} bytes at {address:#x} lie outside the memory at {self.base:#x}+{self.size:#x}",
                errno.ENODEV,
            )
        return self._view[start : start + count]

    def unpack(self, layout: struct.Struct, address: int) -> tuple[int, ...]:
        """Read a little structure at a DMA address.

        Args:
            layout: the structure.
            address: DMA address.

        Returns:
            Its fields.
        """
        return layout.unpack_from(self._view, address - self.base)

    def pack(self, layout: struct.Struct, address: int, *values: int) -> None:
        """Write a little structure at a DMA address.

        Args:
            layout: the structure.
            address: DMA address.
            values: its fields.
        """
        layout.pack_into(self._view, address - self.base, *values)
        if self._written is not None:
            self._note(address, layout.size)

    def store(self, address: int, data: bytes | memoryview) -> None:
        """Write bytes at a DMA address.

        Args:
            address: DMA address.
            data: the bytes.

        Raises:
            DmaFault: they lie outside.
        """
        self.view(address, len(data))[:] = data
        if self._written is not None:
            self._note(address, len(data))

    # What was written on this side, by the guest's processors or for the device by messages

    def log_writes(self, on: bool = True) -> None:
        """Begin to note which pages `pack`, `store` and DMA_WRITE change, or stop it.

        Args:
            on: True to begin, False to stop.
        """
        self._written = 0 if on else None

    def take_written(self) -> int:
        """Read and clear that log: one bit per page, the lowest one for the first page."""
        written, self._written = self._written or 0, 0
        return written

    def _note(self, address: int, count: int) -> None:
        assert self._written is not None
        if count:
            first = (address - self.base) // PAGE_SIZE
            last = (address - self.base + count - 1) // PAGE_SIZE
            self._written |= (1 << last + 1) - (1 << first)

    async def map(self, client: Client, *, with_fd: bool = True, flags: int | None = None) -> None:
        """Let the client's device use all of it.

        Args:
            client: a connected client; for a map without descriptor its `dma_server` has to be this object.
            with_fd: whether the device may map the memory, or has to use messages.
            flags: `DmaMapFlags`; None: read and write.
        """
        access = DmaMapFlags.READ | DmaMapFlags.WRITE if flags is None else flags
        fd = self._fd if with_fd else None
        await client.dma_map(self.base, self.size, flags=access, fd=fd)

    async def unmap(self, client: Client) -> None:
        """Take all of it back from the client's device."""
        await client.dma_unmap(self.base, self.size)

    async def read(self, address: int, count: int) -> bytes:
        """Serve a DMA_READ.

        Args:
            address: DMA address.
            count: bytes.

        Raises:
            DmaFault: the range is not in this memory.
        """
        self.message_reads += 1
        return bytes(self.view(address, count))

    async def write(self, address: int, data: bytes) -> None:
        """Serve a DMA_WRITE.

        Args:
            address: DMA address.
            data: what the device writes.

        Raises:
            DmaFault: the range is not in this memory.
        """
        self.message_writes += 1
        self.store(address, data)

    def close(self) -> None:
        """Give the memory back."""
        self._view.release()
        self._map.close()
        self._fd.close()

    def __enter__(self) -> ClientMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
