"""DEVICE_RESET, and what the end of a connection leaves behind."""

from __future__ import annotations

import select

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, CaseFailed, Level, NotApplicable, check, same
from vfiouser_conformance.cases.dma_map import BASE, MAP, SIZE, UNMAP, unmap
from vfiouser_conformance.cases.irqs import SET, assign
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import SILENCE_S, Trial, signalled
from vfiouser_protocol.constants import Command, IrqIndex, RegionIndex

AREA = Area("SESSION", "reset, disconnect, reconnect", CaseEffect.DEVICE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
CONFIG = int(RegionIndex.CONFIG)


def resettable(t: Trial) -> RawLink:
    """A connection to a device that can be reset."""
    t.facts.resets()
    return t.attach()


@AREA.case(1, MUST, "R017 R230")
def reset(t: Trial) -> None:
    """DEVICE_RESET has no payload, neither way.

    Sends: the golden bytes of DEVICE_RESET.
    Expects: success, 16 bytes; config space still names the device.
    """
    link = resettable(t)
    link.send(vectors.message("reset"))
    reply = link.reply(11, Command.DEVICE_RESET)
    check(not reply.failed, f"DEVICE_RESET failed with error {reply.error}")
    same(16, reply.size, "size of the reply")
    same(t.facts.config[:4].hex(), t.read_config(link, 0, 4).hex(), "vendor and device id after the reset")


@AREA.case(2, MUST, "R230")
def power_on_values(t: Trial) -> None:
    """After DEVICE_RESET the command register is off.

    Sends: a write that enables memory and bus mastering, DEVICE_RESET, a read.
    Expects: both bits clear; a register of a known device is clear, too.
    """
    link = resettable(t)
    t.facts.region(CONFIG)
    t.write(link, CONFIG, 4, b"\x06\x00")
    place = None
    if t.target.stimulus is not None and t.target.stimulus.name == "test":
        place = t.target.stimulus.scratch()
        t.write(link, place[0], place[1], b"\x5a" * place[2])
    link.ok(Command.DEVICE_RESET)
    same(0, t.read_config(link, 4, 2)[0] & 6, "memory and bus master bits after the reset")
    if place is not None:
        same("00" * place[2], t.read(link, *place).hex(), "scratch register after the reset")


@AREA.case(3, SHOULD, "R231")
def reset_with_payload(t: Trial) -> None:
    """A payload of DEVICE_RESET is ignored.

    Sends: DEVICE_RESET with 4 bytes.
    Expects: success without a payload.
    """
    same(16, resettable(t).ok(Command.DEVICE_RESET, b"\0" * 4).size, "size of the reply")


@AREA.case(4, MUST, "R232")
def reset_without_reply(t: Trial) -> None:
    """DEVICE_RESET with NO_REPLY is silent, and done.

    Sends: a write that enables memory, DEVICE_RESET with NO_REPLY, a read.
    Expects: no reply to the reset; the bit is clear.
    """
    link = resettable(t)
    t.write(link, CONFIG, 4, b"\x02\x00")
    link.command(Command.DEVICE_RESET, flags=wire.NO_REPLY)
    same(0, t.read_config(link, 4, 2)[0] & 2, "memory bit after the reset")
    link.silent(SILENCE_S)


@AREA.case(5, MUST, "R233")
def maps_survive(t: Trial) -> None:
    """Maps survive DEVICE_RESET.

    Sends: DMA_MAP, DEVICE_RESET, DMA_UNMAP.
    Expects: the unmap succeeds.
    """
    t.facts.maps()
    link = resettable(t)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    link.ok(Command.DEVICE_RESET)
    unmap(link, BASE, SIZE)


@AREA.case(6, COMPAT, "R238 R393", compat="QEMU 11")
def reset_as_qemu(t: Trial) -> None:
    """QEMU's reset of a machine works.

    Sends: INTx off, command register to 0, DEVICE_RESET, INTx with an eventfd, BAR registers to 0, maps changed.
    Expects: success of each.
    """
    link = resettable(t)
    link.ok(MAP, wire.dma_map(0, 64 * SIZE), [t.memfd(64 * SIZE)])
    intx = t.facts.irq_count(IrqIndex.INTX)
    if intx:
        link.ok(SET, wire.set_irqs(0x21, IrqIndex.INTX, 0, 0))
    t.read_config(link, 4, 2)
    t.write(link, CONFIG, 4, b"\0\0")
    link.ok(Command.DEVICE_RESET)
    t.read_config(link, 0x3D, 1)
    if intx:
        assign(t, link, IrqIndex.INTX, 0, 1)
    for bar in range(6):
        t.write(link, CONFIG, 0x10 + 4 * bar, b"\0" * 4)
    unmap(link, 0, 64 * SIZE)
    link.ok(MAP, wire.dma_map(0, 10 * SIZE), [t.memfd(64 * SIZE)])
    link.ok(MAP, wire.dma_map(0xE0000, 0x20000, 0, 1))


@AREA.case(7, MUST, "R030", effect=CaseEffect.NONE)
def reconnect(t: Trial) -> None:
    """A client may come again and again.

    Sends: ten connections one after the other, each with VERSION and GET_INFO.
    Expects: each is served.
    """
    for _ in range(10):
        link = t.attach()
        link.alive()
        t.drop(link)


@AREA.case(8, SHOULD, "R031", effect=CaseEffect.NONE)
def second_client(t: Trial) -> None:
    """A second client is not mixed up with the first.

    Sends: VERSION on a second connection while the first is open; then GET_INFO on the first.
    Expects: the second is refused, kept waiting or served; the first gets its reply, and nothing else.
    """
    first = t.attach()
    try:
        second = t.connect()
        second.command(Command.VERSION, wire.version(vectors.QEMU_CAPABILITIES))
    except CaseFailed:
        t.saw("a second client", "refused", recommended=True)
    else:
        first.alive()
        poller = select.poll()
        poller.register(second.sock.fileno(), select.POLLIN)
        waits = not poller.poll(SILENCE_S * 1000)
        t.saw("a second client", "waits" if waits else "answered at once", recommended=True)
        t.drop(second)
    first.alive()
    first.silent(SILENCE_S / 2)


@AREA.case(9, MUST, "R032 R236", effect=CaseEffect.SESSION)
def maps_end(t: Trial) -> None:
    """Maps end with their connection.

    Sends: DMA_MAP of a locked file, and of a range without one; closes; DMA_UNMAP and DMA_MAP on a new connection.
    Expects: the file is released; the unmap fails, the map succeeds.
    """
    t.facts.maps()
    link = t.attach()
    file = t.locked_file(SIZE)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [file.to_give])
    link.ok(MAP, wire.dma_map(BASE + SIZE, SIZE))
    t.drop(link)
    file.check_released("with the connection")
    again = t.attach()
    for n in range(2):
        again.refused(UNMAP, wire.dma_unmap(BASE + n * SIZE, SIZE))
    again.ok(MAP, wire.dma_map(BASE, 2 * SIZE))


@AREA.case(10, MUST, "R032 R236", effect=CaseEffect.SESSION)
def eventfds_end(t: Trial) -> None:
    """Eventfds end with their connection.

    Sends: an eventfd for a vector; closes; TRIGGER of the vector on a new connection.
    Expects: the old eventfd is not signalled.
    """
    index, _ = t.facts.vectors()
    link = t.attach()
    events = assign(t, link, index, 0, 1)
    t.drop(link)
    again = t.attach()
    again.call(SET, wire.set_irqs(0x21, index, 0, 1))
    again.alive()
    check(not signalled(events[0], SILENCE_S), "an eventfd of the connection before was signalled")


@AREA.case(11, SHOULD, "R237")
def registers_survive(t: Trial) -> None:
    """Registers survive a connection, unless the server resets the device, which is reported.

    Sends: a write to a register of config space; closes; a read on a new connection.
    Expects: the value that was written, or the power-on value.
    """
    offset, width = t.scratch()
    link = t.attach()
    found = t.read_config(link, offset, width)
    value = bytes(byte ^ 0x35 for byte in found)
    t.write(link, CONFIG, offset, value)
    t.drop(link)
    again = t.attach()
    now = t.read_config(again, offset, width)
    t.write(again, CONFIG, offset, found)
    check(now in (value, b"\0" * width, found), f"the register had {value.hex()}, then {now.hex()}")
    t.saw("registers at the end of a connection", "kept" if now == value else "reset", recommended=now == value)


@AREA.case(12, COMPAT, "R398", effect=CaseEffect.SESSION, compat="QEMU 11")
def killed_client(t: Trial) -> None:
    """A client that is killed in the middle of its attach leaves the server fit for the next.

    Sends: VERSION, a burst of DMA_MAP with descriptors and half a message; closes without reading.
    Expects: the next client is served; the file is released.
    """
    link = t.attach()
    file = t.locked_file(SIZE)
    for n in range(20):
        link.command(MAP, wire.dma_map(BASE + n * SIZE, SIZE), [file.to_give])
    link.send(wire.pack(Command.DEVICE_GET_INFO, wire.info())[:19])
    t.drop(link)
    t.attach().alive()
    file.check_released("of a client that was killed")


@AREA.case(13, MUST, "R230")
def reset_twice(t: Trial) -> None:
    """A device that was just reset can be reset.

    Sends: three DEVICE_RESET in one piece.
    Expects: three successes.
    """
    link = resettable(t)
    link.send(b"".join(wire.pack(Command.DEVICE_RESET, msg_id=n) for n in range(3)))
    for n in range(3):
        check(not link.reply(n, Command.DEVICE_RESET).failed, "DEVICE_RESET failed")


@AREA.case(14, SHOULD, "R230")
def reset_unsupported(t: Trial) -> None:
    """A device that cannot be reset says so.

    Sends: DEVICE_RESET to a device without the RESET flag.
    Expects: an error; the connection goes on.
    """
    if t.facts.resettable:
        raise NotApplicable("the device supports DEVICE_RESET")
    link = t.attach()
    link.refused(Command.DEVICE_RESET)
    link.alive()


@AREA.case(15, COMPAT, "R399", effect=CaseEffect.NONE, compat="QEMU 11")
def ids_skip(t: Trial) -> None:
    """Message ids need not follow one another: QEMU shares one counter among its devices.

    Sends: commands with the ids 5, 3, 900, 0, 65535, 0.
    Expects: replies with these ids.
    """
    link = t.connect()
    link.command(Command.VERSION, wire.version(vectors.QEMU_CAPABILITIES), msg_id=77)
    link.reply(77, Command.VERSION)
    for msg_id in (5, 3, 900, 0, 65535, 0):
        link.command(Command.DEVICE_GET_INFO, wire.info(), msg_id=msg_id)
        check(not link.reply(msg_id, Command.DEVICE_GET_INFO).failed, f"id {msg_id} was refused")
