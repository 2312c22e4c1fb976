"""DMA_MAP and DMA_UNMAP, as far as they can be judged without DMA."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, RefusedRequest, check, refusals, same
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command, DmaUnmapFlags

AREA = Area("DMA-MAP", "DMA mapping", CaseEffect.SESSION)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
MAP, UNMAP = int(Command.DMA_MAP), int(Command.DMA_UNMAP)
Requests = Sequence[tuple[int, bytes] | tuple[int, bytes, Sequence[int]]]
ALL = int(DmaUnmapFlags.ALL)
BASE, SIZE = 0x100000, 0x10000
_PAGE = wire.PAGE
#: More mappings than this are not made to find out what happens at the limit.
_PATIENCE = 4096
#: As many mappings a server may be expected to take that does not say how many it takes.
_UNANNOUNCED = 16


def unmap(link: RawLink, address: int, size: int) -> None:
    """DMA_UNMAP that has to succeed."""
    request = wire.dma_unmap(address, size)
    same(request.hex(), link.ok(UNMAP, request).payload.hex(), "payload of the DMA_UNMAP reply")


@AREA.case(1, MUST, "R140")
def map_with_fd(t: Trial) -> None:
    """Memory with a descriptor can be mapped.

    Sends: the golden bytes of DMA_MAP, with the descriptor of a file of memory.
    Expects: success without a payload.
    """
    link = t.attach()
    link.send(vectors.message("map 64 KiB at 0x100000"), [t.memfd(SIZE)])
    reply = link.reply(6, MAP)
    check(not reply.failed, f"DMA_MAP failed with error {reply.error}")
    same(16, reply.size, "size of the DMA_MAP reply")


@AREA.case(2, MUST, "R141")
def map_without_fd(t: Trial) -> None:
    """Memory without a descriptor can be mapped.

    Sends: DMA_MAP without a descriptor, for reading and writing, and for reading only.
    Expects: success without a payload.
    """
    link = t.attach()
    for n, flags in enumerate((3, 1)):
        same(16, link.ok(MAP, wire.dma_map(BASE + n * SIZE, SIZE, 0, flags)).size, "size of the DMA_MAP reply")


@AREA.case(3, SHOULD, "R143")
def map_larger_argsz(t: Trial) -> None:
    """A DMA_MAP with more than the fields we know is a DMA_MAP all the same.

    Sends: DMA_MAP with argsz 64, and with 8 bytes more.
    Expects: success.
    """
    link = t.attach()
    link.ok(MAP, wire.dma_map(BASE, SIZE, argsz=64))
    link.ok(MAP, wire.dma_map(BASE + SIZE, SIZE, argsz=40) + b"\0" * 8)


@AREA.case(4, SHOULD, "R146")
def same_mapping_twice(t: Trial) -> None:
    """Mapping the same again leaves the mapping as it is.

    Sends: the same DMA_MAP twice, with the same file; then DMA_UNMAP.
    Expects: the second succeeds (libvfio-user, recommended) or fails (EEXIST in the specification); the unmap succeeds,
    and a second unmap does not.
    """
    t.facts.maps()
    link = t.attach()
    fd = t.memfd(SIZE)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [fd])
    again = link.call(MAP, wire.dma_map(BASE, SIZE), [fd])
    seen = f"refused with error {again.error}" if again.failed else "accepted"
    t.saw("the same DMA_MAP twice", seen, recommended=not again.failed)
    unmap(link, BASE, SIZE)
    link.refused(UNMAP, wire.dma_unmap(BASE, SIZE))


@AREA.case(5, MUST, "R147 R163")
def overlap(t: Trial) -> None:
    """Mappings do not overlap, and one that would leaves the old one alone.

    Sends: DMA_MAP of a range, and of ranges that begin before, inside, and around it.
    Expects: the later ones fail with any error (EEXIST in the specification); the first can be unmapped.
    """
    t.facts.maps()
    link = t.attach()
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    for address, size in (
        (BASE - _PAGE, 2 * _PAGE),
        (BASE + _PAGE, _PAGE),
        (BASE + SIZE - _PAGE, SIZE),
        (BASE - _PAGE, SIZE + 2 * _PAGE),
    ):
        link.refused(MAP, wire.dma_map(address, size))
    unmap(link, BASE, SIZE)


@AREA.case(6, MUST, "R148")
def other_properties(t: Trial) -> None:
    """A mapped range cannot be given another file, another offset or other rights.

    Sends: DMA_MAP of a file; of the same range at another offset, of another file, for reading only, without a file.
    Expects: the later ones fail; the first can be unmapped.
    """
    t.facts.maps()
    link = t.attach()
    fd, other = t.memfd(2 * SIZE), t.memfd(2 * SIZE)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [fd])
    for payload, fds in (
        (wire.dma_map(BASE, SIZE, _PAGE), [fd]),
        (wire.dma_map(BASE, SIZE), [other]),
        (wire.dma_map(BASE, SIZE, 0, 1), [fd]),
        (wire.dma_map(BASE, SIZE), []),
    ):
        link.refused(MAP, payload, fds)
    unmap(link, BASE, SIZE)


@AREA.case(7, SHOULD, "R153")
def top_of_the_address_space(t: Trial) -> None:
    """A mapping may end where addresses end.

    Sends: DMA_MAP of the last page below 2^64, and DMA_UNMAP.
    Expects: success.
    """
    t.facts.maps()
    link = t.attach()
    link.ok(MAP, wire.dma_map((1 << 64) - _PAGE, _PAGE))
    unmap(link, (1 << 64) - _PAGE, _PAGE)


@AREA.case(8, SHOULD, "R155")
def unmappable(t: Trial) -> None:
    """A descriptor that has no memory is refused, and closed.

    Sends: DMA_MAP with the writing end of a pipe.
    Expects: an error; all copies of the descriptor are closed.
    """
    t.facts.maps()
    link = t.attach()
    witness = t.witness()
    link.refused(MAP, wire.dma_map(BASE, SIZE), witness.fds)
    witness.check_closed("after the DMA_MAP that it refused")


@AREA.case(9, SHOULD, "R156")
def read_only_for_writing(t: Trial) -> None:
    """A file that cannot be written is not mapped for writing.

    Sends: DMA_MAP for reading and writing, with a descriptor that is open for reading only.
    Expects: an error.
    """
    t.facts.maps()
    t.attach().refused(MAP, wire.dma_map(BASE, SIZE), [t.read_only(t.memfd(SIZE))])


@AREA.case(10, COMPAT, "R157", compat="QEMU 11")
def read_only(t: Trial) -> None:
    """A file that cannot be written can be mapped for reading.

    Sends: DMA_MAP for reading, with a descriptor that is open for reading only; DMA_UNMAP.
    Expects: success.
    """
    t.facts.maps()
    link = t.attach()
    link.ok(MAP, wire.dma_map(BASE, SIZE, 0, 1), [t.read_only(t.memfd(SIZE))])
    unmap(link, BASE, SIZE)


@AREA.case(11, SHOULD, "R158")
def two_fds(t: Trial) -> None:
    """A descriptor too many is closed.

    Sends: DMA_MAP with a file of memory and the writing end of a pipe.
    Expects: success or an error, and all copies of the second descriptor closed.
    """
    link = t.attach()
    witness = t.witness()
    reply = link.call(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE), *witness.fds])
    t.saw("DMA_MAP with two descriptors", "refused" if reply.failed else "accepted", recommended=True)
    witness.check_closed("after a DMA_MAP with two")


@AREA.case(12, MUST, "R161")
def unmap_echo(t: Trial) -> None:
    """DMA_UNMAP is confirmed with its own 24 bytes.

    Sends: DMA_MAP, then the golden bytes of DMA_UNMAP.
    Expects: 24 bytes, the request's.
    """
    t.facts.maps()
    link = t.attach()
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    request = vectors.message("unmap 64 KiB at 0x100000")
    link.send(request)
    reply = link.reply(7, UNMAP)
    check(not reply.failed, f"DMA_UNMAP failed with error {reply.error}")
    same(request[16:].hex(), reply.payload.hex(), "payload of the DMA_UNMAP reply")


@AREA.case(13, MUST, "R162")
def unmap_nothing(t: Trial) -> None:
    """What is not mapped cannot be unmapped.

    Sends: DMA_UNMAP on a fresh connection, and of a range that was unmapped before.
    Expects: an error with any number; ENOENT is usual.
    """
    t.facts.maps()
    link = t.attach()
    number = link.refused(UNMAP, wire.dma_unmap(BASE, SIZE))
    t.saw("DMA_UNMAP of nothing", f"error {number}", recommended=number == 2)
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    unmap(link, BASE, SIZE)
    link.refused(UNMAP, wire.dma_unmap(BASE, SIZE))


@AREA.case(14, MUST, "R163")
def partial_unmap(t: Trial) -> None:
    """Mappings are unmapped one by one and whole.

    Sends: DMA_MAP of two ranges side by side; DMA_UNMAP of a part, of more, and of both at once.
    Expects: errors; then both can be unmapped.
    """
    t.facts.maps()
    link = t.attach()
    for n in range(2):
        link.ok(MAP, wire.dma_map(BASE + n * SIZE, SIZE))
    for address, size in ((BASE, _PAGE), (BASE + _PAGE, SIZE - _PAGE), (BASE, 2 * SIZE), (BASE - _PAGE, SIZE)):
        link.refused(UNMAP, wire.dma_unmap(address, size))
    unmap(link, BASE, SIZE)
    unmap(link, BASE + SIZE, SIZE)


@AREA.case(15, COMPAT, "R166", compat="libvfio-user's sample client")
def unmap_all(t: Trial) -> None:
    """Everything can be unmapped at once.

    Sends: DMA_UNMAP with flag ALL, without and with mappings; DMA_UNMAP of one of them; DMA_MAP of it again.
    Expects: ALL succeeds; nothing is mapped then.
    """
    t.facts.maps()
    link = t.attach()
    request = wire.dma_unmap(0, 0, ALL)
    link.ok(UNMAP, request)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    link.ok(MAP, wire.dma_map(BASE + SIZE, SIZE))
    link.ok(UNMAP, request)
    link.refused(UNMAP, wire.dma_unmap(BASE, SIZE))
    link.ok(MAP, wire.dma_map(BASE, 2 * SIZE))


@AREA.case(16, COMPAT, "R171", compat="QEMU 11")
def peer_to_peer(t: Trial) -> None:
    """The device's own BAR can be mapped for DMA, as QEMU does when a guest enables it.

    Sends: DMA_MAP without a descriptor of a page in the hole below 4 GiB; DMA_UNMAP.
    Expects: success.
    """
    t.facts.maps()
    link = t.attach()
    link.ok(MAP, wire.dma_map(0xFE001000, _PAGE))
    unmap(link, 0xFE001000, _PAGE)


@AREA.case(17, MUST, "R172 R009")
def burst(t: Trial) -> None:
    """A burst of maps and unmaps is answered in its order: clients wait for the last reply only.

    Sends: DMA_MAP with descriptors, 40 or as many as the server announces, or 16 if it announces nothing; as many
    DMA_UNMAP, without reading; then reads.
    Expects: successes in order.
    """
    link = t.attach()
    fd = t.memfd(SIZE)
    announced = t.facts.capabilities.get("max_dma_maps")
    count = min(40, announced) if isinstance(announced, int) and announced > 0 else _UNANNOUNCED
    for n in range(count):
        link.command(MAP, wire.dma_map(BASE + n * SIZE, SIZE), [fd], msg_id=n)
    for n in range(count):
        link.command(UNMAP, wire.dma_unmap(BASE + n * SIZE, SIZE), msg_id=40 + n)
    for n in (*range(count), *range(40, 40 + count)):
        reply = link.reply(n, MAP if n < 40 else UNMAP)
        check(not reply.failed, f"command {n} of the burst failed with error {reply.error}")


@AREA.case(18, MUST, "R168")
def unmap_releases(t: Trial) -> None:
    """After DMA_UNMAP the server neither has nor maps the file any more.

    Sends: DMA_MAP of a locked file, DMA_UNMAP.
    Expects: the lock is free in time: no copy of the descriptor and no mapping of it is left.
    """
    t.facts.maps()
    link = t.attach()
    file = t.locked_file(SIZE)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [file.to_give])
    file.given()
    unmap(link, BASE, SIZE)
    file.check_released("after DMA_UNMAP")


@AREA.case(19, MUST, "R170 R176")
def cycles(t: Trial) -> None:
    """Mapping and unmapping again and again leaks nothing.

    Sends: 300 DMA_MAP with the descriptor of the same locked file and DMA_UNMAP, at the same address.
    Expects: success each time; the lock is free in the end.
    """
    t.facts.maps()
    link = t.attach()
    file = t.locked_file(SIZE)
    for _ in range(300):
        link.ok(MAP, wire.dma_map(BASE, SIZE), [file.to_give])
        unmap(link, BASE, SIZE)
    file.check_released("after the last of 300 DMA_UNMAP")


@AREA.case(20, SHOULD, "R175")
def unmap_with_surplus(t: Trial) -> None:
    """A DMA_UNMAP with more than the fields we know is a DMA_UNMAP all the same.

    Sends: DMA_UNMAP with 8 bytes more and argsz 64.
    Expects: success.
    """
    t.facts.maps()
    link = t.attach()
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    link.ok(UNMAP, wire.dma_unmap(BASE, SIZE, 0, 64) + b"\0" * 8)


@AREA.case(21, MUST, "R150")
def announced_limit(t: Trial) -> None:
    """As many mappings as announced can be made; one more changes nothing of them.

    Sends: DMA_MAP without descriptors, as many as max_dma_maps says, and one more; DMA_UNMAP of the first and the last.
    Expects: success up to the limit. QEMU goes beyond it, so one more may be refused or accepted.
    """
    t.facts.maps()
    limit = t.facts.capabilities.get("max_dma_maps")
    if not isinstance(limit, int) or limit > _PATIENCE:
        raise NotApplicable(f"the server's max_dma_maps is {limit or 'not announced'}")
    link = t.attach()
    for n in range(limit):
        link.ok(MAP, wire.dma_map(BASE + n * _PAGE, _PAGE))
    one_more = link.call(MAP, wire.dma_map(BASE + limit * _PAGE, _PAGE))
    t.saw("DMA_MAP above max_dma_maps", "refused" if one_more.failed else "accepted", recommended=True)
    unmap(link, BASE, _PAGE)
    unmap(link, BASE + (limit - 1) * _PAGE, _PAGE)


@AREA.case(22, MUST, "R160")
def map_with_offset(t: Trial) -> None:
    """A mapping may begin anywhere in its file, and one file may back several.

    Sends: DMA_MAP of three parts of a file, the last first.
    Expects: success.
    """
    link = t.attach()
    fd = t.memfd(0x400000)
    for n, offset in enumerate((0x300000, 0x100000, 0)):
        link.ok(MAP, wire.dma_map(BASE + n * SIZE, SIZE, offset), [fd])


@AREA.case(23, SHOULD, "R154")
def beyond_the_file(t: Trial) -> None:
    """A mapping that its file does not have does no harm.

    Sends: DMA_MAP of 64 KiB of a file of 4 KiB, and of a file that is cut to nothing afterwards; DMA_UNMAP.
    Expects: success or an error; the server lives.
    """
    t.facts.maps()
    link = t.attach()
    small, cut = t.memfd(_PAGE), t.memfd(SIZE)
    for n, fd in enumerate((small, cut)):
        reply = link.call(MAP, wire.dma_map(BASE + n * SIZE, SIZE), [fd])
        os.ftruncate(cut, 0)
        if not reply.failed:
            unmap(link, BASE + n * SIZE, SIZE)
    link.alive()


def _mapped(t: Trial) -> RawLink:
    t.facts.maps()
    t.link.ok(MAP, wire.dma_map(BASE, SIZE))
    return t.link


def _maps(t: Trial, *requests: tuple[int, bytes] | tuple[int, bytes, Sequence[int]]) -> Requests:
    """Requests that only a server refuses that keeps maps."""
    t.facts.maps()
    return requests


def _requests(t: Trial, *payloads: bytes) -> list[tuple[int, bytes]]:
    """DMA_UNMAP requests against a mapping that is there."""
    _mapped(t)
    return [(UNMAP, payload) for payload in payloads]


refusals(
    AREA,
    (
        RefusedRequest(
            40, MUST, "R142",
            "A DMA_MAP that is too small is refused.",
            "DMA_MAP with 16 and 31 bytes, and with argsz 0 and 31",
            lambda t: _maps(
                t,
                *((MAP, wire.dma_map(BASE, SIZE)[:size]) for size in (16, 31)),
                *((MAP, wire.dma_map(BASE, SIZE, argsz=argsz)) for argsz in (0, 31)),
            ),
        ),
        RefusedRequest(
            41, SHOULD, "R144",
            "Flags of DMA_MAP that mean nothing yet are refused.",
            "DMA_MAP with the flags 0x13 and 0x80000003",
            lambda t: _maps(t, *[(MAP, wire.dma_map(BASE, SIZE, 0, flags)) for flags in (0x13, 0x80000003)]),
        ),
        RefusedRequest(
            42, SHOULD, "R145",
            "The flags for the use of a descriptor need a descriptor.",
            "DMA_MAP with the flags MMAP 0x4 and FILE_IO 0x8, without a descriptor",
            lambda t: _maps(t, *[(MAP, wire.dma_map(BASE, SIZE, 0, flags)) for flags in (0x7, 0xB)]),
        ),
        RefusedRequest(
            43, SHOULD, "R151",
            "A mapping of nothing is refused.",
            "DMA_MAP of size 0, with and without a descriptor",
            lambda t: _maps(t, (MAP, wire.dma_map(BASE, 0)), (MAP, wire.dma_map(BASE, 0), [t.memfd(SIZE)])),
        ),
        RefusedRequest(
            44, MUST, "R152",
            "A mapping does not wrap around the end of addresses.",
            "DMA_MAP of two pages at 2^64 - 4096, and of size 2^64 - 1 at 4096",
            lambda t: _maps(
                t,
                (MAP, wire.dma_map((1 << 64) - _PAGE, 2 * _PAGE)),
                (MAP, wire.dma_map(_PAGE, wire.U64)),
            ),
        ),
        RefusedRequest(
            45, MUST, "R164",
            "A DMA_UNMAP that is too small is refused.",
            "DMA_UNMAP of a mapping with 16 and 23 bytes, and with argsz 0 and 23",
            lambda t: _requests(
                t,
                *(wire.dma_unmap(BASE, SIZE)[:size] for size in (16, 23)),
                *(wire.dma_unmap(BASE, SIZE, 0, argsz) for argsz in (0, 23)),
            ),
        ),
        RefusedRequest(
            46, SHOULD, "R165",
            "Flags of DMA_UNMAP that mean nothing are refused.",
            "DMA_UNMAP of a mapping with the flags 0x4 and 0x80000000",
            lambda t: _requests(t, *(wire.dma_unmap(BASE, SIZE, flags) for flags in (0x4, 0x80000000))),
        ),
        RefusedRequest(
            47, SHOULD, "R167",
            "DMA_UNMAP of everything has neither address nor size nor bitmap.",
            "DMA_UNMAP with ALL and the address and size of a mapping, and with ALL and GET_DIRTY_BITMAP",
            lambda t: _requests(
                t, wire.dma_unmap(BASE, SIZE, ALL), wire.dma_unmap(0, 0, ALL | 1, 48) + b"\0" * 16
            ),
        ),
    ),
)  # fmt: skip
