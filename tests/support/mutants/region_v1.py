"""The migration region of the older generation, and DIRTY_PAGES."""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import TYPE_CHECKING

from mutants.device import MIGRATION, MMAP, PAGE, READ, WRITE, Refused, Region

if TYPE_CHECKING:
    from mutants.migration import Migration
    from mutants.server import Command, Server

STOPPED, RUNNING, STOP_COPY, PRE_COPY, RESUMING = 0, 1, 2, 3, 4
DATA, ROOM, CHUNK = 0x1000, 0x10000, 0x300
ALLOWED = {
    STOPPED: {RUNNING, STOP_COPY, RESUMING},
    RUNNING: {STOPPED, STOP_COPY, PRE_COPY, RESUMING},
    STOP_COPY: {STOPPED, RUNNING},
    PRE_COPY: {RUNNING, STOPPED, STOP_COPY},
    RESUMING: {RUNNING},
}
_EARLY = b"PRECOPY."


class RegionV1:
    """The region's registers and data, for one connection."""

    def __init__(self, migration: Migration, server: Server) -> None:
        self.migration, self.device = migration, server.device
        self.bad, self.need = server.bad, server.need
        self.state = STOPPED if self.bad("v1/starts-stopped") else getattr(server, "v1_state", RUNNING)
        self.fd = os.memfd_create("region", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, DATA + ROOM)
        self.memory = mmap.mmap(self.fd, DATA + ROOM)
        areas = ((DATA, ROOM),)
        size = 32 if self.bad("v1/empty-region") else DATA + ROOM
        shown = self.bad("v1/map-stale")
        mapped = os.memfd_create("other", os.MFD_CLOEXEC) if shown else self.fd
        if shown:
            os.ftruncate(mapped, DATA + ROOM)
            server.kept.append(mapped)
        self.device.regions[MIGRATION] = Region(size, READ | WRITE | MMAP, areas, (3, 1), mapped)
        self.stream = b""
        self.chunk: bytes | None = None
        self.asked = False
        self.loaded = bytearray()
        self.offset_moves = 0

    def end(self) -> None:
        """The client has gone."""
        self.migration.session.server.v1_state = (  # type: ignore[attr-defined]
            self.state if self.bad("v1/disconnect-keeps") and self.state == STOPPED else RUNNING
        )
        self.memory.close()
        os.close(self.fd)

    def reset(self) -> None:
        """DEVICE_RESET."""
        if self.bad("v1/reset-keeps") and self.state == PRE_COPY:
            return
        self.state = RESUMING if self.bad("v1/reset-stopped-breaks") and self.state == STOPPED else RUNNING
        self.stream, self.chunk = b"", None

    # Registers

    def read(self, offset: int, count: int) -> bytes:
        """A read of the region."""
        if offset >= DATA:
            data = bytes(self.memory[offset : offset + count])
            return data[::-1] if self.bad("v1/narrow-data-wrong") and count == 2 else data
        if offset == 4 and count == 4:
            return b"\1\0\0\0" if self.bad("v1/reserved-has-value") else bytes(4)
        if offset >= 32:
            self.need("v1/dead-space-ok", False)
            return bytes(count)
        width = 4 if offset == 0 else 8
        self.need("v1/odd-widths-ok", offset in (0, 8, 16, 24) and count == width)
        value = {0: self._state, 8: self._pending, 16: self._offset, 24: self._size}.get(offset, lambda: 0)()
        return value.to_bytes(8, "little")[:count]

    def _state(self) -> int:
        if self.bad("v1/stopped-silent") and self.state == STOPPED:
            time.sleep(2)
        return self.state

    def _pending(self) -> int:
        if self.state not in (STOP_COPY, PRE_COPY):
            return 0
        self.asked = True
        if self.chunk is not None:
            self.stream = self.stream[len(self.chunk) :]
        self.chunk = None
        if not self.stream and self.bad("v1/pending-again"):
            self._again = getattr(self, "_again", 0) + 1
            return self._again % 2
        return len(self.stream)

    def _prepare(self) -> None:
        self.need("v1/out-of-order-ok", self.state == RESUMING or (self.asked and self.state in (STOP_COPY, PRE_COPY)))
        if self.chunk is None and self.state != RESUMING:
            self.chunk = self.stream[:CHUNK]
            self.memory[DATA : DATA + len(self.chunk)] = self.chunk

    def _offset(self) -> int:
        self._prepare()
        if self.bad("v1/offset-moves"):
            self.offset_moves += 8
        return DATA + self.offset_moves

    def _size(self) -> int:
        self._prepare()
        return len(self.chunk or b"") + (ROOM if self.bad("v1/size-beyond") else 0)

    def write(self, offset: int, data: bytes) -> None:
        """A write to the region."""
        if offset >= DATA:
            self.memory[offset : offset + len(data)] = data
        elif (offset, len(data)) == (0, 4):
            self._set_state(int.from_bytes(data, "little"))
        elif (offset, len(data)) == (24, 8) and self.state == RESUMING:
            size = int.from_bytes(data, "little")
            self.need("", size == CHUNK or not self.bad("v1/parts-refused") or size < 100)
            self.loaded += self.memory[DATA : DATA + size]
        elif offset != 4:
            self.need("v1/read-only-written", False)

    def _set_state(self, state: int) -> None:
        if state >> 3 and self.bad("v1/reserved-bits-stop"):
            self.state = STOPPED
            return
        state &= 7
        self.need("v1/invalid-state-ok", state in ALLOWED)
        if state not in ALLOWED:
            return
        if state == self.state:
            self.need("", not self.bad("v1/self-refused"))
            return
        self.need("v1/forbidden-ok", state in ALLOWED[self.state])
        lost = {"v1/transition-lost": (STOP_COPY, RUNNING), "v1/cancel-refused": (PRE_COPY, RUNNING)}
        for name, arc in lost.items():
            self.need("", (self.state, state) != arc or not self.bad(name))
        if self.bad("v1/paused-breaks") and (self.state, state) == (STOPPED, STOP_COPY):
            self.state = RUNNING
            raise Refused
        self._enter(state)

    def _enter(self, state: int) -> None:
        if self.state == RESUMING and state == RUNNING and self.loaded:
            stream = bytes(self.loaded)
            early = stream.startswith(_EARLY)
            stream = stream[len(_EARLY) :] if early else stream
            skip = self.bad("v1/load-lost") or (early and self.bad("v1/pre-copy-load-lost"))
            if not skip and not self.device.restore(stream):
                raise Refused
        if state == PRE_COPY:
            self.stream = _EARLY
        if state == STOP_COPY:
            rest = self.stream[len(self.chunk or b"") :] if self.state == PRE_COPY else b""
            self.stream = rest + self.device.snapshot()
        if state in (STOPPED, RUNNING, RESUMING):
            self.stream = b""
        self.chunk, self.asked, self.loaded = None, False, bytearray()
        self.state = state

    # DIRTY_PAGES

    def dirty_pages(self, command: Command) -> bytes:
        """DIRTY_PAGES."""
        payload, need, bad = command.payload, self.need, self.bad
        need("dirty/short-ok", len(payload) >= 8)
        argsz, flags = struct.unpack_from("<II", payload.ljust(8, b"\0"))
        need("dirty/short-ok", argsz >= 8 or len(payload) < 8)
        if len(payload) < 8:
            return b""
        need("dirty/flags-ok", flags in (1, 2, 4))
        log = self.migration
        if flags == 1:
            need("", log.log is None or not bad("dirty/second-start-refused"))
            log.dirty.clear()
            log.log = PAGE
        elif flags == 2:
            log.log = None
        if flags != 4:
            return b""
        return self._get(argsz, payload)

    def _get(self, argsz: int, payload: bytes) -> bytes:
        need, bad, log = self.need, self.bad, self.migration
        need("dirty/get-short-ok", len(payload) >= 40)
        if len(payload) < 40:
            return payload
        need("", not bad("dirty/stopped-refused") or self.state == RUNNING)
        need("dirty/get-unstarted-ok", log.log is not None)
        address, size, page, length = struct.unpack_from("<QQQQ", payload, 8)
        if page != PAGE:
            need("dirty/sizes-ok", False)
            return payload
        found = next((old for old in log.session.dma.maps if old.address <= address < old.end), None)
        need("", found is not None, 2)
        assert found is not None
        bitmap = log.bitmap(address, size, page)
        need("dirty/sizes-ok", len(bitmap) == length)
        if bad("dirty/wrong-bit"):
            bitmap = bitmap[::-1]
        if bad("dirty/sub-range-wrong") and size == 4 * PAGE:
            bitmap = b"\xff" * len(bitmap)
        if bad("dirty/message-memory-dirty") and found.fd < 0:
            bitmap = b"\xff" * len(bitmap)
        full = 40 + len(bitmap)
        reply = struct.pack("<II", full, 4) + payload[8:40] + (bytes(8) if bad("dirty/bitmap-at-48") else b"") + bitmap
        if argsz < full:
            return reply[:8] + b"\xde\xad" * ((argsz - 8) // 2) if bad("dirty/short-leaks") and argsz > 8 else reply[:8]
        return reply
