"""What may come while a DMA command of the server waits for its reply: other commands, an unmap, the end."""

from __future__ import annotations

from collections.abc import Callable

from vfiouser_conformance import wire
from vfiouser_conformance.case import CannotTell, CaseFailed, Level, check, same
from vfiouser_conformance.cases.dma import AREA as AREA
from vfiouser_conformance.cases.dma import SIZE, SMALL, by_messages, into_device, pattern, ready
from vfiouser_conformance.cases.dma_map import BASE, MAP, UNMAP
from vfiouser_conformance.link import Closed, RawLink
from vfiouser_conformance.memory import ServedMemory
from vfiouser_conformance.trial import SILENCE_S, Trial
from vfiouser_conformance.wire import Received
from vfiouser_protocol.constants import Command

MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT


class _Asked(Exception):
    """A DMA command came."""


def _until_asked(
    t: Trial, link: RawLink, start: Callable[[], None], held: list[Received], *, inside: bool = False
) -> None:
    """Start a DMA and wait for its first command, which is kept, not answered.

    Args:
        t: the case's run.
        link: the connection.
        start: starts the DMA.
        held: takes the command.
        inside: whether the command may come before the access that starts the DMA is answered.

    Raises:
        CannotTell: it does, but may not: nothing can be sent meanwhile.
    """

    def asked(_: RawLink, message: Received) -> None:
        held.append(message)
        raise _Asked

    link.on_command = asked
    try:
        start()
    except _Asked:
        if not inside:
            raise CannotTell("the device does its DMA inside the access that starts it") from None
        return
    try:
        check(link.serve(t.timeout), "no DMA command came")
    except _Asked:
        return


@AREA.case(9, COMPAT, "R376", compat="QEMU 11")
def commands_meanwhile(t: Trial) -> None:
    """Commands of the client are served while the server waits for a DMA reply.

    Sends: nothing in reply to DMA_READ, but GET_INFO and REGION_READ; then the reply.
    Expects: both are answered, before or after the DMA; the DMA ends well.
    """
    link = t.attach()
    device = ready(t, link)
    held: list[Received] = []
    link.on_command = lambda _, message: held.append(message)
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    device.start_read(link, BASE, SMALL)
    while not held:
        message = link.receive()
        check(not message.is_reply, f"a reply that nobody waits for: {message}")
        held.append(message)
    first = link.command(Command.DEVICE_GET_INFO, wire.info())
    second = link.command(Command.DEVICE_GET_IRQ_INFO, wire.info())
    memory = ServedMemory(BASE, pattern(SIZE))
    try:
        link.reply(first, Command.DEVICE_GET_INFO, SILENCE_S * 3)
        answered, t_first = "before the DMA's end", True
    except CaseFailed as failure:
        if "no reply" not in str(failure):
            raise
        answered, t_first = "after the DMA's end", False
    t.saw("commands during a DMA", answered, recommended=t_first)
    link.on_command = memory
    for message in held:
        memory(link, message)
    if not t_first:
        link.reply(first, Command.DEVICE_GET_INFO)
    link.reply(second, Command.DEVICE_GET_IRQ_INFO)
    same(0, device.finish(link), "error of the DMA")
    same(pattern(SIZE)[:SMALL], device.taken(link, SMALL), "what the device read")


@AREA.case(14, MUST, "R169")
def unmap_during_dma(t: Trial) -> None:
    """DMA_UNMAP is answered when DMA in the range has stopped.

    Sends: DMA_UNMAP while a DMA_READ is not answered yet; then the reply, if the unmap waits for it.
    Expects: the unmap succeeds; no DMA message comes after its reply.
    """
    link = t.attach_with({"max_msg_fds": 8, "max_data_xfer_size": 4096})
    device = ready(t, link)
    count = min(0x20000, device.largest)
    memory = by_messages(t, link)
    held: list[Received] = []
    _until_asked(t, link, lambda: device.start_read(link, BASE, count), held)
    msg_id = link.command(UNMAP, wire.dma_unmap(BASE, SIZE))
    link.on_command = lambda at, message: memory(at, message)  # the profile need not wait for all of the DMA
    for message in held:
        memory(link, message)
    try:
        reply = link.reply(msg_id, UNMAP)
    except Closed:
        raise
    except CaseFailed:  # it came to nothing, or to the reply to something else: the server has lost it
        raise CannotTell("the server takes no command while it waits for the reply to its own") from None
    check(not reply.failed, "DMA_UNMAP failed during DMA")
    served = len(memory.served)
    device.finish(link)
    same(served, len(memory.served), "DMA messages until the reply to DMA_UNMAP, and in all")


@AREA.case(15, MUST, "R379")
def leave_during_dma(t: Trial) -> None:
    """A client that leaves while a DMA reply is outstanding does no harm.

    Sends: nothing in reply to DMA_READ; closes.
    Expects: the next client is served, and its DMA works.
    """
    link = t.attach()
    device = ready(t, link)
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    _until_asked(t, link, lambda: device.start_read(link, BASE, SMALL), [], inside=True)
    t.drop(link)
    again = t.attach()
    device.prepare(again)
    by_messages(t, again)
    into_device(again, device, BASE, SMALL)
