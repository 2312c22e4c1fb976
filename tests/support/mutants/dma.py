"""Client memory: maps, the device's DMA through files or by messages, and the log of what was written."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import time
from typing import TYPE_CHECKING

from mutants.device import BAR1_SIZE, PAGE, Crash, Refused

if TYPE_CHECKING:
    from mutants.server import Command
    from mutants.session import Session

TRANSFER = 1 << 20
_MAPS_MAX = 256


class Fault(Exception):
    """A DMA that failed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Map:
    """One range of client memory."""

    def __init__(self, address: int, size: int, flags: int, offset: int, fd: int, file: tuple[int, int] | None) -> None:
        self.address, self.size, self.flags = address, size, flags
        self.offset, self.fd, self.file = offset, fd, file
        self.private: bytearray | None = None

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.size


class Dma:
    """The maps of one connection and the device's transfers."""

    def __init__(self, session: Session) -> None:
        self.session, self.device = session, session.device
        self.bad, self.need = session.bad, session.need
        self.maps: list[Map] = []
        self.dirty: set[int] = set()
        self.next_id = 1
        self.cycles = 0
        self.limit = _MAPS_MAX
        if self.bad("session/maps-survive"):
            self.maps = getattr(session.server, "maps", self.maps)
            session.server.maps = self.maps  # type: ignore[attr-defined]

    # Maps

    def map(self, command: Command, fds: list[int]) -> bytes:
        """DMA_MAP."""
        payload, need, bad = command.payload, self.need, self.bad
        need("dma-map/small-argsz-ok", len(payload) >= 32)
        argsz, flags, offset, address, size = struct.unpack_from("<IIQQQ", payload.ljust(32, b"\0"))
        need("dma-map/small-argsz-ok", argsz >= 32 or len(payload) < 32)
        need("", not bad("dma-map/larger-argsz-refused") or (argsz == 32 and len(payload) == 32))
        fd = command.fds[0] if command.fds else -1
        need("", not bad("dma-map/fd-refused") or fd < 0)
        need("", not bad("dma-map/no-fd-refused") or fd >= 0)
        need("", not bad("client/qemu-private") or fd >= 0 or flags != 3 or size < 1 << 20)
        need("", not bad("client/qemu-run") or address != 0xFE001000)
        need("", not bad("client/sample") or size != 0x1000 or fd < 0)
        need("dma-map/unknown-flags-ok", not flags & ~0xF)
        need("dma-map/mmap-flag-without-fd-ok", not flags & 0xC or fd >= 0)
        need("dma-map/size-zero-ok", size)
        need("dma-map/wrap-ok", address + size <= 1 << 64)
        need("", address + size != 1 << 64 or not bad("dma-map/top-refused"))
        need("", not offset or not bad("dma-map/offset-refused"))
        new = Map(address, size, flags & 3, offset, -1, self._file(fd, flags))
        if self._known(new):
            return b""
        if size >= 1 << 47 and bad("dma-map/giant-kills"):
            raise Crash
        if size >= 1 << 47 and bad("dma-map/giant-drops-others"):
            self.end()
        announced = "max_dma_maps" in self.session.connection.capabilities
        fault = "dma-map/limit-drops-first" if announced else "dma-map/unannounced-drops-first"
        if len(self.maps) >= self.limit and bad(fault):
            self._release(self.maps.pop(0))
        need("", len(self.maps) < self.limit, 28)
        if fd >= 0:
            self._take(new, command)
        self.maps.append(new)
        return b""

    def _file(self, fd: int, flags: int) -> tuple[int, int] | None:
        if fd < 0:
            return None
        found = os.fstat(fd)
        self.need("dma-map/pipe-ok", stat.S_ISREG(found.st_mode), 13)
        if not stat.S_ISREG(found.st_mode):
            return found.st_dev, found.st_ino
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        self.need("dma-map/read-only-file-ok", not flags & 2 or mode == os.O_RDWR, 13)
        self.need("", mode == os.O_RDWR or not self.bad("dma-map/read-only-refused"))
        return found.st_dev, found.st_ino

    def _known(self, new: Map) -> bool:
        """Whether exactly this is mapped; refuses what overlaps in another way."""
        for old in self.maps:
            same_range = (old.address, old.size) == (new.address, new.size)
            if same_range and (old.flags, old.offset, old.file) == (new.flags, new.offset, new.file):
                if self.bad("dma-map/same-twice-lost"):
                    self._release(old)
                    self.maps.remove(old)
                return True
            if old.address < new.end and new.address < old.end:
                self.need("dma-map/other-properties-ok" if same_range else "dma-map/overlap-ok", False, 17)
        return False

    def _take(self, new: Map, command: Command) -> None:
        new.fd = command.fds.pop(0)
        size = os.fstat(new.fd).st_size
        if self.bad("dma-map/beyond-file-kills") and size < new.offset + new.size:
            raise Crash
        if self.bad("dma/map-not-shared"):
            new.private = bytearray(new.size)
        if self.bad("dma/offset-ignored"):
            new.offset = 0
        if command.fds and self.bad("dma-map/second-fd-kept"):
            self.session.server.kept.extend(command.fds)
            command.fds.clear()

    def _release(self, old: Map, fault: str = "") -> None:
        if old.fd < 0:
            return
        self.cycles += 1
        if self.bad("dma-map/unmap-keeps-file") or (self.bad("dma-map/cycles-leak") and self.cycles == 200):
            self.session.server.kept.append(old.fd)
        else:
            os.close(old.fd)

    def unmap(self, command: Command, fds: list[int]) -> bytes:
        """DMA_UNMAP."""
        payload, need, bad = command.payload, self.need, self.bad
        need("dma-map/small-unmap-ok", len(payload) >= 24)
        argsz, flags, address, size = struct.unpack_from("<IIQQ", payload.ljust(24, b"\0"))
        if argsz > TRANSFER and bad("dma-map/refused-unmap-done"):
            self.end()
        need("dma-map/small-unmap-ok", argsz >= 24 or len(payload) < 24)
        need("dma-map/large-unmap-padded", argsz <= TRANSFER)
        need("", not bad("dma-map/long-unmap-refused") or len(payload) == 24)
        need("dma-map/unmap-flags-ok", not flags & ~3)
        need("dma-map/unmap-all-address-ok", not flags & 2 or not (address or size or flags & 1))
        if flags & 2:
            need("", not bad("dma-map/unmap-all-refused"))
            self.end()
            return payload[:24]
        found = next((old for old in self.maps if (old.address, old.size) == (address, size)), None)
        bitmap = b""
        if bad("dma-map/giant-bitmap-ok") and payload[36:40] == b"\xff" * 4:
            flags = 0  # 40 bytes more than that are few
        if flags & 1 and found is not None:
            bitmap = self.session.migration.unmap_bitmap(found, argsz, payload)
        if found is None:
            near = any(old.address < address + size and address < old.end for old in self.maps)
            need("dma-map/partial-unmap-ok" if near else "dma-map/unmap-nothing-ok", False, 2)
        elif not bad("dma/unmap-ignored"):
            self.maps.remove(found)
            if bad("logging/unmap-forgets"):
                self.session.migration.dirty.clear()
            self._release(found)
        if bad("dma-map/unmap-no-echo"):
            return b""
        return payload[: 40 if bitmap else 24] + bitmap + bytes(64 if argsz > TRANSFER else 0)

    def end(self) -> None:
        """Forget all maps."""
        if self.bad("session/maps-survive"):
            return
        for old in self.maps:
            self._release(old)
        self.maps.clear()

    # The device's transfers

    def order(self, value: int) -> None:
        """The register that starts a transfer was written."""
        address = struct.unpack_from("<Q", self.device.registers, 0x18)[0]
        self.device.pending = (value, address, min(self.device.get(0x20), BAR1_SIZE))
        self.device.set(0x28, 1)
        if self.bad("dma/waits-in-handler") or (self.bad("migration/stopped-dma") and self.device.state == 1):
            self.work(forced=True)

    def work(self, *, forced: bool = False) -> None:
        """Do what was ordered, unless the device is stopped."""
        running = self.device.state == 2 or (self.device.state == 6 and not self.bad("migration/pre-copy-stops"))
        if self.device.pending is None or not (running or forced):
            return
        (value, address, count), self.device.pending = self.device.pending, None
        number = 0
        try:
            if value & 0xFF == 1:
                data = self._read(address, count)
                self.device.buffer[:count] = data
            elif value & 0xFF == 2:
                self._write(address, bytes(self.device.buffer[:count]))
        except Fault as fault:
            number = fault.number
        except Crash:
            raise
        except Exception:
            if self.bad("dma/leave-kills"):
                raise Crash from None
            raise
        if number and self.bad("dma/error-reply-ignored"):
            number = 0
        self.device.set(0x2C, number)
        self.device.set(0x28, 3 if number else 2)
        if value & 0x100:
            self.session.raise_irq(2, 0)

    def _parts(self, address: int, count: int, access: int) -> list[tuple[Map, int, int]]:
        """Which maps a range lies in: (map, offset inside, bytes)."""
        parts: list[tuple[Map, int, int]] = []
        while count:
            found = next((old for old in self.maps if old.address <= address < old.end), None)
            if found is None or (not found.flags & access and not self.bad("dma/read-only-written")):
                if self.bad("dma/unmapped-asked"):
                    outside = Map(address, count, 3, 0, -1, None)
                    return [*parts, (outside, 0, count)]
                raise Fault(14)
            size = min(count, found.end - address)
            parts.append((found, address - found.address, size))
            address, count = address + size, count - size
        if len(parts) > 1 and self.bad("dma/adjacent-refused"):
            raise Fault(14)
        return parts

    def _chunks(self, count: int) -> list[int]:
        most = self.session.connection.capabilities.get("max_data_xfer_size", TRANSFER)
        if self.bad("dma/client-limit-ignored"):
            most = TRANSFER
        if self.bad("dma/odd-count") and count % 2 and count > 1:
            count -= 1
        return [min(most, count - at) for at in range(0, count, most)]

    def _read(self, address: int, count: int) -> bytes:
        data = b""
        for part, offset, size in self._parts(address, count, 1):
            if part.fd >= 0 and not self.bad("client/rust-asked"):
                data += self._file_read(part, offset, size)
                if self.bad("logging/reads-dirty"):
                    self._mark(part.address + offset, size)
                continue
            at = part.address + offset
            for chunk in self._chunks(size):
                reply = self._ask(11, at, chunk, b"")
                begin = 12 if self.bad("dma/read-data-shifted") else 16
                data += reply[begin : begin + chunk].ljust(chunk, b"\0")
                at += chunk
        return data.ljust(count, b"\0")

    def _file_read(self, part: Map, offset: int, size: int) -> bytes:
        if part.private is not None:
            return bytes(part.private[offset : offset + size])
        data = os.pread(part.fd, size, part.offset + offset)
        if len(data) < size:
            if self.bad("dma/cut-file-kills"):
                raise Crash
            raise Fault(5)
        return data

    def _write(self, address: int, data: bytes) -> None:
        for part, offset, size in self._parts(address, len(data), 2):
            piece, data = data[:size], data[size:]
            if part.private is not None:
                part.private[offset : offset + size] = piece
            elif part.fd >= 0:
                if os.fstat(part.fd).st_size < part.offset + offset + size:
                    raise Fault(5)
                try:
                    os.pwrite(part.fd, piece, part.offset + offset)
                except OSError:
                    raise Fault(13) from None
                self._mark(part.address + offset, size)
            else:
                at = part.address + offset
                for chunk in self._chunks(size):
                    sent = piece[:chunk]
                    if self.bad("dma/write-data-shifted"):
                        sent = sent[-4:] + sent[:-4]
                    self._ask(12, at, chunk, sent)
                    at, piece = at + chunk, piece[chunk:]

    def _mark(self, address: int, size: int) -> None:
        """Note the pages as dirty."""
        last = address if self.bad("logging/first-page-only") else address + size - 1
        self.session.migration.mark(range(address // PAGE, last // PAGE + 1))

    def _ask(self, number: int, address: int, count: int, data: bytes) -> bytes:
        """Send DMA_READ or DMA_WRITE and take the reply's payload."""
        connection = self.session.connection
        msg_id, self.next_id = self.next_id, self.next_id + 1 & 0xFFFF
        sock = connection.send_command(number, msg_id, struct.pack("<QQ", address, count) + data)
        if self.bad("dma/unmap-early"):
            self._answer_unmap()
        reply = connection.receive_reply(sock, msg_id)
        if reply.flags & 0x20:
            raise Fault(struct.unpack("<I", b"\x13\0\0\0")[0])
        if self.bad("dma/odd-reply-taken"):
            return reply.payload
        bare = number == 12 and not reply.payload and not self.bad("dma/bare-write-reply-refused")
        fits = len(reply.payload) == 16 + (count if number == 11 else 0)
        if not bare and (not fits or struct.unpack_from("<QQ", reply.payload) != (address, count)):
            raise Fault(5)
        return reply.payload

    def _answer_unmap(self) -> None:
        """Answer a DMA_UNMAP although the DMA goes on."""
        connection = self.session.connection
        time.sleep(0.02)
        for command in connection.queue[:]:
            if command.number == 3:
                connection.queue.remove(command)
                connection._reply(command, command.payload[:24])


__all__ = ["Dma", "Fault", "Map", "Refused"]
