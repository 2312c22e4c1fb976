"""A source and a destination function in one daemon, agents in memory that fail when told to, and a VMM's moves."""

from __future__ import annotations

import errno
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from daemonkit import TEST_DEVICE, function, serving
from rawclient import (
    DIRTY_PAGES,
    DMA_UNMAP,
    FEATURE,
    MIG_DATA_READ,
    MIG_DATA_WRITE,
    QEMU_CAPABILITIES,
    REGION_READ,
    REGION_WRITE,
    RawClient,
    connect,
)
from vfiouser_agents.api import AgentState
from vfiouser_agents.faults import FaultyAgent
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.config.schema import AgentConfig, DeviceConfig, DmaMode, FunctionConfig, MigrationConfig
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.server.daemon import Daemon

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
MIGRATION, STATE, LOG_START, LOG_STOP, LOG_REPORT = 1, 2, 6, 7, 8
V1_REGION = 9
V1_STOPPED, V1_RUNNING, V1_STOP_COPY, V1_PRE_COPY, V1_RESUMING, V1_ERROR = 0, 1, 2, 3, 4, 6
#: Without the capability `migration`: a client of the v2 generation that never heard of v1.
V2_CAPABILITIES = b'{"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576}}\0'
#: Calls that fail fail soon here; all times are upper bounds, so nothing waits for them when all is well.
FAST = MigrationConfig(chunk_size=64 << 10, v1_data_size=64 << 10, call_s=0.4, stop_s=0.4, data_s=0.4, retry_s=0.02)


class Vmm(RawClient):
    """A client that migrates, in either generation."""

    # v2

    async def state(self) -> int:
        """GET MIG_DEVICE_STATE."""
        answer = await self.succeed(FEATURE, struct.pack("<II", 16, STATE | GET))
        assert (16, STATE | GET) == struct.unpack_from("<II", answer.payload)
        return int(struct.unpack_from("<I", answer.payload, 8)[0])

    async def set_state(self, state: int) -> None:
        """SET MIG_DEVICE_STATE, which has to succeed; the reply is the request without a descriptor."""
        request = struct.pack("<IIIi", 16, STATE | SET, state, 0)
        assert request[:12] + b"\xff" * 4 == (await self.succeed(FEATURE, request)).payload

    async def set_state_errno(self, state: int) -> int:
        """SET MIG_DEVICE_STATE; returns the error number, 0 for success."""
        return (await self.command(FEATURE, struct.pack("<IIII", 16, STATE | SET, state, 0))).error

    async def data_read(self, size: int) -> bytes:
        """MIG_DATA_READ, which has to succeed."""
        answer = await self.succeed(MIG_DATA_READ, struct.pack("<II", 8 + size, size))
        argsz, got = struct.unpack_from("<II", answer.payload)
        assert (8 + got, 8 + got) == (argsz, len(answer.payload))
        return answer.payload[8:]

    async def data_read_errno(self, size: int = 4096) -> int:
        """MIG_DATA_READ; returns the error number, 0 for success."""
        return (await self.command(MIG_DATA_READ, struct.pack("<II", 8 + size, size))).error

    async def data_write(self, data: bytes) -> None:
        """MIG_DATA_WRITE, which has to succeed."""
        answer = await self.succeed(MIG_DATA_WRITE, struct.pack("<II", 8 + len(data), len(data)) + data)
        assert b"" == answer.payload

    async def data_write_errno(self, data: bytes) -> int:
        """MIG_DATA_WRITE; returns the error number, 0 for success."""
        return (await self.command(MIG_DATA_WRITE, struct.pack("<II", 8 + len(data), len(data)) + data)).error

    async def read_stream(self, size: int = 50_000) -> bytes:
        """Read in STOP_COPY until the end."""
        stream = b""
        while True:
            data = await self.data_read(size)
            stream += data
            if len(data) < size:
                assert b"" == await self.data_read(size)
                return stream

    async def write_stream(self, stream: bytes, size: int = 70_000) -> None:
        """Write everything."""
        for start in range(0, len(stream), size):
            await self.data_write(stream[start : start + size])

    async def start_logging(self, page_size: int = 4096) -> int:
        """DMA_LOGGING_START of everything; returns the page size that is used."""
        request = struct.pack("<IIQII", 24, LOG_START | SET, page_size, 0, 0)
        return int(struct.unpack_from("<Q", (await self.succeed(FEATURE, request)).payload, 8)[0])

    async def report(self, iova: int, length: int, page_size: int = 4096) -> set[int]:
        """DMA_LOGGING_REPORT; returns the dirty pages of the range."""
        request = struct.pack("<IIQQQ", 1 << 20, LOG_REPORT | GET, iova, length, page_size)
        return pages((await self.succeed(FEATURE, request)).payload[32:])

    # v1

    async def v1_state(self) -> int:
        """Read device_state."""
        return await self.read32(V1_REGION, 0)

    async def v1_set(self, state: int) -> None:
        """Write device_state, which has to succeed."""
        await self.write32(V1_REGION, 0, state)

    async def v1_set_errno(self, state: int) -> int:
        """Write device_state; returns the error number, 0 for success."""
        request = struct.pack("<QIII", 0, V1_REGION, 4, state)
        return (await self.command(REGION_WRITE, request)).error

    async def v1_register(self, offset: int) -> int:
        """Read one of the 64-bit registers."""
        return int.from_bytes(await self.read(V1_REGION, offset, 8), "little")

    async def v1_register_errno(self, offset: int) -> int:
        """Read one of the 64-bit registers; returns the error number, 0 for success."""
        return (await self.command(REGION_READ, struct.pack("<QII", offset, V1_REGION, 8))).error

    async def v1_chunk(self) -> bytes | None:
        """One iteration; None if nothing is pending."""
        if not await self.v1_register(8):
            return None
        offset = await self.v1_register(16)
        size = await self.v1_register(24)
        return await self.read(V1_REGION, offset, size) if size else b""

    async def v1_read_stream(self) -> bytes:
        """Iterate until nothing is pending."""
        stream = b""
        while (chunk := await self.v1_chunk()) is not None:
            stream += chunk
        return stream

    async def v1_write(self, data: bytes) -> int:
        """Give one chunk; returns the error number, 0 for success."""
        offset = await self.v1_register(16)
        await self.write(V1_REGION, offset, data)
        return (await self.command(REGION_WRITE, struct.pack("<QIIQ", 24, V1_REGION, 8, len(data)))).error

    async def v1_write_stream(self, stream: bytes, size: int = 60_000) -> None:
        """Give everything."""
        for start in range(0, len(stream), size):
            assert 0 == await self.v1_write(stream[start : start + size])

    async def v1_dirty(self, iova: int, length: int, page_size: int = 4096) -> set[int]:
        """DIRTY_PAGES GET_BITMAP; returns the dirty pages of the range."""
        size = (-(-length // page_size) + 63) // 64 * 8
        request = struct.pack("<IIQQQQ", 40 + size, 4, iova, length, page_size, size)
        return pages((await self.succeed(DIRTY_PAGES, request)).payload[40:])

    async def unmap_dirty(self, address: int, length: int, page_size: int = 4096) -> set[int]:
        """DMA_UNMAP with GET_DIRTY_BITMAP; returns the dirty pages of what was unmapped."""
        size = (-(-length // page_size) + 63) // 64 * 8
        request = struct.pack("<IIQQQQ", 40 + size, 1, address, length, page_size, size)
        return pages((await self.succeed(DMA_UNMAP, request)).payload[40:])


def pages(bitmap: bytes) -> set[int]:
    """The numbers of the bits that are set."""
    return {index for index in range(8 * len(bitmap)) if bitmap[index // 8] >> index % 8 & 1}


@dataclass
class Side:
    """One function: what the daemon has of it, and what its agent has."""

    name: str
    path: Path
    device: MemoryFunction
    daemon: Daemon
    agent: FaultyAgent

    @property
    def runner(self) -> MigrationRunner:
        """Its migration."""
        engine = next(function.migration for function in self.daemon.functions if function.name == self.name)
        assert engine is not None
        return engine

    @property
    def runs(self) -> bool:
        """Whether it really runs."""
        return self.device.state is AgentState.RUNNING

    @asynccontextmanager
    async def vmm(self, capabilities: bytes = QEMU_CAPABILITIES) -> AsyncIterator[Vmm]:
        """A client of this function."""
        client = Vmm((await connect(self.path)).sock)
        try:
            answer = await client.negotiate(capabilities)
            assert answer.flags == 1, f"refused with {errno.errorcode.get(answer.error, answer.error)}"
            yield client
        finally:
            client.close()


@dataclass
class Bed:
    """Everything: a source and a destination with different seeds, so that only a migration makes them equal."""

    daemon: Daemon
    agent: FaultyAgent
    source: Side
    destination: Side
    extra: dict[str, Side] = field(default_factory=dict)

    def migrated(self) -> bool:
        """Whether the destination has what the source has."""
        return self.source.device.digest() == self.destination.device.digest()


@asynccontextmanager
async def bed(
    directory: Path,
    *,
    config: MigrationConfig = FAST,
    reply_budget_s: float = 2.0,
    state_size: int = 256 << 10,
    devices: Callable[[str], DeviceConfig] = lambda name: TEST_DEVICE,
    also: tuple[FunctionConfig, ...] = (),
    dma: DmaMode = DmaMode.FILES,
    state_directory: Path | None = None,
    **device: object,
) -> AsyncIterator[Bed]:
    """Run a daemon with the functions `src` and `dst`; `device` goes to their `MemoryFunction`s."""
    made = {
        name: MemoryFunction(name, state_size, seed, **device)  # type: ignore[arg-type]
        for name, seed in (("src", 1), ("dst", 2))
    }
    agent = FaultyAgent(MemoryAgent(list(made.values())))
    configs = [
        function(
            directory, name, devices(name), dma=dma, agent=AgentConfig(kind="test", function=name), migration=config
        )
        for name in made
    ]
    agents = {"test": agent}
    async with serving(
        *also, *configs, reply_budget_s=reply_budget_s, agents=agents, state_directory=state_directory
    ) as daemon:
        sides = {name: Side(name, directory / f"{name}.sock", made[name], daemon, agent) for name in made}
        yield Bed(daemon, agent, sides["src"], sides["dst"])


def with_caps(function: MemoryFunction, **caps: object) -> None:
    """Change what the agent can do with a function."""
    function.caps = replace(function.caps, **caps)  # type: ignore[arg-type]


async def stream_of(side: Side) -> bytes:
    """A whole stream; the source goes on afterwards."""
    async with side.vmm() as src:
        await src.set_state(STOP_COPY)
        stream = await src.read_stream()
        await src.set_state(RUNNING)
    return stream


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  the condition is about objects that have no event
            await trio.sleep(0.002)
