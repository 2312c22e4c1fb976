"""SET_IRQS by loopback: the client itself triggers the vectors, so that any device will do."""

from __future__ import annotations

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, check, same
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import SILENCE_S, Trial, signalled
from vfiouser_protocol.constants import Command, IrqIndex

AREA = Area("IRQ", "interrupts", CaseEffect.SESSION)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
SET = int(Command.DEVICE_SET_IRQS)
TRIGGER_NONE, TRIGGER_BOOL, TRIGGER_EVENTFD = 0x21, 0x22, 0x24
MASK_NONE, UNMASK_NONE = 0x09, 0x11


def assign(t: Trial, link: RawLink, index: int, start: int, count: int) -> list[int]:
    """Give vectors new eventfds; returns them."""
    events = [t.eventfd() for _ in range(count)]
    reply = link.ok(SET, wire.set_irqs(TRIGGER_EVENTFD, index, start, count), events)
    same(16, reply.size, "size of the SET_IRQS reply")
    return events


def fire(link: RawLink, index: int, start: int, count: int) -> None:
    """Trigger vectors by loopback."""
    link.ok(SET, wire.set_irqs(TRIGGER_NONE, index, start, count))


def check_signals(t: Trial, events: list[int], expected: list[bool], what: str) -> None:
    """Exactly these eventfds are signalled."""
    found = [bool(signalled(event, t.timeout)) for event, wanted in zip(events, expected, strict=True) if wanted]
    check(all(found), f"{what}: {found.count(False)} of {len(found)} eventfds were not signalled")
    others = [event for event, wanted in zip(events, expected, strict=True) if not wanted]
    wrong = [event for event in others if signalled(event, SILENCE_S / 4)]
    check(not wrong, f"{what}: {len(wrong)} eventfds were signalled that should not be")


@AREA.case(1, MUST, "R197 R207")
def loopback(t: Trial) -> None:
    """A triggered vector signals its eventfd.

    Sends: SET_IRQS that assigns an eventfd to vector 0, and TRIGGER with NONE of it.
    Expects: success without a payload; the eventfd has a count of at least 1.
    """
    index, _ = t.facts.vectors()
    link = t.attach()
    events = assign(t, link, index, 0, 1)
    fire(link, index, 0, 1)
    check_signals(t, events, [True], "TRIGGER with NONE")


@AREA.case(2, MUST, "R197")
def loopback_range(t: Trial) -> None:
    """A range of vectors is triggered as a range.

    Sends: eventfds for 4 vectors, TRIGGER with NONE of vectors 1 and 2.
    Expects: these two are signalled.
    """
    index, _ = t.facts.vectors(4)
    link = t.attach()
    events = assign(t, link, index, 0, 4)
    fire(link, index, 1, 2)
    check_signals(t, events, [False, True, True, False], "TRIGGER of [1, +2)")


@AREA.case(3, MUST, "R198")
def loopback_bool(t: Trial) -> None:
    """With BOOL only the chosen vectors are triggered.

    Sends: eventfds for 3 vectors, TRIGGER with BOOL 1, 0, 1.
    Expects: the first and the third are signalled.
    """
    index, _ = t.facts.vectors(3)
    link = t.attach()
    events = assign(t, link, index, 0, 3)
    link.ok(SET, wire.set_irqs(TRIGGER_BOOL, index, 0, 3, b"\x01\x00\x01"))
    check_signals(t, events, [True, False, True], "TRIGGER with BOOL 1, 0, 1")


@AREA.case(4, MUST, "R194")
def disable(t: Trial) -> None:
    """A type is disabled as a whole by TRIGGER with NONE and count 0.

    Sends: eventfds for all vectors (at most 4), disable, TRIGGER of them.
    Expects: success or an error for the last; nothing is signalled.
    """
    index, count = t.facts.vectors()
    count = min(count, 4)
    link = t.attach()
    events = assign(t, link, index, 0, count)
    link.ok(SET, wire.set_irqs(TRIGGER_NONE, index, 0, 0))
    link.call(SET, wire.set_irqs(TRIGGER_NONE, index, 0, count))
    check_signals(t, events, [False] * count, "TRIGGER after disable")


@AREA.case(5, MUST, "R195")
def deassign(t: Trial) -> None:
    """EVENTFD without descriptors de-assigns exactly the given vectors.

    Sends: eventfds for 4 vectors, de-assignment of [2, +2), TRIGGER of all.
    Expects: vectors 0 and 1 are signalled.
    """
    index, _ = t.facts.vectors(4)
    link = t.attach()
    events = assign(t, link, index, 0, 4)
    link.ok(SET, wire.set_irqs(TRIGGER_EVENTFD, index, 2, 2))
    fire(link, index, 0, 4)
    check_signals(t, events, [True, True, False, False], "TRIGGER after de-assignment of [2, +2)")


@AREA.case(6, MUST, "R196")
def replace(t: Trial) -> None:
    """A new eventfd takes the place of the old one.

    Sends: an eventfd for vector 0, another one, TRIGGER.
    Expects: the second only is signalled.
    """
    index, _ = t.facts.vectors()
    link = t.attach()
    old = assign(t, link, index, 0, 1)
    new = assign(t, link, index, 0, 1)
    fire(link, index, 0, 1)
    check_signals(t, [*old, *new], [False, True], "TRIGGER after replacement")


@AREA.case(7, MUST, "R206")
def without_eventfd(t: Trial) -> None:
    """A vector without eventfd can be triggered, to no effect.

    Sends: TRIGGER with NONE and BOOL of vector 0 on a fresh connection.
    Expects: success.
    """
    index, _ = t.facts.vectors()
    link = t.attach()
    fire(link, index, 0, 1)
    link.ok(SET, wire.set_irqs(TRIGGER_BOOL, index, 0, 1, b"\x01"))
    link.alive()


@AREA.case(8, SHOULD, "R199")
def mask_and_unmask(t: Trial) -> None:
    """A type that says MASKABLE can be masked and unmasked.

    Sends: MASK and UNMASK with NONE and BOOL of vector 0.
    Expects: success.
    """
    index = _maskable(t)
    link = t.attach()
    for flags, data in ((MASK_NONE, b""), (UNMASK_NONE, b""), (0x0A, b"\x01"), (0x12, b"\x01")):
        link.ok(SET, wire.set_irqs(flags, index, 0, 1, data))
    link.alive()


def _maskable(t: Trial) -> int:
    for index, (flags, count) in enumerate(t.facts.irqs):
        if flags & 2 and count:
            return index
    raise NotApplicable("no IRQ type of the device is maskable")


@AREA.case(9, SHOULD, "R200")
def unmask_with_descriptor(t: Trial) -> None:
    """UNMASK with a descriptor works or fails, and leaks nothing.

    Sends: UNMASK with EVENTFD of INTx, with the writing end of a pipe in place of an eventfd; closes.
    Expects: any reply; all copies are closed with the connection.
    """
    if not t.facts.irq_count(IrqIndex.INTX):
        raise NotApplicable("the device has no INTx")
    link = t.attach()
    witness = t.witness()
    link.call(SET, wire.set_irqs(0x14, IrqIndex.INTX, 0, 1), witness.fds)
    t.drop(link)
    witness.check_closed("at the end of the connection")


@AREA.case(10, SHOULD, "R201")
def high_flags(t: Trial) -> None:
    """Bits of the flags above the known ones are ignored.

    Sends: disable of a type with flags 0x61.
    Expects: success; a refusal, as the kernel does it, is reported. The connection goes on.
    """
    index, _ = t.facts.vectors()
    link = t.attach()
    reply = link.call(SET, wire.set_irqs(0x61, index, 0, 0))
    t.saw("unknown flags of SET_IRQS", "refused" if reply.failed else "ignored", recommended=not reply.failed)
    fire(link, index, 0, 1)


@AREA.case(11, SHOULD, "R202")
def disable_empty_type(t: Trial) -> None:
    """A type without vectors can be disabled.

    Sends: disable of a type whose count is 0.
    Expects: success (the kernel), or an error (libvfio-user), which is reported.
    """
    found = [index for index, (_, count) in enumerate(t.facts.irqs) if not count]
    if not found:
        raise NotApplicable("every IRQ type of the device has vectors")
    link = t.attach()
    reply = link.call(SET, wire.set_irqs(TRIGGER_NONE, found[0], 0, 0))
    t.saw("disable of a type without vectors", "refused" if reply.failed else "accepted", recommended=not reply.failed)
    link.alive()


@AREA.case(12, COMPAT, "R203", compat="QEMU 11")
def enable_as_qemu(t: Trial) -> None:
    """MSI-X is enabled the way QEMU does it.

    Sends: disable of INTx; EVENTFD of vector 0 without a descriptor; eventfds for the vectors, in pieces of 2.
    Expects: success; all vectors work.
    """
    count = min(t.facts.irq_count(IrqIndex.MSIX), 4)
    if not count:
        raise NotApplicable("the device has no MSI-X")
    link = t.attach()
    if t.facts.irq_count(IrqIndex.INTX):
        link.ok(SET, wire.set_irqs(TRIGGER_NONE, IrqIndex.INTX, 0, 0))
    link.ok(SET, wire.set_irqs(TRIGGER_EVENTFD, IrqIndex.MSIX, 0, 1))
    events: list[int] = []
    for start in range(0, count, 2):
        events += assign(t, link, IrqIndex.MSIX, start, min(2, count - start))
    fire(link, IrqIndex.MSIX, 0, count)
    check_signals(t, events, [True] * count, "TRIGGER of all")


@AREA.case(13, COMPAT, "R204", compat="QEMU 11")
def in_pieces(t: Trial) -> None:
    """Vectors can be set in several messages.

    Sends: eventfds for vectors 2 and 3, then for 0 and 1; TRIGGER of all four.
    Expects: all four are signalled.
    """
    index, _ = t.facts.vectors(4)
    link = t.attach()
    late = assign(t, link, index, 2, 2)
    early = assign(t, link, index, 0, 2)
    fire(link, index, 0, 4)
    check_signals(t, [*early, *late], [True] * 4, "TRIGGER of all")


@AREA.case(14, MUST, "R205")
def types_are_apart(t: Trial) -> None:
    """Each type has eventfds of its own.

    Sends: an eventfd for vector 0 of two types; disable of one; TRIGGER of the other.
    Expects: the other's eventfd is signalled.
    """
    found = [index for index in (IrqIndex.MSI, IrqIndex.MSIX, IrqIndex.ERR) if t.facts.irq_count(index)]
    if len(found) < 2:
        raise NotApplicable("the device has fewer than two such IRQ types")
    link = t.attach()
    first = assign(t, link, found[0], 0, 1)
    second = assign(t, link, found[1], 0, 1)
    link.ok(SET, wire.set_irqs(TRIGGER_NONE, found[1], 0, 0))
    fire(link, found[0], 0, 1)
    check_signals(t, [*first, *second], [True, False], "TRIGGER of the type that was not disabled")


@AREA.case(15, COMPAT, "R209", compat="rust-vmm")
def all_in_one(t: Trial) -> None:
    """All vectors of a type can be set in one message, whatever max_msg_fds says.

    Sends: SET_IRQS with as many eventfds as the largest type has vectors, at most 64; TRIGGER of the last.
    Expects: success; it is signalled.
    """
    index, count = t.facts.vectors(2)
    count = min(count, 64)
    link = t.attach()
    events = assign(t, link, index, 0, count)
    fire(link, index, count - 1, 1)
    check_signals(t, events[-1:], [True], "TRIGGER of the last vector")


@AREA.case(16, MUST, "R194")
def golden_disable(t: Trial) -> None:
    """The golden bytes that disable MSI-X do.

    Sends: SET_IRQS, byte by byte as it is written down.
    Expects: the golden success reply.
    """
    if not t.facts.irq_count(IrqIndex.MSIX):
        raise NotApplicable("the device has no MSI-X")
    link = t.attach()
    link.send(vectors.message("disable MSI-X"))
    reply = link.receive()
    head = wire.HEADER.pack(reply.msg_id, reply.command, reply.size, reply.flags, reply.error)
    same("08000800100000000100000000000000", head.hex(), "reply")


@AREA.case(17, MUST, "R195")
def deassign_all(t: Trial) -> None:
    """De-assigning all vectors leaves none.

    Sends: eventfds for 2 vectors, de-assignment of both, TRIGGER.
    Expects: nothing is signalled.
    """
    index, _ = t.facts.vectors(2)
    link = t.attach()
    events = assign(t, link, index, 0, 2)
    link.ok(SET, wire.set_irqs(TRIGGER_EVENTFD, index, 0, 2))
    fire(link, index, 0, 2)
    check_signals(t, events, [False, False], "TRIGGER after de-assignment")


@AREA.case(18, SHOULD, "R197")
def every_trigger_counts(t: Trial) -> None:
    """Two triggers are two interrupts, or one that is still pending.

    Sends: an eventfd, two TRIGGER, a look, a third TRIGGER.
    Expects: a count of 1 or 2; after the third another signal.
    """
    index, _ = t.facts.vectors()
    if index == IrqIndex.INTX:
        raise NotApplicable("the device has INTx only, which masks itself")
    link = t.attach()
    event = assign(t, link, index, 0, 1)[0]
    fire(link, index, 0, 1)
    fire(link, index, 0, 1)
    count = signalled(event, t.timeout)
    check(1 <= count <= 2, f"two triggers gave a count of {count}")
    fire(link, index, 0, 1)
    check(signalled(event, t.timeout), "the third trigger was lost")


@AREA.case(19, SHOULD, "R197 R426")
def count_is_added_to(t: Trial) -> None:
    """A trigger adds 1 to the count of its eventfd.

    Sends: SET_IRQS that assigns an eventfd with a count of 5 to vector 0, and TRIGGER with NONE of it.
    Expects: a count of 6: nothing was taken away, and 1 was added.
    """
    index, _ = t.facts.vectors()
    link = t.attach()
    event = t.eventfd(5)
    link.ok(SET, wire.set_irqs(TRIGGER_EVENTFD, index, 0, 1), [event])
    fire(link, index, 0, 1)
    found = signalled(event, t.timeout)
    if found == 5:  # it may come later than the reply
        found += signalled(event, t.timeout)
    same(6, found, "count of the eventfd")
