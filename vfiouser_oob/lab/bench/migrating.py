"""Clients that do nothing but migrate, with as little work of their own as possible."""

from __future__ import annotations

import mmap
import os
import selectors
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from vfiouser_oob.lab.bench.raw import BenchFailed, RawClient, message
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import HEADER_SIZE, Command, DeviceState, Feature, FeatureFlags, RegionIndex
from vfiouser_protocol.messages import (
    DeviceFeature,
    FeatureDeviceState,
    MigDataRead,
    RegionInfo,
    RegionRead,
    RegionReadReply,
    RegionWrite,
)
from vfiouser_protocol.migration_v1 import PRE_COPY, REGISTERS, RESUMING, RUNNING, STOP_COPY, STOPPED, MigrationRegister

#: QEMU's portion of state.
PORTION = 1 << 20
_READ_HEAD = HEADER_SIZE + 8
_SIZE = struct.Struct("<I")
_WRITE_HEAD = struct.Struct("<II")
_SIZE_AT = 4
_ERROR_AT, _ERROR_BIT = 8, 0x20
_REGION_INFO_SIZE = 32
_STATE_SET = Feature.MIG_DEVICE_STATE | FeatureFlags.SET
_READ = message(Command.MIG_DATA_READ, encode(MigDataRead(8 + PORTION, PORTION)))


def _set_state(state: DeviceState) -> bytes:
    data = encode(FeatureDeviceState(int(state)))
    return encode(DeviceFeature(8 + len(data), int(_STATE_SET), data))


class V2Mover:
    """A v2 client.

    Args:
        path: the function's socket.
    """

    def __init__(self, path: Path) -> None:
        self.client = RawClient.attach(path)
        self._buffer = memoryview(bytearray(_READ_HEAD + PORTION))
        self._have = 0
        self._wanted = HEADER_SIZE

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.client.sock.fileno()

    def state(self, state: DeviceState) -> None:
        """SET MIG_DEVICE_STATE."""
        self.client.call(Command.DEVICE_FEATURE, _set_state(state))

    def save(self, keep: list[bytes] | None = None) -> int:
        """Stop the function and read its state to the end; returns how many bytes.

        Args:
            keep: takes the portions.
        """
        self.state(DeviceState.STOP_COPY)
        return self._read_all(keep)

    def pre_copy(self) -> list[bytes]:
        """Begin to save while the function runs; returns what there is by then."""
        self.state(DeviceState.PRE_COPY)
        portions: list[bytes] = []
        self._read_all(portions)
        return portions

    def _read_all(self, keep: list[bytes] | None) -> int:
        total = 0
        while True:
            self.client.sock.sendall(_READ)
            while not self._take():
                pass
            count = self._have - _READ_HEAD
            total += count
            if keep is not None:
                keep.append(bytes(self._buffer[_READ_HEAD : self._have]))
            if count < PORTION:
                return total

    def load(self, portions: Sequence[bytes]) -> None:
        """Write a state, and let the function run with it."""
        self.begin_load()
        self.write(portions)
        self.run()

    def begin_load(self) -> None:
        """Have the function wait for a state."""
        self.state(DeviceState.RESUMING)

    def write(self, portions: Sequence[bytes]) -> None:
        """Write a part of a state."""
        for portion in portions:
            self.client.call_from(Command.MIG_DATA_WRITE, (_WRITE_HEAD.pack(8 + len(portion), len(portion)), portion))

    def run(self) -> None:
        """Let the function run."""
        self.state(DeviceState.RUNNING)

    def _take(self) -> bool:
        """Read what is there of a reply; returns whether it is whole."""
        if self._have == self._wanted:
            self._have, self._wanted = 0, HEADER_SIZE
        buffer, sock = self._buffer, self.client.sock
        # One request is out, so nothing can come behind its reply.
        count = sock.recv_into(buffer[self._have :])
        if not count:
            raise BenchFailed("the server closed the connection")
        self._have += count
        if self._have >= HEADER_SIZE == self._wanted:
            (self._wanted,) = _SIZE.unpack_from(buffer, _SIZE_AT)
            if buffer[_ERROR_AT] & _ERROR_BIT or not HEADER_SIZE <= self._wanted <= len(buffer):
                raise BenchFailed("the server refused MIG_DATA_READ")
        return self._have == self._wanted

    @staticmethod
    def save_all(movers: Sequence[V2Mover]) -> int:
        """Save several functions at the same time; returns how many bytes they have together."""
        total = 0
        with selectors.DefaultSelector() as selector:
            for each in movers:
                selector.register(each, selectors.EVENT_READ, each)
                each.client.sock.sendall(message(Command.DEVICE_FEATURE, _set_state(DeviceState.STOP_COPY)))
            reading: set[V2Mover] = set()
            while selector.get_map():
                for key, _ in selector.select():
                    mover: V2Mover = key.data
                    if not mover._take():
                        continue
                    count = max(0, mover._have - _READ_HEAD) if mover in reading else PORTION
                    total += count if mover in reading else 0
                    reading.add(mover)
                    if count < PORTION:
                        selector.unregister(mover)
                    else:
                        mover.client.sock.sendall(_READ)
        return total

    def close(self) -> None:
        """Hang up."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class V1Mover:
    """A v1 client that has mapped the data section.

    Args:
        path: the function's socket.
    """

    def __init__(self, path: Path) -> None:
        self.client = RawClient.attach(path, migration=True)
        request = encode(RegionInfo(1024, 0, int(RegionIndex.MIGRATION)))
        body, fds = self.client.call_for_fds(Command.DEVICE_GET_REGION_INFO, request)
        info = decode(RegionInfo, body[:_REGION_INFO_SIZE])
        if not fds:
            raise BenchFailed("the migration region cannot be mapped")
        self._window = mmap.mmap(fds[0], info.size, offset=info.offset)
        self._buffer = memoryview(bytearray(info.size))
        os.close(fds[0])

    def _read(self, register: MigrationRegister) -> int:
        rule = REGISTERS[register]
        body = self.client.call(
            Command.REGION_READ, encode(RegionRead(rule.offset, int(RegionIndex.MIGRATION), rule.size))
        )
        return int.from_bytes(decode(RegionReadReply, body).data, "little")

    def _write(self, register: MigrationRegister, value: int) -> None:
        rule = REGISTERS[register]
        data = value.to_bytes(rule.size, "little")
        request = encode(RegionWrite(rule.offset, int(RegionIndex.MIGRATION), rule.size, data))
        self.client.call(Command.REGION_WRITE, request)

    def save(self, keep: list[bytes] | None = None) -> int:
        """Stop the function and read its state to the end; returns how many bytes.

        Args:
            keep: takes the portions.
        """
        self._write(MigrationRegister.DEVICE_STATE, STOP_COPY)
        total = 0
        while self._read(MigrationRegister.PENDING_BYTES):
            portion = self._portion()
            total += len(portion)
            if keep is not None:
                keep.append(bytes(portion))
        self._write(MigrationRegister.DEVICE_STATE, STOPPED)
        return total

    def pre_copy(self) -> list[bytes]:
        """Begin to save while the function runs; returns the first portion."""
        self._write(MigrationRegister.DEVICE_STATE, PRE_COPY)
        return [bytes(self._portion())] if self._read(MigrationRegister.PENDING_BYTES) else []

    def _portion(self) -> memoryview:
        """The next portion, as a program has it that takes it out of the window once."""
        offset, size = self._read(MigrationRegister.DATA_OFFSET), self._read(MigrationRegister.DATA_SIZE)
        portion = self._buffer[:size]
        with memoryview(self._window) as window:
            portion[:] = window[offset : offset + size]
        return portion

    def load(self, portions: Sequence[bytes]) -> None:
        """Write a state, and let the function run with it."""
        self.begin_load()
        self.write(portions)
        self.run()

    def begin_load(self) -> None:
        """Have the function wait for a state."""
        self._write(MigrationRegister.DEVICE_STATE, RESUMING)

    def write(self, portions: Sequence[bytes]) -> None:
        """Write a part of a state."""
        for portion in portions:
            offset = self._read(MigrationRegister.DATA_OFFSET)
            self._window[offset : offset + len(portion)] = portion
            self._write(MigrationRegister.DATA_SIZE, len(portion))

    def run(self) -> None:
        """Let the function run."""
        self._write(MigrationRegister.DEVICE_STATE, RUNNING)

    def close(self) -> None:
        """Unmap and hang up."""
        self._window.close()
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
