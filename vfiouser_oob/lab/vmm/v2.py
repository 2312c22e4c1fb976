"""The v2 generation as QEMU's code uses it: DEVICE_FEATURE, MIG_DATA_READ and MIG_DATA_WRITE."""

from __future__ import annotations

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.vmm.side import Generation, MigrationFailed, MigrationSide, Portion, check_pages
from vfiouser_protocol.constants import DeviceState, MigrationFlags
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.messages import LoggingRange

#: QEMU's largest portion.
DEFAULT_CHUNK = 1 << 20


class V2Side(MigrationSide):
    """One function's v2 interface.

    Args:
        client: connected to the function.
        chunk_size: bytes read and written at once; any number above 0.
    """

    generation = Generation.V2

    def __init__(self, client: Client, *, chunk_size: int = DEFAULT_CHUNK) -> None:
        super().__init__(client)
        self._chunk = min(chunk_size, client.max_data_xfer_size)
        self._final = False

    async def flags(self) -> MigrationFlags:
        """Ask what the function can do.

        Raises:
            MigrationFailed: it cannot be migrated.
        """
        try:
            flags = MigrationFlags(await self._client.get_migration_flags())
        except ReplyError as error:
            raise MigrationFailed(f"v2 cannot migrate the function: {error}") from error
        if MigrationFlags.STOP_COPY not in flags:
            raise MigrationFailed(f"the function's migration flags {flags:#x} lack STOP_COPY")
        return flags

    async def save_setup(self) -> bool:
        """RUNNING → PRE_COPY, if there is such a state."""
        self._final = False
        if MigrationFlags.PRE_COPY not in await self.flags():
            return False
        await self._client.set_device_state(DeviceState.PRE_COPY)
        return True

    async def read(self) -> Portion:
        """MIG_DATA_READ. Before the stop a short read says that there is no more for now; afterwards an empty
        one is the end.
        """
        data = await self._client.mig_data_read(self._chunk)
        return Portion(data, not data if self._final else len(data) < self._chunk)

    async def stop(self) -> None:
        """→ STOP_COPY, from PRE_COPY or by way of STOP."""
        await self._client.set_device_state(DeviceState.STOP_COPY)
        self._final = True

    async def save_cleanup(self) -> None:
        """STOP_COPY → STOP."""
        await self._client.set_device_state(DeviceState.STOP)

    async def cancel(self) -> None:
        """→ RUNNING; if that is refused, the function is reset, as QEMU does it."""
        try:
            await self._client.set_device_state(DeviceState.RUNNING)
        except ReplyError:
            await self._client.reset()

    async def load_setup(self) -> None:
        """RUNNING → RESUMING."""
        await self.flags()
        await self._client.set_device_state(DeviceState.RESUMING)

    async def load(self, data: bytes) -> None:
        """MIG_DATA_WRITE, in portions of our size, whatever size they had when they were read."""
        view = memoryview(data)
        for start in range(0, len(data), self._chunk):
            await self._client.mig_data_write(bytes(view[start : start + self._chunk]))

    async def start(self) -> None:
        """RESUMING → RUNNING."""
        await self._client.set_device_state(DeviceState.RUNNING)

    async def start_logging(self, memory: ClientMemory) -> None:
        """DMA_LOGGING_START of all guest memory."""
        ranges = (LoggingRange(memory.base, memory.size),)
        await self._client.start_dma_logging(check_pages(memory), ranges)

    async def dirty(self, memory: ClientMemory) -> bytes:
        """DMA_LOGGING_REPORT."""
        return await self._client.report_dma_logging(memory.base, memory.size, check_pages(memory))

    async def stop_logging(self) -> None:
        """DMA_LOGGING_STOP."""
        await self._client.stop_dma_logging()
