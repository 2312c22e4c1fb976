"""A function with both migration interfaces whose state is a list of chunks, and which notes what is asked of it."""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass, field

from fakeserver import Answer, FakeServer
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command, DeviceState, DirtyPagesFlags, Feature, FeatureFlags, MigrationFlags
from vfiouser_protocol.messages import (
    DeviceFeature,
    DeviceInfo,
    DirtyPages,
    FeatureDeviceState,
    FeatureLoggingReport,
    FeatureLoggingStart,
    FeatureMigration,
    MigDataRead,
    MigDataReadReply,
    MigDataWrite,
    RegionInfo,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteReply,
)
from vfiouser_protocol.regions import RegionSpec, SparseArea, region_info_reply
from vfiouser_protocol.session import CommandReceived

PAGE = mmap.PAGESIZE
REGION = 9
REGISTERS = {0: ("state", 4), 8: ("pending", 8), 16: ("offset", 8), 24: ("size", 8)}


@dataclass
class ScriptedFunction:
    """The function; `serve` puts it behind a fake server.

    Args:
        before: chunks that there are before the stop.
        after: chunks that there are after it.
        flags: what v2 says it can do.
        room: bytes of the v1 data section.
        mapped: what of the region may be mapped; nothing: no mapping at all.
        fails: error numbers of steps, by their note.
    """

    before: list[bytes] = field(default_factory=list)
    after: list[bytes] = field(default_factory=list)
    flags: MigrationFlags = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    room: int = 4 * PAGE
    mapped: tuple[SparseArea, ...] = ()
    fails: dict[str, int] = field(default_factory=dict)
    v1_state: int = 1
    v2_state: DeviceState = DeviceState.RUNNING
    steps: list[str] = field(default_factory=list)
    accesses: list[tuple[int, int]] = field(default_factory=list)
    loaded: bytearray = field(default_factory=bytearray)
    dirty: bytes = b""
    chunk: bytes | None = None

    def __post_init__(self) -> None:
        self.fd = os.memfd_create("scripted")
        os.ftruncate(self.fd, PAGE + self.room)
        self.memory = mmap.mmap(self.fd, PAGE + self.room)

    def close(self) -> None:
        """Give the region back."""
        self.memory.close()
        os.close(self.fd)

    def serve(self, server: FakeServer) -> None:
        """Answer for a server."""
        server.handlers |= {
            Command.DEVICE_GET_INFO: lambda _: Answer(encode(DeviceInfo(16, 0, REGION + 1, 5))),
            Command.DEVICE_GET_REGION_INFO: self.region_info,
            Command.REGION_READ: self.region_read,
            Command.REGION_WRITE: self.region_write,
            Command.DEVICE_FEATURE: self.feature,
            Command.MIG_DATA_READ: self.data_read,
            Command.MIG_DATA_WRITE: self.data_write,
            Command.DIRTY_PAGES: self.dirty_pages,
            Command.DEVICE_RESET: self.reset,
        }

    def note(self, step: str) -> int:
        """Note a step; returns the error number that it gets, or 0."""
        self.steps.append(step)
        return self.fails.get(step, 0)

    def next_chunk(self) -> bytes:
        """The chunk that comes next, empty if there is none now."""
        stopped = self.v1_state & 7 == 2 or self.v2_state is DeviceState.STOP_COPY
        if self.before:
            return self.before.pop(0)
        return self.after.pop(0) if stopped and self.after else b""

    def reset(self, _: CommandReceived) -> Answer:
        """DEVICE_RESET."""
        self.v1_state, self.v2_state = 1, DeviceState.RUNNING
        return Answer(errno=self.note("reset"))

    # v1

    def region_info(self, event: CommandReceived) -> Answer:
        """Only the migration region exists."""
        asked = decode(RegionInfo, event.payload)
        if asked.index != REGION or not self.room:
            return Answer(region_info_reply(RegionSpec.absent(asked.index), asked.argsz)[0])
        spec = RegionSpec(REGION, PAGE + self.room, areas=self.mapped, type=(3, 1), mappable=bool(self.mapped))
        payload, with_fd = region_info_reply(spec, asked.argsz)
        return Answer(payload, [self.fd] if with_fd else [])

    def region_read(self, event: CommandReceived) -> Answer:
        """Registers and data section."""
        offset, region, count = decode(RegionRead, event.payload)
        if offset >= PAGE:
            self.accesses.append((offset, count))
            data = bytes(self.memory[offset : offset + count])
        else:
            name, size = REGISTERS[offset]
            assert size == count
            failure = self.note(f"read {name}")
            if failure:
                return Answer(errno=failure)
            data = self.register(name).to_bytes(size, "little")
        return Answer(encode(RegionReadReply(offset, region, count, data)))

    def register(self, name: str) -> int:
        """The value of a register."""
        if name == "state":
            return self.v1_state
        if name == "pending":
            stopped = self.v1_state & 7 == 2
            self.chunk = None
            return sum(map(len, self.before + (self.after if stopped else [])))
        if name == "offset":
            if self.chunk is None and self.v1_state & 2:
                self.chunk = self.next_chunk()
                self.memory[PAGE : PAGE + len(self.chunk)] = self.chunk
            return PAGE
        return len(self.chunk or b"")

    def region_write(self, event: CommandReceived) -> Answer:
        """Registers and data section."""
        offset, region, count, data = decode(RegionWrite, event.payload)
        if offset >= PAGE:
            self.accesses.append((offset, count))
            self.memory[offset : offset + count] = data
        else:
            name, size = REGISTERS[offset]
            assert size == count
            value = int.from_bytes(data, "little")
            failure = self.note(f"{name} = {value:#x}" if name == "state" else f"{name} = {value}")
            if failure:
                return Answer(errno=failure)
            if name == "state":
                self.v1_state = value
            elif name == "size":
                self.loaded += self.memory[PAGE : PAGE + value]
        return Answer(encode(RegionWriteReply(offset, region, count)))

    # v2

    def feature(self, event: CommandReceived) -> Answer:
        """DEVICE_FEATURE."""
        asked = decode(DeviceFeature, event.payload)
        feature, method = Feature(asked.flags & 0xFFFF), FeatureFlags(asked.flags & ~0xFFFF)
        if feature is Feature.MIG_DEVICE_STATE and method is FeatureFlags.SET:
            state = DeviceState(decode(FeatureDeviceState, asked.data).device_state)
            failure = self.note(f"→ {state.name}")
            self.v2_state = self.v2_state if failure else state
            return Answer(event.payload, errno=failure)
        failure = self.note(f"{method.name} {feature.name}")
        if failure:
            return Answer(errno=failure)
        data = asked.data
        if method & FeatureFlags.PROBE:
            return Answer(event.payload)
        if feature is Feature.MIGRATION:
            data = encode(FeatureMigration(int(self.flags)))
        elif feature is Feature.DMA_LOGGING_START:
            assert 1 == len(decode(FeatureLoggingStart, asked.data).ranges)
        elif feature is Feature.DMA_LOGGING_REPORT:
            data = encode(decode(FeatureLoggingReport, asked.data)._replace(bitmap=self.dirty))
        return Answer(encode(DeviceFeature(8 + len(data), asked.flags, data)))

    def data_read(self, event: CommandReceived) -> Answer:
        """MIG_DATA_READ, never more than what is left of a chunk but for the stop, where chunks are joined."""
        size = decode(MigDataRead, event.payload).size
        data = b""
        while len(data) < size and (chunk := self.next_chunk()):
            data += chunk
        if len(data) > size:
            rest = data[size:]
            (self.after if self.v2_state is DeviceState.STOP_COPY else self.before).insert(0, rest)
            data = data[:size]
        failure = self.note(f"read {len(data)} of {size}")
        return Answer(encode(MigDataReadReply(8 + len(data), len(data), data)), errno=failure)

    def data_write(self, event: CommandReceived) -> Answer:
        """MIG_DATA_WRITE."""
        data = decode(MigDataWrite, event.payload).data
        failure = self.note(f"write {len(data)}")
        self.loaded += data
        return Answer(errno=failure)

    def dirty_pages(self, event: CommandReceived) -> Answer:
        """DIRTY_PAGES."""
        asked = decode(DirtyPages, event.payload)
        self.note(f"{DirtyPagesFlags(asked.flags).name} dirty pages")
        if asked.flags == DirtyPagesFlags.GET_BITMAP:
            return Answer(encode(asked._replace(bitmap=self.dirty)))
        return Answer() if asked.flags in (1, 2) else Answer(errno=errno.EINVAL)
