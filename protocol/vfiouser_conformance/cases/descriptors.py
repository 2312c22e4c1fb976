"""Descriptors that nobody asked for, and what becomes of them."""

from __future__ import annotations

from vfiouser_conformance import wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, check
from vfiouser_conformance.link import Closed
from vfiouser_conformance.trial import Trial, signalled
from vfiouser_protocol.constants import Command, RegionIndex

AREA = Area("FD", "descriptors", CaseEffect.NONE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT


@AREA.case(1, SHOULD, "R026")
def surplus(t: Trial) -> None:
    """A descriptor that a command has no use for is closed, and the command executed.

    Sends: GET_INFO with the writing end of a pipe.
    Expects: the usual reply; all copies of the descriptor are closed while the connection is open.
    """
    link = t.attach()
    witness = t.witness()
    check(not link.call(Command.DEVICE_GET_INFO, wire.info(), witness.fds).failed, "GET_INFO with a descriptor failed")
    witness.check_closed("after GET_INFO")
    link.alive()


@AREA.case(2, SHOULD, "R027")
def many(t: Trial) -> None:
    """Twenty descriptors that nobody wants are all closed.

    Sends: GET_INFO with 20 descriptors of a pipe.
    Expects: the usual reply, or an error; all closed.
    """
    link = t.attach()
    witness = t.witness(20)
    link.call(Command.DEVICE_GET_INFO, wire.info(), witness.fds)
    witness.check_closed("after GET_INFO with 20 of them")
    link.alive()


@AREA.case(3, SHOULD, "R029")
def failing_commands(t: Trial) -> None:
    """Commands that fail do not keep their descriptors.

    Sends: 100 times each: DMA_MAP too short, SET_IRQS of an unknown index, an unknown command, all with descriptors.
    Expects: errors; all closed while the connection is open.
    """
    link = t.attach()
    witness = t.witness()
    for _ in range(100):
        link.call(Command.DMA_MAP, b"\0" * 8, witness.fds)  # a server that ignores maps may accept it
        link.refused(Command.DEVICE_SET_IRQS, wire.set_irqs(0x24, 1000, 0, 1), witness.fds)
        link.refused(99, b"\0" * 16, witness.fds)
    witness.check_closed("after commands that failed")
    link.alive()


@AREA.case(4, SHOULD, "R026 R029")
def every_command(t: Trial) -> None:
    """No command keeps a descriptor that it has no use for.

    Sends: one of each command that asks for something, with the writing end of a pipe of its own.
    Expects: any reply; all closed while the connection is open.
    """
    link = t.attach()
    for command, payload in (
        (Command.DEVICE_GET_REGION_INFO, wire.region_info(0)),
        (Command.DEVICE_GET_REGION_IO_FDS, wire.info()),
        (Command.DEVICE_GET_IRQ_INFO, wire.info()),
        (Command.REGION_READ, wire.access(RegionIndex.CONFIG, 0, 4)),
        (Command.DMA_UNMAP, wire.dma_unmap(0x1000, 0x1000)),
        (Command.DIRTY_PAGES, b"\0" * 8),
        (Command.REGION_WRITE_MULTI, wire.write_multi([])),
        (Command.DEVICE_FEATURE, wire.feature(0x10001, argsz=16)),
        (Command.MIG_DATA_READ, wire.mig_data(0)),
        (Command.MIG_DATA_WRITE, wire.mig_data(0)),
    ):
        witness = t.witness()
        link.call(command, payload, witness.fds)
        witness.check_closed(f"after {command.name}")


@AREA.case(5, SHOULD, "R029 R006")
def without_reply(t: Trial) -> None:
    """Commands that want no reply do not keep descriptors either.

    Sends: GET_INFO, and a DMA_MAP that has to fail, with NO_REPLY and descriptors.
    Expects: no reply; all closed while the connection is open.
    """
    link = t.attach()
    witness = t.witness(2)
    link.command(Command.DEVICE_GET_INFO, wire.info(), witness.fds, flags=wire.NO_REPLY)
    link.command(Command.DMA_MAP, b"\0" * 8, witness.fds, flags=wire.NO_REPLY)
    link.alive()
    witness.check_closed("after commands without reply")


@AREA.case(6, SHOULD, "R020", effect=CaseEffect.SESSION)
def descriptor_with_the_first_byte(t: Trial) -> None:
    """A descriptor that comes with the first byte of a message belongs to it, however the message is cut.

    Sends: SET_IRQS with an eventfd, its first byte and the descriptor first, then the rest; then TRIGGER.
    Expects: success; the eventfd is signalled.
    """
    index, _ = t.facts.vectors()
    link = t.attach()
    event = t.eventfd()
    data = wire.pack(Command.DEVICE_SET_IRQS, wire.set_irqs(0x24, index, 0, 1), msg_id=5)
    link.send(data[:1], [event])
    link.send(data[1:])
    check(not link.reply(5, Command.DEVICE_SET_IRQS).failed, "SET_IRQS in two pieces failed")
    link.ok(Command.DEVICE_SET_IRQS, wire.set_irqs(0x21, index, 0, 1))
    check(signalled(event, t.timeout), "the eventfd was not signalled")


@AREA.case(7, SHOULD, "R027")
def as_many_as_the_kernel_takes(t: Trial) -> None:
    """The largest number of descriptors that one message can carry is closed, too.

    Sends: GET_INFO with 253 descriptors of a pipe.
    Expects: a reply or the end of the connection; all closed; the next client is served.
    """
    link = t.attach()
    try:
        witness = t.witness(253)
    except OSError as error:
        raise NotApplicable(f"this process may not open that many descriptors: {error.strerror}") from None
    try:
        link.call(Command.DEVICE_GET_INFO, wire.info(), witness.fds)
    except Closed:
        pass
    witness.check_closed("after GET_INFO with 253 of them")
    t.drop(link)
    t.attach().alive()


@AREA.case(8, MUST, "R032 R029")
def half_a_message(t: Trial) -> None:
    """Descriptors of a message that never becomes whole are closed with the connection.

    Sends: half a DMA_MAP with a descriptor, and closes.
    Expects: all copies are closed.
    """
    link = t.attach()
    witness = t.witness()
    link.send(wire.pack(Command.DMA_MAP, wire.dma_map(0x1000, 0x1000))[:20], witness.fds)
    t.drop(link)
    witness.check_closed("after half a message")
