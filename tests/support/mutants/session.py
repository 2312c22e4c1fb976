"""The commands of one connection: information, regions, interrupts."""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mutants.device import CAPS, CONFIG, IRQ_COUNTS, IRQ_FLAGS, READ, WRITE, Crash, Irq, Refused
from mutants.dma import Dma
from mutants.migration import Migration

if TYPE_CHECKING:
    from mutants.server import Command, Connection, Server

TRANSFER = 1 << 20


#: Descriptors of the ioeventfds of BAR0.
_IO_FD_INDEX = (0, 1, 0, 0xFFFFFFFF)


def _read_once(fd: int) -> None:
    """What the device does about an ioeventfd: take its count, if one comes soon."""
    ready, _, _ = select.select([fd], [], [], 0.5)
    if ready:
        os.read(fd, 8)
    os.close(fd)


class Session:
    """What one client has set up, and the commands that it may send."""

    def __init__(self, server: Server, connection: Connection) -> None:
        self.server, self.connection, self.device = server, connection, server.device
        self.bad, self.need = server.bad, server.need
        self.irqs = [Irq(count) for count in IRQ_COUNTS]
        self.dma = Dma(self)
        self.migration = Migration(self)
        self.resets = 0
        self.infos = 0
        self.table: dict[int, Callable[[Command, list[int]], bytes]] = {
            2: self.dma.map,
            3: self.dma.unmap,
            4: self.info,
            5: self.region_info,
            6: self.io_fds,
            7: self.irq_info,
            8: self.set_irqs,
            9: self.read,
            10: self.write,
            13: self.reset,
            14: self.migration.dirty_pages,
            15: self.write_multi,
            16: self.migration.feature,
            17: self.migration.read,
            18: self.migration.write,
        }
        if self.bad("session/eventfds-survive"):
            self.irqs = getattr(server, "irqs", self.irqs)
            server.irqs = self.irqs  # type: ignore[attr-defined]

    def work(self) -> None:
        """What the device does between commands."""
        self.dma.work()

    def end(self) -> None:
        """The client has gone."""
        if self.bad("session/burst-and-leave-kills") and self.dma.maps:
            raise Crash
        number, payload = self.server.heard[-1] if self.server.heard else (0, b"")
        if number == 2:
            self._left_in_map()
        if not self.bad("session/eventfds-survive"):
            for irq in self.irqs:
                self.drop(irq, range(irq.count))
        self.dma.end()
        self.migration.end()
        if number == 16 and payload[4:8] == b"\x02\0\x02\0":
            self._left_in_transition()
        if self.bad("session/registers-cleared"):
            self.device.config[0x3C] = self.device.config[0x3C] + 7 & 0xFF

    def _left_in_map(self) -> None:
        """The client has gone; its last command was DMA_MAP."""
        if self.bad("session/leave-in-map-kills"):
            raise Crash
        if self.bad("session/leave-in-map-keeps-file"):
            self.server.kept.extend(os.dup(old.fd) for old in self.dma.maps if old.fd >= 0)

    def _left_in_transition(self) -> None:
        """The client has gone; its last command was SET of the migration state."""
        if self.bad("session/leave-in-transition-kills"):
            raise Crash
        if self.bad("session/leave-in-transition-odd-state"):
            self.device.state = 4

    # Information

    def info(self, command: Command, fds: list[int]) -> bytes:
        """GET_INFO."""
        payload = command.payload
        self.need("info/short-payload-ok", len(payload) >= 16)
        payload = payload.ljust(16, b"\0")
        argsz, flags, regions, irqs = struct.unpack_from("<IIII", payload)
        self.need("info/small-argsz-ok", argsz >= 16 or len(command.payload) < 16)
        self.need("", len(payload) == 16 or not (self.bad("info/long-payload-refused") or self.bad("client/old-qemu")))
        self.need("", not (flags or regions or irqs) or not self.bad("info/request-fields-refused"))
        self.infos += 1
        count = len(self.device.regions)
        if self.bad("info/changes") and self.infos > 1:
            count += 1
        said = argsz if self.bad("info/argsz-echoed") else 0 if self.bad("info/argsz-zero") else 16
        found = (0 if self.bad("info/not-pci") else 2) | self.server.variant.reset
        return struct.pack("<IIII", said, found, count, len(self.irqs))

    def irq_info(self, command: Command, fds: list[int]) -> bytes:
        """GET_IRQ_INFO."""
        payload = command.payload
        argsz, _, index, _ = struct.unpack_from("<IIII", payload.ljust(16, b"\0"))
        self.need("info/irq-argsz-ok", len(payload) >= 16 and argsz >= 16)
        self.need("info/irq-index-ok", index < len(self.irqs))
        count = self.irqs[index].count if index < len(self.irqs) else 0
        self.need("", count or not self.bad("info/empty-irq-refused"))
        flags = IRQ_FLAGS[index] if index < len(self.irqs) else 0
        if index == 0 and self.bad("info/intx-no-automask"):
            flags = 3
        if index == 0 and self.bad("info/intx-flags-plain"):
            flags = 1
        if self.bad("info/too-many-vectors") and index == 1:
            count = 33
        if self.bad("info/msix-count-off") and index == 2:
            count -= 1
        said = 0 if self.bad("info/golden-irq") else argsz if self.bad("info/irq-argsz-echoed") else 16
        return struct.pack("<IIII", said, flags, 0 if self.bad("info/irq-index-not-echoed") else index, count)

    def region_info(self, command: Command, fds: list[int]) -> bytes:
        """GET_REGION_INFO."""
        payload = command.payload
        self.need("region-info/short-payload-ok", len(payload) >= 32)
        argsz, _, index, _ = struct.unpack_from("<IIII", payload.ljust(32, b"\0"))
        self.need("region-info/small-argsz-ok", argsz >= 32 or len(payload) < 32)
        known = index < len(self.device.regions)
        self.need("region-info/index-ok", known)
        self.need("", index != 3 or not self.bad("region-info/middle-refused"))
        region = self.device.regions[index if known else 3]
        size, flags, caps = region.size, region.flags, self._capabilities(index if known else 3)
        if index == 0 and self.bad("region-info/odd-bar-size"):
            size = 0x1800
        if index == 5 and self.bad("region-info/upper-half-has-size"):
            size = 0x1000
        if index == CONFIG and self.bad("region-info/config-size"):
            size = 512
        if index == 3 and self.bad("region-info/empty-has-flags"):
            flags = READ
        if index == 1 and self.bad("region-info/changes"):
            size <<= self.server.served & 1
        full, offset = 32 + len(caps), region.offset
        if region.fd >= 0 and self.bad("region-info/map-shows-other"):
            offset = 0
        whole = bool(caps) and argsz >= full
        said = argsz if self.bad("region-info/argsz-echoed") and not caps else full
        if whole and self.bad("region-info/full-form-short"):
            whole, caps = False, b""
        reply_flags = flags | (CAPS if whole else 0)
        at = 32 if whole else 0
        if caps and not whole and self.bad("region-info/caps-without-offset"):
            reply_flags |= CAPS
        reply = struct.pack("<IIIIQQ", said, reply_flags, index, at, size, offset) + (caps if whole else b"")
        return self._finish_region_info(reply, region.fd, caps, whole, argsz, fds)

    def _finish_region_info(self, reply: bytes, fd: int, caps: bytes, whole: bool, argsz: int, fds: list[int]) -> bytes:
        if caps and not whole and self.bad("region-info/short-too-long") and argsz == 32:
            reply += caps
        if caps and not whole and self.bad("region-info/partial-caps"):
            reply += caps[: argsz - 32]
        if self.bad("region-info/over-argsz") and argsz == 40:
            reply += bytes(64)
        early = self.bad("region-info/fd-in-short-form") and bool(caps)
        if fd >= 0 and (whole or early) and not self.bad("region-info/no-fd"):
            other = self.bad("region-info/map-is-copy") or self.bad("region-info/map-garbage")
            fds.append(self._copy() if other else fd)
        return reply

    def _copy(self) -> int:
        fd = os.memfd_create("copy", os.MFD_CLOEXEC)
        data = os.pread(self.device.memory_fd, 1 << 20, 0)
        os.pwrite(fd, b"\xa5" * len(data) if self.bad("region-info/map-garbage") else data, 0)
        self.server.kept.append(fd)
        return fd

    def _capabilities(self, index: int) -> bytes:
        region = self.device.regions[index]
        parts: list[tuple[int, bytes]] = []
        if region.kind:
            parts.append((2, struct.pack("<II", *region.kind)))
        if region.areas:
            body = struct.pack("<II", len(region.areas), 0)
            areas = region.areas
            if self.bad("region-info/area-outside") and index == 2:
                areas = (*areas[:-1], (region.size, 0x1000))
            parts.append((1, body + b"".join(struct.pack("<QQ", *area) for area in areas)))
        data, at = b"", 32
        for n, (number, body) in enumerate(parts):
            after = at + 8 + len(body)
            following = after if n + 1 < len(parts) else 32 if self.bad("region-info/cap-chain-loop") else 0
            data += struct.pack("<HHI", number, 1, following) + body
            at = after
        return data

    def io_fds(self, command: Command, fds: list[int]) -> bytes:
        """GET_REGION_IO_FDS: BAR0 has four ioeventfds, three of which share two descriptors, and one has none."""
        payload = command.payload
        argsz, flags, index, count = struct.unpack_from("<IIII", payload.ljust(16, b"\0"))
        if argsz > TRANSFER and self.bad("io-fd/large-argsz-kills"):
            raise Crash
        roomy = argsz > TRANSFER and self.bad("io-fd/large-argsz-padded")
        self.need("io-fd/small-argsz-ok", len(payload) >= 16 and 16 <= argsz and (argsz <= TRANSFER or roomy))
        self.need("io-fd/flags-ok", not flags and not count)
        self.need("io-fd/index-ok", index < len(self.device.regions))
        self.need("", index != CONFIG or not self.bad("client/io-fds-refused"))
        number = 4 if index == 0 else 0
        if self.bad("io-fd/empty-region-count") and index < 11 and not self.device.regions[index].size:
            number = 2
        full = 16 + 40 * number
        if self.bad("io-fd/argsz-off") and number:
            full += 5
        if self.bad("io-fd/golden-index"):
            index = 0
        reply = struct.pack("<IIII", full, 0, index, number)
        if number and argsz >= full:
            reply += b"".join(
                struct.pack(
                    "<QQIIIIQ", 0x100 + 8 * n, 8, 7 if self.bad("io-fd/index-outside") else _IO_FD_INDEX[n], 0, 0, 0, 0
                )
                for n in range(number)
            )
            for _ in range(3 if self.bad("io-fd/stray-fd") else 2):
                fds.append(os.eventfd(0, os.EFD_CLOEXEC))
                self.server.kept.append(fds[-1])
                if not self.bad("io-fd/never-read"):
                    threading.Thread(target=_read_once, args=(os.dup(fds[-1]),), daemon=True).start()
        return reply + bytes(64) if roomy else reply

    # Regions

    def _check(self, region: int, offset: int, count: int, access: int) -> bool:
        """Whether the range exists; refuses what does not, unless a fault lets it pass."""
        need, regions = self.need, self.device.regions
        need("region/index-ok", region < len(regions))
        if region >= len(regions):
            return False
        size = regions[region].size
        need("region/over-transfer-ok", count <= TRANSFER)
        if count > TRANSFER:
            return False
        end = offset + count
        if count == 0:
            need("", not self.bad("region/empty-access-refused"))
            need("region/empty-past-end-ok", offset <= size)
            return False
        if not size:
            need("region/empty-region-ok", False)
            return False
        name = "region/wrap-ok" if end >= 1 << 64 else "region/past-end-ok"
        if size >= 1 << 32 and self.bad("pci/large-end-ok"):
            return False
        if offset == size and region == CONFIG and self.bad("region/extended-config-ok"):
            return False
        need(name, end <= size)
        if end <= size:
            need("region/flags-ignored", regions[region].flags & access)
        return end <= size

    def read(self, command: Command, fds: list[int]) -> bytes:
        """REGION_READ."""
        payload = command.payload
        self.need("region/short-payload-ok", len(payload) >= 16)
        self.need("", len(payload) == 16 or not self.bad("region/long-read-refused"))
        offset, region, count = struct.unpack_from("<QII", payload.ljust(16, b"\0"))
        self.need("", count < TRANSFER or count > TRANSFER or not self.bad("region/large-read-refused"))
        inside = self._check(region, offset, count, READ)
        self.migration.check_access(region)
        try:
            data = self.migration.region_read(region, offset, count) if inside else bytes(min(count, 64))
        except Refused:
            if not self.bad("region/device-error-lost"):
                raise
            data = bytes(count)
        if region < 6 and count & 1 and count > 1 and self.bad("region/odd-read-kills"):
            raise Crash
        data, count = self._spoil_read(region, offset, count, data)
        if self.bad("region/read-offset-off"):
            offset += 1
        if self.bad("pci/large-offset-cut"):
            offset &= 0xFFFFFFFF
        return struct.pack("<QII", offset, region, count) + data

    def _spoil_read(self, region: int, offset: int, count: int, data: bytes) -> tuple[bytes, int]:
        if region == CONFIG and self.bad("region/narrow-read-wrong") and count == 2 and offset & 1:
            data = data[::-1]
        if self.bad("region/short-read") and count > 1024:
            data = data[:1024]
        if self.bad("region/long-read") and count == 7:
            data += b"\0"
        if self.bad("region/wide-access-torn") and count == 8:
            data = data[:4] + bytes(4)
        if self.bad("region/odd-read-long") and region < 6 and count in (3, 5):
            data += b"\0" * (8 - count)
        return data, len(data)

    def write(self, command: Command, fds: list[int]) -> bytes:
        """REGION_WRITE."""
        payload = command.payload
        self.need("region/short-payload-ok", len(payload) >= 16)
        offset, region, count = struct.unpack_from("<QII", payload.ljust(16, b"\0"))
        data = payload[16:]
        if self.bad("region/refused-write-applied") and region == CONFIG:
            self.device.write(CONFIG, min(offset, 4000), data[:1])
        self.need("region/data-length-ok", len(data) == count)
        self.apply_write(region, offset, data)
        if self.bad("region/write-no-echo"):
            offset = 0
        return b"" if self.bad("client/rust-sizes") else struct.pack("<QII", offset, region, count)

    def apply_write(self, region: int, offset: int, data: bytes) -> None:
        """A write, and what it causes."""
        inside = self._check(region, offset, len(data), WRITE)
        self.migration.check_access(region)
        if not inside or (self.bad("region/write-lost") and data == b"\xaa"):
            return
        if region == CONFIG and len(data) == 3 and self.bad("region/odd-write-lost"):
            return
        if region == CONFIG and len(data) == 2 and offset % 4 == 3 and self.bad("region/straddling-write-half"):
            data = data[:1]
        if region == CONFIG and 0x30 <= offset < 0x34:
            self.need("", not self.bad("client/qemu-attach"))
            if self.bad("region/rom-mask-off"):
                self.device.mask[0x30:0x34] = b"\x00\x00\xff\xff"
        if region == CONFIG and 0x10 <= offset < 0x14 and self.bad("region-info/bar-mask-off"):
            self.device.mask[0x10:0x14] = b"\x00\x00\xff\xff"
        resets = self.device.resets
        try:
            value = self.migration.region_write(region, offset, data)
        except Refused:
            if not self.bad("region/device-error-lost"):
                raise
            return
        if self.device.resets != resets and self.bad("pci/flr-drops-maps"):
            self.dma.end()
        if value is not None and offset == 0x10:
            self.raise_irq(value >> 16, value & 0xFFFF)
        elif value is not None and offset == 0x14:
            self.set_line(bool(value & 1))
        elif value is not None and offset == 0x24:
            self.dma.order(value)

    def write_multi(self, command: Command, fds: list[int]) -> bytes:
        """REGION_WRITE_MULTI."""
        payload = command.payload
        agreed = self.connection.capabilities.get("write_multiple") is True
        self.need("multi/unagreed-ok", agreed)
        self.need("", not self.bad("version/offers-write-multi"))
        count = struct.unpack_from("<Q", payload.ljust(8, b"\0"))[0]
        giant = count > 1 << 32
        self.need("multi/giant-count-ok" if giant else "multi/length-ok", len(payload) == 8 + 24 * count)
        entries = [payload[at : at + 24] for at in range(8, len(payload) - 23, 24)]
        if self.bad("multi/order-lost"):
            entries.reverse()
        done = 0
        for entry in entries:
            offset, region, width = struct.unpack_from("<QII", entry)
            self.need("multi/nine-bytes-ok", width <= 8)
            self.need("", offset != 4 or not self.bad("multi/golden-refused"))
            try:
                self.apply_write(region, offset, entry[16 : 16 + min(width, 8)])
                done += 1
            except Refused:
                if not self.bad("multi/goes-on"):
                    break
        return struct.pack("<Q", done + self.bad("multi/count-off"))

    def reset(self, command: Command, fds: list[int]) -> bytes:
        """DEVICE_RESET."""
        self.need("session/reset-unsupported-ok", self.server.variant.reset)
        self.need("", not command.payload or not self.bad("session/long-reset-refused"))
        self.need("", self.device.state == 2 or not self.bad("client/reset-refused"))
        self.need("", not self.bad("session/qemu-reset-refused") or not self.dma.maps)
        self.resets += 1
        self.need("", self.resets == 1 or not self.bad("session/reset-twice-refused"))
        self.need("", self.resets == 1 or not self.bad("client/qemu-resets"))
        if not self.bad("session/reset-nothing"):
            self.device.power_on()
        if self.bad("session/reset-drops-maps") or self.bad("dma/reset-stops-maps"):
            self.dma.end()
        self.migration.reset()
        return bytes(4) if self.bad("session/reset-payload") else b""

    # Interrupts

    def drop(self, irq: Irq, vectors: Any) -> None:
        """Close the eventfds of vectors."""
        for vector in vectors:
            fd = irq.fds.pop(vector, -1)
            if fd >= 0:
                os.close(fd)

    def set_irqs(self, command: Command, fds: list[int]) -> bytes:
        """DEVICE_SET_IRQS."""
        payload = command.payload
        self.need("irq/short-ok", len(payload) >= 20)
        argsz, flags, index, start, count = struct.unpack_from("<IIIII", payload.ljust(20, b"\0"))
        self.need("irq/short-ok", argsz >= 20 or len(payload) < 20)
        self.need("irq/index-ok", index < len(self.irqs))
        if index >= len(self.irqs):
            return b""
        if flags & ~0x3F and self.bad("irq/high-flag-closes"):
            raise OSError("a flag that it does not know")
        self._check_irq(flags, index, start, count, payload, command.fds)
        if count == 0:
            if flags == 0x21 or flags & 0x3F == 0x21:
                self._disable(index)
            return b""
        if start + count > self.irqs[index].count or self.irqs[index].count == 0:
            return b""
        self._act(flags & 0x3F, index, range(start, start + count), payload[20:], command.fds)
        return b""

    def _check_irq(self, flags: int, index: int, start: int, count: int, payload: bytes, fds: list[int]) -> None:
        need, total = self.need, self.irqs[index].count
        need("irq/two-actions-ok", flags & 0x38 in (0x08, 0x10, 0x20))
        need("irq/two-data-ok", flags & 7 in (1, 2, 4))
        if not total and self.bad("irq/empty-disable-hangs"):
            time.sleep(1.4)
        if count == 0:
            need("irq/start-of-nothing-ok", start == 0)
            need("irq/mask-nothing-ok", flags & 0x3F == 0x21)
        else:
            need("irq/start-ok", start < total)
            single = index >= 3 and count > 1
            need("irq/two-err-ok" if single else "irq/range-ok", start >= total or start + count <= total)
        need("irq/mask-err-ok", index < 3 or flags & 0x20)
        if flags & 2:
            need("irq/bool-length-ok", len(payload) - 20 == count)
        need("irq/fd-without-eventfd-ok", not fds or flags & 4)
        need("irq/fd-count-ok", not fds or not flags & 4 or len(fds) == count)
        need("", index != 2 or count or not self.bad("irq/golden-disable-refused"))
        need("", count or index or not self.bad("irq/qemu-enable-refused"))
        need("", len(fds) <= 8 or not self.bad("irq/many-fds-refused"))
        need("", not flags & 0x18 or not self.bad("irq/mask-refused"))
        unassigned = flags & 0x23 and flags & 0x20 and not flags & 4 and not self.irqs[index].fds
        need("", not (unassigned and count) or not self.bad("irq/no-eventfd-refused"))
        if index == 3 and flags == 0x24 and not fds:
            need("", not self.bad("client/qemu-leave"))

    def _disable(self, index: int) -> None:
        if self.bad("irq/disable-keeps") or self.bad("irq/device-after-disable"):
            return
        irqs = self.irqs[:3] if self.bad("irq/shared-table") else [self.irqs[index]]
        for irq in irqs:
            self.drop(irq, range(irq.count))

    def _act(self, flags: int, index: int, vectors: range, data: bytes, fds: list[int]) -> None:
        irq = self.irqs[index]
        if flags & 0x18:
            irq.masked = bool(flags & 0x08)
            if fds and self.bad("irq/unmask-fd-kept"):
                self.server.kept.extend(fds)
                fds.clear()
            if index == 0 and not irq.masked and self.device.line:
                self._fire_line()
            return
        if flags == 0x24:
            self._assign(irq, vectors, fds)
            return
        for n, vector in enumerate(vectors):
            if flags == 0x21 and n and self.bad("irq/loopback-first-only"):
                break
            if flags == 0x21 or data[n : n + 1] != b"\0" or self.bad("irq/bool-ignored"):
                self._signal(irq, vector)

    def _assign(self, irq: Irq, vectors: range, fds: list[int]) -> None:
        if not fds:
            if self.bad("irq/deassign-all-keeps"):
                return
            wrong = self.bad("irq/deassign-wrong")
            self.drop(irq, range(vectors.start, len(vectors)) if wrong else vectors)
            return
        if self.bad("irq/pieces-drop"):
            self.drop(irq, range(irq.count))
        for vector, fd in zip(vectors, fds, strict=False):
            if vector in irq.fds and self.bad("irq/old-eventfd-kept"):
                os.close(fd)
                continue
            self.drop(irq, [vector])
            irq.fds[vector] = fd
        fds.clear()

    def _signal(self, irq: Irq, vector: int) -> None:
        fd = irq.fds.get(vector, -1)
        if fd < 0 or self.bad("irq/loopback-lost"):
            return
        if self.bad("irq/count-lost"):
            self._told = getattr(self, "_told", 0) + 1
            if self._told > 2:
                return
        if self.bad("irq/count-replaced") and select.select([fd], [], [], 0)[0]:
            os.read(fd, 8)
        try:
            os.write(fd, struct.pack("=Q", 1))
        except OSError:
            pass  # it is no eventfd

    def raise_irq(self, index: int, vector: int) -> None:
        """The device interrupts."""
        if index == 0 or index >= len(self.irqs) or vector >= self.irqs[index].count:
            return
        if self.bad("irq/unassigned-kills") and vector not in self.irqs[index].fds:
            raise Crash
        if not self.bad("irq/device-silent"):
            self._signal(self.irqs[index], vector)

    def set_line(self, asserted: bool) -> None:
        """The device drives INTx."""
        self.device.line = asserted
        if asserted and (not self.irqs[0].masked or self.bad("irq/intx-not-masked")):
            self._fire_line()

    def _fire_line(self) -> None:
        if self.bad("irq/intx-silent"):
            return
        self.irqs[0].masked = True
        self._signal(self.irqs[0], 0)
