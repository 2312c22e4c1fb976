"""SET_IRQS that has to be refused, and what becomes of its descriptors."""

from __future__ import annotations

from vfiouser_conformance import wire
from vfiouser_conformance.case import Level, NotApplicable, RefusedRequest, refusals
from vfiouser_conformance.cases.irqs import AREA as AREA
from vfiouser_conformance.cases.irqs import SET
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import IrqIndex

MUST, SHOULD = Level.MUST, Level.SHOULD


def _index(t: Trial) -> int:
    return t.facts.vectors()[0]


def _count(t: Trial) -> int:
    return t.facts.vectors()[1]


def _single(t: Trial) -> list[int]:
    """ERR and REQ, as far as the device has them."""
    found = [index for index in (IrqIndex.ERR, IrqIndex.REQ) if t.facts.irq_count(index)]
    if not found:
        raise NotApplicable("the device has neither ERR nor REQ")
    return [int(index) for index in found]


def _request(t: Trial, flags: int, start: int, count: int, data: bytes = b"") -> tuple[int, bytes]:
    return SET, wire.set_irqs(flags, _index(t), start, count, data)


refusals(
    AREA,
    (
        RefusedRequest(
            30, MUST, "R181",
            "A SET_IRQS that is too small is refused.",
            "SET_IRQS with 8 and 19 bytes, and with argsz 0 and 19",
            lambda t: [
                *((SET, wire.set_irqs(0x21, _index(t), 0, 0)[:size]) for size in (8, 19)),
                *((SET, wire.set_irqs(0x21, _index(t), 0, 0, argsz=argsz)) for argsz in (0, 19)),
            ],
        ),
        RefusedRequest(
            31, MUST, "R182",
            "An IRQ index that does not exist is refused.",
            "SET_IRQS of index num_irqs and 0xffffffff",
            lambda t: [(SET, wire.set_irqs(0x21, index, 0, 1)) for index in (len(t.facts.irqs), 0xFFFFFFFF)],
        ),
        RefusedRequest(
            32, MUST, "R183",
            "Exactly one action is asked for.",
            "SET_IRQS with MASK and UNMASK, with MASK and TRIGGER, and with none",
            lambda t: [_request(t, flags, 0, 1) for flags in (0x19, 0x29, 0x01)],
        ),
        RefusedRequest(
            33, MUST, "R184",
            "Exactly one kind of data is given.",
            "SET_IRQS with NONE and BOOL, with NONE and EVENTFD, with none, and with flags 0",
            lambda t: [
                _request(t, 0x23, 0, 1, b"\x01"), _request(t, 0x25, 0, 1), _request(t, 0x20, 0, 1), _request(t, 0, 0, 1)
            ],
        ),
        RefusedRequest(
            34, MUST, "R185",
            "The first vector exists.",
            "TRIGGER with NONE that starts at the number of vectors, and at 0xffffffff",
            lambda t: [_request(t, 0x21, start, 1) for start in (_count(t), 0xFFFFFFFF)],
        ),
        RefusedRequest(
            35, MUST, "R186",
            "All vectors of a range exist.",
            "TRIGGER with NONE of one vector too many, of 0xffffffff, and of a range that wraps",
            lambda t: [
                _request(t, 0x21, 0, _count(t) + 1),
                _request(t, 0x21, 0, 0xFFFFFFFF),
                _request(t, 0x21, _count(t) - 1, 0xFFFFFFFF),
            ],
        ),
        RefusedRequest(
            36, SHOULD, "R187",
            "ERR and REQ cannot be masked.",
            "MASK and UNMASK with NONE of them",
            lambda t: [(SET, wire.set_irqs(flags, index, 0, 1)) for index in _single(t) for flags in (0x09, 0x11)],
        ),
        RefusedRequest(
            37, MUST, "R188",
            "ERR and REQ have one vector.",
            "TRIGGER with NONE of two vectors of them",
            lambda t: [(SET, wire.set_irqs(0x21, index, 0, 2)) for index in _single(t)],
        ),
        RefusedRequest(
            38, SHOULD, "R189",
            "A range of nothing starts at 0.",
            "TRIGGER with NONE, start 1 and count 0",
            lambda t: [_request(t, 0x21, 1, 0)],
        ),
        RefusedRequest(
            39, MUST, "R190",
            "Only TRIGGER with NONE may have count 0.",
            "count 0 with MASK and NONE, TRIGGER and BOOL, TRIGGER and EVENTFD",
            lambda t: [_request(t, flags, 0, 0) for flags in (0x09, 0x22, 0x24)],
        ),
        RefusedRequest(
            40, SHOULD, "R191",
            "Descriptors come with EVENTFD only.",
            "TRIGGER with NONE, and with BOOL, with an eventfd",
            lambda t: [
                (*_request(t, 0x21, 0, 1), [t.eventfd()]), (*_request(t, 0x22, 0, 1, b"\x01"), [t.eventfd()])
            ],
        ),
        RefusedRequest(
            41, MUST, "R192",
            "There are as many descriptors as vectors, or none.",
            "EVENTFD of one vector with two eventfds, and of two with one",
            lambda t: [
                (*_request(t, 0x24, 0, 1), [t.eventfd(), t.eventfd()]),
                *([(*_request(t, 0x24, 0, 2), [t.eventfd()])] if _count(t) > 1 else []),
            ],
        ),
        RefusedRequest(
            42, MUST, "R193",
            "There are as many booleans as vectors.",
            "TRIGGER with BOOL of one vector with none and two booleans",
            lambda t: [_request(t, 0x22, 0, 1), _request(t, 0x22, 0, 1, b"\x01\x01")],
        ),
    ),
)  # fmt: skip


@AREA.case(50, MUST, "R191 R192 R029")
def refused_descriptors(t: Trial) -> None:
    """Descriptors of a SET_IRQS that is refused are closed.

    Sends: EVENTFD of one vector with two descriptors, of an index that does not exist, and TRIGGER with NONE with a
    descriptor; the descriptors are writing ends of pipes.
    Expects: errors; all copies are closed while the connection is open.
    """
    link = t.attach()
    index = _index(t)
    for flags, chosen, copies in ((0x24, index, 2), (0x24, 1000, 1), (0x21, index, 1)):
        witness = t.witness(copies)
        link.call(SET, wire.set_irqs(flags, chosen, 0, 1), witness.fds)
        witness.check_closed("after a SET_IRQS that it refused")
    link.alive()
