"""Migration by DEVICE_FEATURE, and the log of dirty pages."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mutants.device import MIGRATION, PAGE, Refused
from mutants.region_v1 import RegionV1

if TYPE_CHECKING:
    from mutants.dma import Map
    from mutants.server import Command
    from mutants.session import Session

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY = 0, 1, 2, 3, 4, 6
TRANSFER = 1 << 20
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
METHODS = {1: GET, 2: GET | SET, 6: SET, 7: SET, 8: GET}
#: Direct ways: what a step from one state to another needs besides.
ARCS = {
    (RUNNING, STOP),
    (RUNNING, PRE_COPY),
    (STOP, RUNNING),
    (STOP, STOP_COPY),
    (STOP, RESUMING),
    (STOP_COPY, STOP),
    (RESUMING, STOP),
    (PRE_COPY, RUNNING),
    (PRE_COPY, STOP_COPY),
}
SAVING = {STOP_COPY, PRE_COPY}


def path(begin: int, end: int) -> list[int] | None:
    """The shortest way whose inner states are no saving ones."""
    if (begin, end) == (STOP_COPY, PRE_COPY):
        return None
    ways: list[list[int]] = [[begin]]
    for way in ways:
        if way[-1] == end:
            return way[1:]
        if len(way) > 1 and way[-1] in SAVING:
            continue
        ways += [[*way, state] for state in (STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY)
                 if (way[-1], state) in ARCS and state not in way]  # fmt: skip
    return None


class Migration:
    """The migration of one connection's device."""

    def __init__(self, session: Session) -> None:
        self.session, self.device = session, session.device
        self.bad, self.need, self.variant = session.bad, session.need, session.server.variant
        self.stream = b""
        self.at = 0
        self.loaded = bytearray()
        self.log: int | None = None
        self.dirty: set[int] = set()
        self.cancelled = False
        self.region: RegionV1 | None = None
        if self.variant.migration:
            self.region = RegionV1(self, session.server)
        if self.bad("migration/starts-stopped"):
            self.device.state = STOP
        if self.bad("logging/survives-connection"):
            self.log = getattr(session.server, "log", None)

    def end(self) -> None:
        """The client has gone: the device runs again."""
        if self.region is not None:
            self.region.end()
        if self.bad("migration/disconnect-keeps-state"):
            self.device.state = ERROR if self.device.state != RUNNING else RUNNING
        else:
            self.device.state = RUNNING
        self.session.server.log = self.log  # type: ignore[attr-defined]

    def reset(self) -> None:
        """DEVICE_RESET."""
        self.device.state = STOP if self.bad("migration/reset-keeps-state") and self.device.state == 3 else RUNNING
        self.stream, self.loaded = b"", bytearray()
        if self.region is not None:
            self.region.reset()

    def check_access(self, region: int) -> None:
        """Regions may be accessed in every state."""

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """A read that the device answers."""
        if region == MIGRATION and self.region is not None:
            return self.region.read(offset, count)
        return self.device.read(region, offset, count)

    def region_write(self, region: int, offset: int, data: bytes) -> int | None:
        """A write that the device takes."""
        if region == MIGRATION and self.region is not None:
            self.region.write(offset, data)
            return None
        return self.device.write(region, offset, data)

    def dirty_pages(self, command: Command, fds: list[int]) -> bytes:
        """DIRTY_PAGES."""
        if self.region is None:
            offered = self.bad("frame/unoffered-command-ok") or self.bad("dirty/offered-without-migration")
            self.need("", offered, 95)
            return b""
        return self.region.dirty_pages(command)

    # DEVICE_FEATURE

    def feature(self, command: Command, fds: list[int]) -> bytes:
        """DEVICE_FEATURE."""
        payload, need, bad = command.payload, self.need, self.bad
        need("feature/short-ok", len(payload) >= 8)
        if len(payload) < 8:
            return payload
        argsz, flags = struct.unpack_from("<II", payload.ljust(8, b"\0"))
        index, methods = flags & 0xFFFF, flags & (GET | SET)
        need("feature/unknown-flag-ok", not flags >> 19)
        if not self.variant.migration:
            need("", bad("feature/offered-without-migration") and methods == SET)
            return payload
        need("feature/unknown-ok", index in METHODS)
        if index not in METHODS:
            return payload
        if flags & PROBE:
            return self._probe(payload, argsz, index, methods)
        need("feature/get-and-set-ok", methods in (GET, SET))
        if methods & ~METHODS[index]:
            need("feature/set-migration-ok", False)
            return payload
        if methods == SET:
            need("feature/set-argsz-ok", argsz >= len(payload))
            return self._set(index, payload)
        return self._get(index, argsz, flags, payload)

    def _probe(self, payload: bytes, argsz: int, index: int, methods: int) -> bytes:
        need, bad = self.need, self.bad
        wrong = methods & ~METHODS[index]
        need("feature/set-migration-ok" if index == 1 else "feature/probe-wrong-method-ok", not wrong)
        need("feature/probe-argsz-ok", argsz >= len(payload))
        need("", methods or not bad("feature/probe-alone-refused"))
        need("", methods != GET | SET or not bad("feature/probe-both-refused"))
        if bad("feature/probe-sets") and index == 2 and len(payload) >= 16:
            self.device.state = struct.unpack_from("<I", payload, 8)[0]
        return b"" if bad("feature/probe-no-echo") else payload

    def _get(self, index: int, argsz: int, flags: int, payload: bytes) -> bytes:
        if index == 8:
            return self._report(argsz, payload)
        self.need("feature/small-argsz-ok", argsz >= 16)
        value = self.device.state
        if index == 1:
            value = 1 | (4 if self.variant.pre_copy else 0)
            if self.bad("feature/migration-flags-empty"):
                value = 0
        said = 0 if self.bad("feature/golden-refused") else flags
        return struct.pack("<IIQ", 16, said, value)

    def _set(self, index: int, payload: bytes) -> bytes:
        if index == 2:
            self.need("feature/set-short-ok", len(payload) >= 16)
            if len(payload) < 12:
                return payload
            self._set_state(struct.unpack_from("<I", payload, 8)[0])
            if self.bad("migration/golden-refused"):
                return payload[:12] + b"\x55" * 4
        elif index == 6:
            return self._start(payload)
        else:
            self.need("", self.log is not None or not self.bad("logging/second-stop-refused"))
            self.log = None
        return payload[:8] if self.bad("feature/set-no-echo") else payload

    # States

    def _set_state(self, state: int) -> None:
        pre_copy = self.variant.pre_copy or self.bad("migration/unoffered-pre-copy-ok")
        if state == 99 and self.bad("migration/odd-error-number"):
            raise Refused(5000)
        known = state in (STOP, RUNNING, STOP_COPY, RESUMING) or (state == PRE_COPY and pre_copy)
        self.need("migration/odd-state-ok", known)
        if not known:
            return
        begin = self.device.state
        self.need("", begin != state or not self.bad("migration/self-arc-refused"))
        way = path(begin, state)
        if way is None:
            self.need("migration/stop-copy-to-pre-copy-ok", False)
            way = [state]
        if self.bad("migration/arc-lost") and (begin, state) == (STOP_COPY, RESUMING):
            raise Refused
        if self.bad("migration/pre-copy-arc-lost") and (begin, state) == (PRE_COPY, STOP):
            raise Refused
        if self.bad("migration/set-early") and state == STOP:
            return
        for step in way:
            self._step(self.device.state, step)

    def _step(self, begin: int, end: int) -> None:
        if begin == RESUMING:
            stream = bytes(self.loaded)
            while stream.startswith(b"PRECOPY."):
                stream = stream[8:]
            whole = self.device.restore(stream) if not self.bad("migration/load-lost") else True
            early = b"PRECOPY." in self.loaded
            if self.bad("migration/pre-copy-load-lost") and early:
                whole = False
            if not whole and self.bad("migration/failed-load-odd-error"):
                raise Refused(5000)
            if not whole and self.bad("migration/failed-load-runs"):
                self.device.state = RUNNING
                raise Refused
            if whole and self.loaded and self.bad("client/replay-refused"):
                self.need("", not self.device.restored)
            self.device.restored |= whole
            empty = not self.loaded  # a session that got nothing at all changes nothing
            self.loaded = bytearray()
            self.need("migration/half-stream-ok", whole or empty)
        if end in SAVING and begin not in SAVING:
            self.stream, self.at = b"PRECOPY." if end == PRE_COPY else b"", 0
            if self.cancelled and self.bad("migration/cancelled-goes-on"):
                self.stream = b"??"
        if end == STOP_COPY:
            again = self.bad("migration/second-save-empty") and getattr(self, "_saved", False)
            self.stream += b"" if again else self.device.snapshot()
            self._saved = True
        if begin in SAVING and end not in SAVING:
            self.stream, self.at = b"", 0
            self.cancelled = begin == PRE_COPY
        self.device.state = end
        if self.bad("migration/stopped-silent") and end == STOP_COPY:
            time.sleep(2)

    # Data

    def read(self, command: Command, fds: list[int]) -> bytes:
        """MIG_DATA_READ."""
        payload, need = command.payload, self.need
        need("feature/offered-without-migration", self.variant.migration)
        need("migration/bad-read-ok", len(payload) >= 8)
        need("", len(payload) <= 8 or not self.bad("client/surplus-refused"))
        argsz, size = struct.unpack_from("<II", payload.ljust(8, b"\0"))
        need("migration/read-anywhere-ok", self.device.state in SAVING)
        need("migration/bad-read-ok", argsz >= 8 + size)
        limit = self.session.connection.capabilities.get("max_data_xfer_size", TRANSFER)
        need("migration/client-limit-ignored", size <= limit)
        need("", size or not self.bad("migration/read-nothing-refused"))
        if size > limit:
            return struct.pack("<II", 8 + size, size) + bytes(size)
        if self.bad("migration/read-restarts") and size == 7:
            self.at = 0
        data = self.stream[self.at : self.at + size]
        if self.bad("migration/end-repeats") and not data:
            data = self.stream[:size]
        self.at += len(data)
        if self.bad("migration/pipelined-read-mixed") and size == 8 and command.msg_id == 3:
            data = data[:5]
        said = size if self.bad("migration/golden-read-refused") else 8 + len(data)
        tail = b"??" if self.bad("migration/short-read-odd") and len(data) < size else b""
        if self.bad("client/padded-reads"):
            tail = bytes(size - len(data))
        return struct.pack("<II", said, len(data)) + data + tail

    def write(self, command: Command, fds: list[int]) -> bytes:
        """MIG_DATA_WRITE."""
        payload, need = command.payload, self.need
        need("feature/offered-without-migration", self.variant.migration)
        need("migration/bad-write-ok", len(payload) >= 8)
        argsz, size = struct.unpack_from("<II", payload.ljust(8, b"\0"))
        need("migration/write-anywhere-ok", self.device.state == RESUMING)
        need("migration/bad-write-ok", len(payload) - 8 >= size)
        need("migration/write-over-limit-ok", size <= TRANSFER)
        need("migration/write-argsz-ok", argsz >= 8 + size or len(payload) - 8 < size)
        need("", size or not self.bad("migration/write-nothing-refused"))
        data = payload[8 : 8 + size]
        if self.bad("migration/chunks-matter") and size == 3:
            data = b""
        self.loaded += data
        return b""

    # The log

    def mark(self, pages: Iterable[int]) -> None:
        """The device wrote to these pages."""
        if self.log is not None:
            self.dirty.update(pages)

    def _start(self, payload: bytes) -> bytes:
        need, bad = self.need, self.bad
        size, ranges = struct.unpack_from("<QI", payload.ljust(24, b"\0"), 8)
        need("", self.session.dma.maps or not bad("logging/start-needs-map"))
        need("logging/zero-page-size-ok", size)
        need("logging/ranges-missing-ok", len(payload) >= 24 + 16 * ranges)
        if size & (size - 1):
            if bad("logging/odd-page-size-broken"):
                return payload[:8] + struct.pack("<Q", 5) + payload[16:]
            raise Refused
        need("logging/other-start-ok", self.log in (None, size))
        if self.log is not None and bad("logging/second-start-forgets-mode"):
            self.log = None
            return payload
        if self.log is None and not bad("logging/restart-keeps"):
            self.dirty.clear()
        self.log = size
        if bad("logging/page-size-zero-said"):
            size = 0
        return payload[:8] + struct.pack("<Q", size) + payload[16:]

    def _report(self, argsz: int, payload: bytes) -> bytes:
        need, bad = self.need, self.bad
        need("logging/bad-report-ok", len(payload) >= 32)
        address, length, size = struct.unpack_from("<QQQ", payload.ljust(32, b"\0"), 8)
        well = size and not size & (size - 1) and length >= size
        need("logging/bad-report-ok", well)
        need("", size < 16 * PAGE or not bad("logging/large-page-refused"))
        need("logging/report-unlogged-ok" if not bad("logging/survives-connection") else "", self.log is not None)
        maps = self.session.dma.maps
        covered = any(old.address <= address and address + length <= old.end for old in maps)
        need("", covered or not bad("client/upstream-ranges"))
        need("logging/report-unmapped-ok", any(old.address < address + length and address < old.end for old in maps), 2)
        if not well:
            return payload
        bitmap = self.bitmap(address, length, size)
        need("logging/small-argsz-ok", argsz >= 32 + len(bitmap))
        if bad("logging/bitmap-short"):
            bitmap = bitmap[: -(-length // size) // 8 + 1]
        said = 0 if bad("logging/golden-refused") else 32 + len(bitmap)
        return struct.pack("<II", said, GET | 8) + payload[8:32] + bitmap

    def bitmap(self, address: int, length: int, size: int) -> bytes:
        """The bits of a range, which are cleared by it."""
        pages = -(-length // size)
        bitmap = bytearray((pages + 63) // 64 * 8)
        if self.bad("logging/page-size-ignored"):
            size = PAGE
        for page in sorted(self.dirty):
            begin = page * PAGE - address
            if begin + PAGE <= 0 or begin >= length:
                continue
            self.dirty.discard(page)
            if self.bad("logging/stale-bit"):
                self.dirty.add(page)
            if self.bad("logging/late-map-lost"):
                continue
            for n in range(max(begin, 0) // size, min((begin + PAGE - 1) // size + 1, pages)):
                self._set_bit(bitmap, n)
        if self.bad("logging/clean-is-dirty"):
            bitmap[0] |= 1
        if self.bad("logging/sub-range-wrong") and length != 0x10000:
            bitmap[-1] |= 0x80
        return bytes(bitmap)

    def _set_bit(self, bitmap: bytearray, n: int) -> None:
        if self.bad("logging/wrong-bit"):
            bitmap[n // 8] |= 0x80 >> n % 8
        elif n % 8 != 7 or not self.bad("logging/edge-bit-lost"):
            bitmap[n // 8] |= 1 << n % 8

    def unmap_bitmap(self, old: Map, argsz: int, payload: bytes) -> bytes:
        """The bitmap that DMA_UNMAP gives."""
        self.need("logging/bad-unmap-bitmap-ok", self.log is not None and len(payload) >= 40)
        size, length = struct.unpack_from("<QQ", payload.ljust(40, b"\0"), 24)
        bitmap = self.bitmap(old.address, old.size, size or PAGE)
        self.need("logging/bad-unmap-bitmap-ok", length == len(bitmap))
        self.need("", argsz >= 40)
        if self.bad("dirty/unmap-by-argsz") and argsz < 40 + len(bitmap):
            return bitmap[: argsz - 40]
        return b"" if self.bad("logging/unmap-no-bitmap") else bitmap
