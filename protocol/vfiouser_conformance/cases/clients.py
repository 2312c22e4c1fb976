"""Replays of what real clients do when they attach, run and leave."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, check, same
from vfiouser_conformance.cases.dma_map import MAP, UNMAP, unmap
from vfiouser_conformance.cases.info import interrupt_capabilities
from vfiouser_conformance.cases.irqs import SET, assign, check_signals, fire
from vfiouser_conformance.cases.pci import capabilities
from vfiouser_conformance.facts import parse_capabilities, parse_region, read_region
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command, DmaUnmapFlags, IrqIndex, RegionFlags, RegionIndex

AREA = Area("CLIENT", "client profiles", CaseEffect.DEVICE)
COMPAT, MUST = Level.COMPAT, Level.MUST
CONFIG = int(RegionIndex.CONFIG)
_MIB = 1 << 20
_RAM = 64 * _MIB
#: Regions that QEMU asks for: BARs and config space.
_QEMU_REGIONS = (0, 1, 2, 3, 4, 5, CONFIG)


class Memory(NamedTuple):
    """A part of a guest's memory as QEMU maps it.

    Args:
        address: guest physical.
        size: in bytes.
        offset: in the file.
        flags: of DMA_MAP; 1 = read-only, always without a file.
    """

    address: int
    size: int
    offset: int
    flags: int


#: Id of the capability of power management.
_POWER_MANAGEMENT = 1
#: What a 64 MiB q35 guest maps at first, and after the machine's reset.
_FIRST = (Memory(0, _RAM, 0, 3), Memory(0xFFFC0000, 0x40000, 0, 1))
_FINAL = (
    Memory(0, 0xC0000, 0, 3),
    Memory(0xC0000, 0x20000, 0, 1),
    Memory(0xE0000, 0x20000, 0, 1),
    Memory(_MIB, _RAM - _MIB, _MIB, 3),
)


class Qemu:
    """Does what QEMU does, with QEMU's checks.

    Args:
        t: the case's run.
        data: VERSION's JSON.
        info_size: bytes of its GET_INFO payload.
        shared: whether guest memory has a file.
    """

    def __init__(
        self, t: Trial, data: bytes = vectors.QEMU_CAPABILITIES, *, info_size: int = 16, shared: bool = True
    ) -> None:
        self.t = t
        self.info_size = info_size
        self.ram = t.memfd(_RAM) if shared else None
        self.link = t.connect()
        self.mappable = False
        self.sizes: dict[int, int] = {}
        self.config = b""
        self._negotiate(data)

    def _negotiate(self, data: bytes) -> None:
        request = wire.version(data)
        reply = self.link.ok(Command.VERSION, request)
        check(len(reply.payload) <= len(request), "the VERSION reply does not fit into the client's buffer")
        same(b"\0\0\0\0", reply.payload[:4], "version of the reply")
        pgsize = parse_capabilities(reply.payload).get("migration", {}).get("pgsize", 4096)
        same(0, pgsize % 4096, "migration.pgsize modulo 4096")

    def map(self, memory: tuple[Memory, ...]) -> None:
        """A burst of DMA_MAP, of which only the last reply is waited for, as the others come before it."""
        ids = []
        for part in memory:
            fds = [self.ram] if self.ram is not None and part.flags == 3 else []
            offset = part.offset if fds else 0
            ids.append(self.link.command(MAP, wire.dma_map(part.address, part.size, offset, part.flags), fds))
        for msg_id in ids:
            check(not self.link.reply(msg_id, MAP).failed, "a DMA_MAP of the burst failed")

    def unmap(self, memory: tuple[Memory, ...]) -> None:
        """A burst of DMA_UNMAP."""
        ids = [self.link.command(UNMAP, wire.dma_unmap(part.address, part.size)) for part in memory]
        for msg_id in ids:
            check(not self.link.reply(msg_id, UNMAP).failed, "a DMA_UNMAP of the burst failed")

    def attach(self) -> None:
        """Everything up to the point where the guest starts."""
        self.map(_FIRST)
        self._device()
        for index in _QEMU_REGIONS:
            self._region(index)
        self.link.call(Command.DEVICE_GET_IRQ_INFO, wire.info(16, 0, IrqIndex.ERR))
        self._config()
        self._interrupts()
        self.system_reset()
        self.unmap(_FIRST[:1])
        self.map(_FINAL)

    def _device(self) -> None:
        request = wire.info(self.info_size) + b"\0" * (self.info_size - 16)
        reply = self.link.ok(Command.DEVICE_GET_INFO, request)
        check(len(reply.payload) <= self.info_size, "the GET_INFO reply does not fit into the client's buffer")
        _, flags, regions, irqs = wire.INFO.unpack_from(reply.payload)
        check(
            flags & 2 and 8 <= regions <= 100 and 3 <= irqs <= 50, f"flags {flags:#x}, {regions} regions, {irqs} IRQs"
        )

    def _region(self, index: int) -> None:
        reply = self.link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index))
        argsz = struct.unpack_from("<I", reply.payload)[0]
        check(len(reply.payload) <= 32, "the short region info does not fit into the client's buffer")
        if argsz > 32:
            reply = self.link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index, argsz))
            check(len(reply.payload) <= argsz, "the region info does not fit into the client's buffer")
        check(len(reply.fds) <= 1 and reply.fds_in_header, "descriptors of a region info")
        region = parse_region(index, reply.payload)
        self.sizes[index] = region.size
        self.mappable |= bool(region.flags & RegionFlags.MMAP)
        if index < 6:
            check(region.size & (region.size - 1) == 0, f"BAR{index} of {region.size:#x} bytes")

    def _config(self) -> None:
        size = min(4096, self.sizes[CONFIG])
        check(size > 0, "config space has no bytes")
        self.config = self.t.read(self.link, CONFIG, 0, size)
        rom = self.t.read_config(self.link, 0x30, 4)
        self.t.write(self.link, CONFIG, 0x30, struct.pack("<I", 0xFFFFF800))
        self.t.read_config(self.link, 0x30, 4)
        self.t.write(self.link, CONFIG, 0x30, rom)
        for bar in range(6):
            if self.sizes[bar]:
                self.t.read_config(self.link, 0x10 + 4 * bar, 4)

    def _interrupts(self) -> None:
        found = interrupt_capabilities(self.config)
        if IrqIndex.MSIX in found:
            at = found[IrqIndex.MSIX][0]
            for offset, width in ((at + 2, 2), (at + 4, 4), (at + 8, 4)):
                self.t.read_config(self.link, offset, width)
            self.link.ok(Command.DEVICE_GET_IRQ_INFO, wire.info(16, 0, IrqIndex.MSIX))
        if IrqIndex.MSI in found:
            self.t.read_config(self.link, found[IrqIndex.MSI][0] + 2, 2)
        self.t.read_config(self.link, 0x3D, 1)
        if self.t.read_config(self.link, 0x3D, 1) != b"\0":
            assign(self.t, self.link, IrqIndex.INTX, 0, 1)
        if self.t.facts.irq_count(IrqIndex.ERR):
            assign(self.t, self.link, IrqIndex.ERR, 0, 1)

    def system_reset(self) -> None:
        """What a reset of the machine does, apart from memory."""
        link = self.link
        if self.t.facts.irq_count(IrqIndex.INTX):
            link.ok(SET, wire.set_irqs(0x21, IrqIndex.INTX, 0, 0))
        self.t.read_config(link, 4, 2)
        self.t.write(link, CONFIG, 4, b"\0\0")
        for kind, at in capabilities(self.config):
            if kind == _POWER_MANAGEMENT:  # is it in D0?
                self.t.read_config(link, at + 4, 2)
        if self.t.facts.resettable:
            link.ok(Command.DEVICE_RESET)
        if self.t.read_config(link, 0x3D, 1) != b"\0":
            assign(self.t, link, IrqIndex.INTX, 0, 1)
        for bar in range(6):
            self.t.write(link, CONFIG, 0x10 + 4 * bar, b"\0" * 4)

    def enable_msix(self) -> list[int]:
        """What a guest's driver makes QEMU do when it enables MSI-X; returns the vectors' eventfds."""
        link, count = self.link, min(4, self.t.facts.irq_count(IrqIndex.MSIX))
        if self.t.facts.irq_count(IrqIndex.INTX):
            link.ok(SET, wire.set_irqs(0x21, IrqIndex.INTX, 0, 0))
        link.ok(SET, wire.set_irqs(0x24, IrqIndex.MSIX, 0, 1))
        return assign(self.t, link, IrqIndex.MSIX, 0, count)

    def leave(self, memory: tuple[Memory, ...]) -> None:
        """What hot-unplug does."""
        if self.t.facts.irq_count(IrqIndex.ERR):
            self.link.ok(SET, wire.set_irqs(0x24, IrqIndex.ERR, 0, 1))
        if self.t.facts.irq_count(IrqIndex.INTX):
            self.link.ok(SET, wire.set_irqs(0x21, IrqIndex.INTX, 0, 0))
        self.unmap(memory)
        self.t.drop(self.link)


@AREA.case(1, COMPAT, "R390 R391 R061", compat="QEMU 11")
def qemu_attach(t: Trial) -> None:
    """QEMU 11 attaches the device.

    Sends: QEMU's sequence: VERSION, a burst of maps, GET_INFO, regions, config space, ROM and BAR probes, interrupts,
    the machine's reset, the final maps.
    Expects: everything that QEMU checks, and success of everything that it does.
    """
    Qemu(t).attach()


@AREA.case(2, COMPAT, "R390 R392 R203 R007", compat="QEMU 11")
def qemu_run(t: Trial) -> None:
    """QEMU 11 runs a guest with the device.

    Sends: the attach; memory and bus mastering on; MSI-X on, triggers, off, INTx back; the BAR mapped for DMA; config
    accesses of 1, 2 and 4 bytes.
    Expects: success; the vectors work.
    """
    qemu = Qemu(t)
    qemu.attach()
    link = qemu.link
    t.write(link, CONFIG, 4, b"\x06\x04")
    link.ok(MAP, wire.dma_map(0xFE001000, 0x1000))
    if t.facts.irq_count(IrqIndex.MSIX):
        events = qemu.enable_msix()
        fire(link, IrqIndex.MSIX, 0, len(events))
        check_signals(t, events, [True] * len(events), "MSI-X vectors")
        link.ok(SET, wire.set_irqs(0x21, IrqIndex.MSIX, 0, 0))
        if t.read_config(link, 0x3D, 1) != b"\0":
            assign(t, link, IrqIndex.INTX, 0, 1)
    for width in (1, 2, 4):
        t.read_config(link, 0x3C, width)
    unmap(link, 0xFE001000, 0x1000)


@AREA.case(3, COMPAT, "R397 R236", compat="QEMU 11")
def qemu_leave(t: Trial) -> None:
    """QEMU 11 unplugs the device, and another QEMU attaches it.

    Sends: the attach; ERR off, INTx off, unmaps, the end of the connection; the attach again.
    Expects: success throughout.
    """
    qemu = Qemu(t)
    qemu.attach()
    qemu.leave((_FIRST[1], *_FINAL))
    Qemu(t).attach()


@AREA.case(4, COMPAT, "R393 R238", compat="QEMU 11")
def qemu_system_reset(t: Trial) -> None:
    """QEMU 11 resets its machine several times.

    Sends: the attach, and the reset's sequence with its maps three times.
    Expects: success throughout.
    """
    qemu = Qemu(t)
    qemu.attach()
    for _ in range(3):
        qemu.system_reset()
        qemu.unmap(_FINAL)
        qemu.map(_FINAL)


@AREA.case(5, COMPAT, "R394 R141", compat="QEMU 11")
def qemu_private_memory(t: Trial) -> None:
    """QEMU 11 attaches with memory that is not shared: no map has a descriptor.

    Sends: the attach without descriptors in DMA_MAP.
    Expects: success throughout.
    """
    Qemu(t, shared=False).attach()


@AREA.case(6, COMPAT, "R062 R025", compat="QEMU's v1 forks")
def old_qemu(t: Trial) -> None:
    """The older QEMU forks attach the device.

    Sends: their VERSION, GET_INFO with 20 bytes, then what QEMU sends; a scan of all regions for capabilities.
    Expects: success throughout.
    """
    qemu = Qemu(t, vectors.V1_CAPABILITIES, info_size=20)
    qemu.attach()
    for index in range(len(t.facts.regions)):
        reply = qemu.link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index))
        argsz = struct.unpack_from("<I", reply.payload)[0]
        if argsz > 32:
            qemu.link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index, argsz))


@AREA.case(7, COMPAT, "R213", compat="an older QEMU fork")
def asks_for_io_fds(t: Trial) -> None:
    """A client that asks every region for ioeventfds gets answers.

    Sends: GET_REGION_IO_FDS with argsz 16 for each region that has bytes.
    Expects: success.
    """
    link = t.attach()
    for region in t.facts.regions:
        if region.size:
            link.ok(Command.DEVICE_GET_REGION_IO_FDS, wire.info(16, 0, region.index))


def _regions(link: RawLink) -> int:
    """How many regions this client is told of; a migration region may be shown to some clients only."""
    return int(wire.INFO.unpack_from(link.ok(Command.DEVICE_GET_INFO, wire.info()).payload)[2])


def _fixed(link: RawLink, command: int, payload: bytes, size: int, fds: list[int] | None = None) -> bytes:
    """Send a command and read exactly so many bytes, as a client does that does not look at msg_size."""
    msg_id = link.command(command, payload, fds or [])
    reply = link.reply(msg_id, command)
    same(
        size, reply.size, f"size of the reply to {wire.command_name(command)}, of which the client reads a fixed number"
    )
    return reply.payload


@AREA.case(8, COMPAT, "R400 R085 R209", compat="rust-vmm")
def rust_vmm(t: Trial) -> None:
    """rust-vmm's client, which reads fixed sizes and looks at nothing else, attaches the device.

    Sends: VERSION 0.1, GET_INFO with argsz 32, every region twice, IRQ types, config space, maps with descriptors, all
    MSI-X vectors in one message, an unmap, a reset.
    Expects: success replies of exactly the sizes that it reads; capabilities of the length that msg_size leaves.
    """
    link = t.attach(vectors.RUST_CAPABILITIES, minor=1)
    payload = _fixed(link, Command.DEVICE_GET_INFO, wire.info(32), 32)
    _, flags, regions, irqs = wire.INFO.unpack(payload)
    check(flags & 2, "the PCI flag is missing")
    for index in range(regions):
        short = _fixed(link, Command.DEVICE_GET_REGION_INFO, wire.region_info(index), 48)
        argsz = struct.unpack_from("<I", short)[0]
        if argsz > 32:
            _fixed(link, Command.DEVICE_GET_REGION_INFO, wire.region_info(index, argsz), 16 + argsz)
    for index in range(irqs):
        _fixed(link, Command.DEVICE_GET_IRQ_INFO, wire.info(16, 0, index), 32)
    _fixed(link, Command.REGION_READ, wire.access(CONFIG, 0, 64), 96)
    command = t.read_config(link, 4, 2)
    _fixed(link, Command.REGION_WRITE, wire.access(CONFIG, 4, 2, command), 32)
    _fixed(link, MAP, wire.dma_map(0, _RAM), 16, [t.memfd(_RAM)])
    count = min(64, t.facts.irq_count(IrqIndex.MSIX))
    if count:
        events = [t.eventfd() for _ in range(count)]
        _fixed(link, SET, wire.set_irqs(0x24, IrqIndex.MSIX, 0, count), 16, events)
    _fixed(link, UNMAP, wire.dma_unmap(0, _RAM), 40)
    if t.facts.resettable:
        _fixed(link, Command.DEVICE_RESET, b"", 16)


@AREA.case(9, COMPAT, "R401 R166", compat="libvfio-user's sample client")
def sample_client(t: Trial) -> None:
    """libvfio-user's sample client works with the device, as far as it does not drive its own sample device.

    Sends: VERSION 0.2 with its capabilities, a reset, GET_INFO, every region and IRQ type, config space, INTx, maps
    with descriptors, one DMA_UNMAP of everything.
    Expects: success throughout.
    """
    link = t.attach(vectors.SAMPLE_CAPABILITIES, minor=2)
    if t.facts.resettable:
        link.ok(Command.DEVICE_RESET)
    for index in range(_regions(link)):
        read_region(link, index)
    t.read_config(link, 0, 64)
    for index in range(len(t.facts.irqs)):
        link.ok(Command.DEVICE_GET_IRQ_INFO, wire.info(16, 0, index))
    if t.facts.irq_count(IrqIndex.INTX):
        assign(t, link, IrqIndex.INTX, 0, 1)
    fd = t.memfd(_MIB)
    for n in range(8):
        link.ok(MAP, wire.dma_map(n * 0x10000, 0x1000, n * 0x1000), [fd])
    link.ok(UNMAP, wire.dma_unmap(0, 0, int(DmaUnmapFlags.ALL)))


@AREA.case(10, MUST, "R041 R070")
def minimal_client(t: Trial) -> None:
    """A client that offers nothing and asks for little is served.

    Sends: VERSION 0.0 without data; GET_INFO; config space in pieces; a map without a descriptor.
    Expects: success.
    """
    link = t.connect()
    reply = link.ok(Command.VERSION, wire.version())
    same((), reply.fds, "descriptors of the VERSION reply")
    link.alive()
    whole = b"".join(t.read_config(link, offset, 4) for offset in range(0, 64, 4))
    same(t.facts.config[:4], whole[:4], "vendor and device id")
    link.ok(MAP, wire.dma_map(0, 0x1000))


@AREA.case(11, COMPAT, "R042 R059", compat="clients with small limits")
def small_limits(t: Trial) -> None:
    """A client that takes one descriptor and 256 bytes at a time is served.

    Sends: VERSION 0.0 with max_msg_fds 1 and max_data_xfer_size 256; GET_INFO, regions, config space in pieces of 256.
    Expects: success; no reply with more than one descriptor.
    """
    link = t.attach_with({"max_msg_fds": 1, "max_data_xfer_size": 256})
    for index in range(_regions(link)):
        room = t.facts.regions[index].argsz
        reply = link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index, room))
        check(len(reply.fds) <= 1, f"{len(reply.fds)} descriptors came")
    for offset in range(0, len(t.facts.config), 256):
        t.read_config(link, offset, 256)
