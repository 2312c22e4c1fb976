"""GET_INFO and GET_IRQ_INFO."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, RefusedRequest, check, refusals, same
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command, DeviceInfoFlags, IrqIndex, IrqInfoFlags

AREA = Area("INFO", "device and interrupt information", CaseEffect.NONE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
_PCI_REGIONS, _PCI_IRQS = 9, 5
_KNOWN_IRQ_FLAGS = 0xF


def _info(t: Trial, payload: bytes) -> tuple[int, int, int, int]:
    link = t.attach()
    reply = link.ok(Command.DEVICE_GET_INFO, payload)
    t.drop(link)
    same(16, len(reply.payload), "payload of the GET_INFO reply")
    argsz, flags, regions, irqs = wire.INFO.unpack(reply.payload)
    return argsz, flags, regions, irqs


@AREA.case(1, MUST, "R080")
def get_info(t: Trial) -> None:
    """GET_INFO describes the device in 16 bytes.

    Sends: GET_INFO with argsz 16.
    Expects: argsz 16; a PCI device has at least 9 regions and 5 IRQ types.
    """
    argsz, flags, regions, irqs = _info(t, wire.info())
    same(16, argsz, "argsz of the reply")
    if flags & DeviceInfoFlags.PCI:
        check(regions >= _PCI_REGIONS, f"a PCI device with {regions} regions")
        check(irqs >= _PCI_IRQS, f"a PCI device with {irqs} IRQ types")


@AREA.case(2, COMPAT, "R080", compat="QEMU 11")
def info_for_qemu(t: Trial) -> None:
    """The device is one that QEMU attaches.

    Sends: GET_INFO.
    Expects: the PCI flag, 8 to 100 regions, 3 to 50 IRQ types.
    """
    _, flags, regions, irqs = _info(t, wire.info())
    check(flags & DeviceInfoFlags.PCI, f"flags {flags:#x} lack PCI")
    check(8 <= regions <= 100, f"{regions} regions")
    check(3 <= irqs <= 50, f"{irqs} IRQ types")


@AREA.case(3, MUST, "R082 R083")
def larger_argsz(t: Trial) -> None:
    """More room than needed changes nothing.

    Sends: GET_INFO with argsz 32, 1000 and 0xffffffff.
    Expects: 16 bytes with argsz 16.
    """
    for argsz in (32, 1000, 0xFFFFFFFF):
        same(16, _info(t, wire.info(argsz))[0], f"argsz of the reply to argsz {argsz}")


@AREA.case(4, COMPAT, "R025", compat="QEMU's v1 forks")
def longer_payload(t: Trial) -> None:
    """A request that has more than the fields we know is answered like one that has not.

    Sends: GET_INFO with 20 bytes and argsz 20, as older QEMU forks do.
    Expects: success with 16 bytes.
    """
    _info(t, wire.info(20) + b"\0\0\0\0")


@AREA.case(5, SHOULD, "R084")
def fields_of_the_request(t: Trial) -> None:
    """What a request has in the reply's fields is ignored.

    Sends: GET_INFO with flags, num_regions and num_irqs of 0xffffffff.
    Expects: the same reply as ever.
    """
    same(_info(t, wire.info()), _info(t, wire.info(16, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)), "GET_INFO")


@AREA.case(6, MUST, "R080")
def stable(t: Trial) -> None:
    """The device does not change while it is looked at.

    Sends: GET_INFO three times, the last on another connection.
    Expects: three equal replies.
    """
    link = t.attach()
    found = {link.ok(Command.DEVICE_GET_INFO, wire.info()).payload for _ in range(2)}
    t.drop(link)
    found.add(t.attach().ok(Command.DEVICE_GET_INFO, wire.info()).payload)
    same(1, len(found), "number of different GET_INFO replies")


def _irq(t: Trial, index: int, argsz: int = 16) -> tuple[int, int, int, int]:
    link = t.attach()
    reply = link.ok(Command.DEVICE_GET_IRQ_INFO, wire.info(argsz, 0, index))
    t.drop(link)
    same(16, len(reply.payload), "payload of the GET_IRQ_INFO reply")
    size, flags, echoed, count = wire.INFO.unpack(reply.payload)
    same(16, size, "argsz of the reply")
    same(index, echoed, "index of the reply")
    return size, flags, echoed, count


@AREA.case(20, MUST, "R102")
def get_irq_info(t: Trial) -> None:
    """Every IRQ type can be asked about.

    Sends: GET_IRQ_INFO for each index below num_irqs.
    Expects: 16 bytes, argsz 16, the index, known flags; EVENTFD where there are vectors.
    """
    check(t.facts.irqs, "the device has no IRQ types at all")
    for index in range(len(t.facts.irqs)):
        _, flags, _, count = _irq(t, index)
        check(not flags & ~_KNOWN_IRQ_FLAGS, f"IRQ index {index} has the unknown flags {flags:#x}")
        check(not count or flags & IrqInfoFlags.EVENTFD, f"an eventfd cannot signal IRQ index {index}")


@AREA.case(21, MUST, "R102")
def irq_limits(t: Trial) -> None:
    """A PCI function has no more vectors than PCI allows.

    Sends: GET_IRQ_INFO for the five PCI types.
    Expects: at most 1 INTx, 32 MSI (a power of two), 2048 MSI-X, 1 ERR, 1 REQ.
    """
    for index, most in enumerate((1, 32, 2048, 1, 1)):
        if index < len(t.facts.irqs):
            count = t.facts.irqs[index][1]
            check(count <= most, f"IRQ index {index} has {count} vectors")
    msi = t.facts.irq_count(IrqIndex.MSI)
    check(msi & (msi - 1) == 0, f"{msi} MSI vectors")


@AREA.case(22, SHOULD, "R106")
def empty_irq_type(t: Trial) -> None:
    """A type without vectors is described, not refused.

    Sends: GET_IRQ_INFO for a type whose count is 0.
    Expects: success.
    """
    found = [index for index, (_, count) in enumerate(t.facts.irqs) if not count]
    if not found:
        raise NotApplicable("every IRQ type of the device has vectors")
    for index in found:
        same(0, _irq(t, index)[3], "count")


@AREA.case(23, SHOULD, "R105")
def intx_flags(t: Trial) -> None:
    """INTx, a level, can be masked and masks itself.

    Sends: GET_IRQ_INFO 0.
    Expects: EVENTFD, MASKABLE and AUTOMASKED together. libvfio-user has EVENTFD only, which is reported.
    """
    if not t.facts.irq_count(IrqIndex.INTX):
        raise NotApplicable("the device has no INTx")
    flags = _irq(t, IrqIndex.INTX)[1]
    level = IrqInfoFlags.MASKABLE | IrqInfoFlags.AUTOMASKED
    if not flags & level:
        t.saw("INTx flags", "EVENTFD only", recommended=False)
        return
    same(int(level), flags & level, "MASKABLE and AUTOMASKED of INTx")
    t.saw("INTx flags", "MASKABLE and AUTOMASKED", recommended=True)


@AREA.case(24, MUST, "R083 R082")
def irq_larger_argsz(t: Trial) -> None:
    """More room than needed changes nothing for GET_IRQ_INFO.

    Sends: GET_IRQ_INFO with argsz 32 and 4096.
    Expects: 16 bytes with argsz 16.
    """
    for argsz in (32, 4096):
        _irq(t, 0, argsz)


@AREA.case(25, MUST, "R102")
def counts_match_config(t: Trial) -> None:
    """The vectors of MSI and MSI-X are those of the capabilities in config space.

    Sends: GET_IRQ_INFO 1 and 2, and a read of config space.
    Expects: the counts of the message control registers.
    """
    found = interrupt_capabilities(t.facts.config)
    if not found:
        raise NotApplicable("config space has neither an MSI nor an MSI-X capability")
    for index, (_, count) in found.items():
        same(count, _irq(t, index)[3], f"vectors of IRQ index {index}")


def interrupt_capabilities(config: bytes) -> dict[int, tuple[int, int]]:
    """Offset and number of vectors of the MSI and MSI-X capabilities in config space, by IRQ index."""
    found: dict[int, tuple[int, int]] = {}
    if len(config) < 256 or not config[6] & 0x10:
        return found
    at, seen = config[0x34] & 0xFC, 0
    while 0x40 <= at <= 0xFC and seen < 48:
        control = struct.unpack_from("<H", config, at + 2)[0] if at <= 0xFC else 0
        if config[at] == 0x05:
            found[IrqIndex.MSI] = (at, 1 << (control >> 1 & 7))
        elif config[at] == 0x11:
            found[IrqIndex.MSIX] = (at, (control & 0x7FF) + 1)
        at, seen = config[at + 1] & 0xFC, seen + 1
    return found


@AREA.case(26, MUST, "R080")
def golden_irq_info(t: Trial) -> None:
    """The golden bytes of GET_IRQ_INFO get a reply whose fixed fields are the golden ones.

    Sends: GET_IRQ_INFO 2, byte by byte as it is written down.
    Expects: header, argsz 16 and index 2 as written down.
    """
    if len(t.facts.irqs) < 3:
        raise NotApplicable("the device has no IRQ index 2")
    link = t.attach()
    link.send(vectors.message("get irq info 2"))
    reply = link.reply(4, Command.DEVICE_GET_IRQ_INFO)
    same("10000000", reply.payload[:4].hex(), "argsz")
    same("02000000", reply.payload[8:12].hex(), "index")


_GET, _IRQ = int(Command.DEVICE_GET_INFO), int(Command.DEVICE_GET_IRQ_INFO)

refusals(
    AREA,
    (
        RefusedRequest(
            10, MUST, "R081",
            "A client without room for the reply is refused.",
            "GET_INFO with argsz 0 and 15",
            lambda t: [(_GET, wire.info(0)), (_GET, wire.info(15))],
        ),
        RefusedRequest(
            11, MUST, "R081",
            "A request that is shorter than its fixed part is refused.",
            "GET_INFO with 4 and 15 bytes",
            lambda t: [(_GET, wire.info()[:4]), (_GET, wire.info()[:15])],
        ),
        RefusedRequest(
            30, MUST, "R103",
            "An IRQ index that does not exist is refused.",
            "GET_IRQ_INFO of index num_irqs and 0xffffffff",
            lambda t: [(_IRQ, wire.info(16, 0, len(t.facts.irqs))), (_IRQ, wire.info(16, 0, 0xFFFFFFFF))],
        ),
        RefusedRequest(
            31, MUST, "R104",
            "GET_IRQ_INFO without room for the reply, or shorter than its fixed part, is refused.",
            "GET_IRQ_INFO with argsz 8 and 15, and with 8 and 15 bytes",
            lambda t: [
                *((_IRQ, wire.info(argsz, 0, 0)) for argsz in (8, 15)),
                *((_IRQ, wire.info()[:size]) for size in (8, 15)),
            ],
        ),
    ),
)  # fmt: skip
