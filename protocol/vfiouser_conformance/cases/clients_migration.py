"""Replays of what real clients do when they migrate, and of those that serve no command of the server."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import CaseFailed, Level, check, same
from vfiouser_conformance.cases.clients import AREA as AREA
from vfiouser_conformance.cases.dma import into_device, out_of_device, pattern, ready
from vfiouser_conformance.cases.dma_map import BASE, MAP, SIZE, unmap
from vfiouser_conformance.cases.irqs import SET, assign
from vfiouser_conformance.cases.logging_cases import start_request
from vfiouser_conformance.cases.migrate_data import READ, change_state, state_of
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.migration import (
    FEATURE,
    PRE_COPY,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    back,
    begin,
    go,
    name,
    read_chunk,
    save,
    set_request,
    write_chunk,
    write_stream,
)
from vfiouser_conformance.trial import Trial
from vfiouser_conformance.wire import Received
from vfiouser_protocol.constants import Command, IrqIndex

COMPAT = Level.COMPAT
_CONFIG = 7
_MIB = 1 << 20
_PAGE = wire.PAGE
_GET_MIGRATION, _GET_DATA_SIZE, _STOP_LOGGING = 0x10001, 0x10009, 0x20007
#: PROBE alone, as QEMU does it.
_PROBE_LOGGING = 0x40006
#: A command that patches for the client use and the specification lacks.
_GET_PRECOPY_INFO = 19
#: What QEMU asks dirty pages of: (address, length).
_QEMU_RANGES = (
    (0, 0xC3000),
    (0xC3000, 0x25000),
    (0xE8000, 0x8000),
    (0xF0000, 0x10000),
    (0x100000, 0xFF00000),
    (0xFFFC0000, 0x40000),
)


@AREA.case(12, COMPAT, "R433", compat="clients that keep a stream, as snapshots do")
def replays_a_stream(t: Trial) -> None:
    """A client that keeps the whole stream can load it again, and again later.

    Sends: a save; then twice, on a connection of its own: a change of state, RESUMING, the stream cut in other places,
    RUNNING.
    Expects: the saved state both times.
    """
    link = begin(t)
    change_state(t, link, 0x31)
    before = state_of(t, link)
    data = save(t, link)
    back(link)
    for n, size in enumerate((4096, 1000)):
        t.drop(link)
        link = begin(t)
        change_state(t, link, 0x32 + n)
        go(link, RESUMING)
        write_stream(link, data, min(max(size, len(data) // 64), t.facts.transfer))
        go(link, RUNNING)
        same(before.hex(), state_of(t, link).hex(), f"state of the device after load {n + 1}")


@AREA.case(13, COMPAT, "R434", compat="clients that go by msg_size")
def goes_by_the_header(t: Trial) -> None:
    """A client that reads only the headers of MIG_DATA_READ, and takes what follows them for data, gets the stream.

    Sends: STOP_COPY; MIG_DATA_READ of 4096 bytes until a reply has none.
    Expects: replies whose msg_size leaves as many bytes as size says, the last ones too.
    """
    link = begin(t)
    go(link, STOP_COPY)
    size = min(4096, t.facts.transfer)
    while True:
        payload = link.ok(READ, wire.mig_data(size)).payload
        done = wire.MIG_DATA.unpack_from(payload)[1]
        same(done, len(payload) - 8, "bytes that msg_size leaves for data, by size")
        if done == 0:
            return


class _Upstream:
    """QEMU's client with migration, as its patches in review have it."""

    def __init__(self, t: Trial) -> None:
        self.t = t
        self.link = begin(t)

    def realize(self) -> None:
        """What decides whether migration is blocked."""
        same(16, len(self.link.ok(FEATURE, wire.feature(_GET_MIGRATION, argsz=16)).payload), "payload of GET MIGRATION")
        self.link.ok(FEATURE, wire.feature(_PROBE_LOGGING, argsz=8))

    def start_logging(self) -> None:
        """The whole lower 4 GiB."""
        self.link.ok(FEATURE, start_request(_PAGE, 1, struct.pack("<QQ", 0, 0xFFFFFFFF)))
        self.t.at_end(lambda: self.link.closed or self.link.call(FEATURE, wire.feature(_STOP_LOGGING)))

    def sync(self) -> None:
        """Ask about ranges that match no map."""
        for address, length in _QEMU_RANGES:
            request = wire.log_report(address, length, _PAGE)
            reply = self.link.ok(FEATURE, request)
            room = struct.unpack_from("<I", request)[0]
            check(len(reply.payload) <= room, f"a report of {len(reply.payload)} bytes where {room} are expected")
            same(room, len(reply.payload), "bytes of the report")

    def estimate(self) -> None:
        """Ask how much there is, in both ways that patches have; either may be refused."""
        reply = self.link.call(FEATURE, wire.feature(_GET_DATA_SIZE, argsz=16))
        if not reply.failed:
            same(16, len(reply.payload), "payload of GET MIG_DATA_SIZE")
        known = "refused: the client assumes 100 GiB" if reply.failed else "answered"
        self.t.saw("GET of MIG_DATA_SIZE", known, recommended=not reply.failed)
        self.link.call(_GET_PRECOPY_INFO, struct.pack("<IIQQ", 0, 0, 0, 0))

    def set(self, state: int) -> None:
        """SET with data_fd 0; the client needs -1 in the reply, which is reported: the specification has an echo."""
        reply = self.link.ok(FEATURE, set_request(state))
        same(16, len(reply.payload), "payload of SET MIG_DEVICE_STATE")
        said, descriptor = struct.unpack_from("<Ii", reply.payload, 8)
        same(name(state), name(said), "state in the reply to SET")
        self.t.saw("data_fd in the reply to a SET with 0", str(descriptor), recommended=True)

    def read(self, *, surplus: bool = False) -> list[bytes]:
        """Read until there is nothing (for now); the first request may carry its buffer, as in older patches."""
        found: list[bytes] = []
        if surplus:
            reply = self.link.ok(READ, wire.mig_data(_PAGE) + bytes(_PAGE))
            size = wire.MIG_DATA.unpack_from(reply.payload)[1]
            found.append(reply.payload[8 : 8 + size])
        while data := read_chunk(self.link, min(_MIB, self.t.facts.transfer)):
            found.append(data)
        return found


@AREA.case(
    14,
    COMPAT,
    "R435",
    compat="QEMU's client with migration, in review",
)
def upstream_qemu_migrates(t: Trial) -> None:
    """QEMU's client with migration migrates the device.

    Sends: its checks at realize; maps; START of one range; REPORTs of ranges that match no map; MIG_DATA_SIZE and
    command 19; PRE_COPY if there is one, with a read whose request carries its whole buffer; STOP_COPY, REPORTs, reads
    until there is nothing, STOP; then RESUMING, one write per read; unmaps, maps, config writes and
    interrupts meanwhile; RUNNING.
    Expects: success, but for MIG_DATA_SIZE and command 19, which may be refused; the first is reported.
    """
    t.facts.logs()
    source = _Upstream(t)
    link = source.link
    source.realize()
    change_state(t, link, 0x41)
    before = state_of(t, link)
    for address, length in ((0, 0xC0000), (0x100000, 0x3F00000)):
        link.ok(MAP, wire.dma_map(address, length), [t.memfd(length)])
    for address, length in ((0xC0000, 0x40000), (0xFFFC0000, 0x40000)):
        link.ok(MAP, wire.dma_map(address, length, 0, 1))
    source.start_logging()
    source.sync()
    source.estimate()
    stream: list[bytes] = []
    if t.facts.pre_copy:
        source.set(PRE_COPY)
        stream += source.read(surplus=True)
    else:
        source.set(STOP)
    source.set(STOP_COPY)
    source.sync()
    source.estimate()
    stream += source.read()
    source.set(STOP)
    link.call(FEATURE, wire.feature(_STOP_LOGGING))
    t.drop(link)
    _upstream_loads(t, stream, before)


def _upstream_loads(t: Trial, stream: list[bytes], before: bytes) -> None:
    """The destination's half, on the same device, which is given another state first."""
    link = begin(t)
    change_state(t, link, 0x42)
    go(link, RESUMING)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    for part in stream:
        write_chunk(link, part)
    unmap(link, BASE, SIZE)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    t.write(link, _CONFIG, 4, t.read_config(link, 4, 2))
    if t.facts.irq_count(IrqIndex.INTX):
        link.ok(SET, wire.set_irqs(0x21, IrqIndex.INTX, 0, 0))
    if count := min(4, t.facts.irq_count(IrqIndex.MSIX)):
        assign(t, link, IrqIndex.MSIX, 0, count)
    go(link, RUNNING)
    same(before.hex(), state_of(t, link).hex(), "state of the device after the migration")


def _no_commands(link: RawLink, message: Received) -> None:
    raise CaseFailed(f"the server sent {message}, which this client never reads")


@AREA.case(15, COMPAT, "R436 R400", compat="rust-vmm, Cloud Hypervisor")
def rust_vmm_is_asked_nothing(t: Trial) -> None:
    """rust-vmm's client, which never reads a command of the server, has its device's DMA done all the same.

    Sends: its VERSION; every region twice with the same message id; DMA_MAP with a descriptor; the device reads and
    writes that memory.
    Expects: success; the data in the file; no command of the server.
    """
    t.facts.maps()
    link = t.attach(vectors.RUST_CAPABILITIES, minor=1)
    link.on_command = _no_commands
    for index in range(len(t.facts.regions)):
        argsz = 32
        for _ in range(2):
            link.send(wire.pack(Command.DEVICE_GET_REGION_INFO, wire.region_info(index, argsz), msg_id=index))
            reply = link.reply(index, Command.DEVICE_GET_REGION_INFO)
            check(not reply.failed, f"GET_REGION_INFO of region {index} failed with error {reply.error}")
            argsz = struct.unpack_from("<I", reply.payload)[0]
    fd = t.memfd(SIZE)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [fd])
    device, data = ready(t, link), pattern(_PAGE, 9)
    out_of_device(link, device, BASE + _PAGE, data)
    same(data.hex(), into_device(link, device, BASE + _PAGE, _PAGE).hex(), "what the device read back")
    same(data.hex(), t.map(fd, SIZE)[_PAGE : 2 * _PAGE].hex(), "bytes of the file")
    unmap(link, BASE, SIZE)
