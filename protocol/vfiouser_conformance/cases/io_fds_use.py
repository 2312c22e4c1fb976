"""GET_REGION_IO_FDS: room for more than there is, the descriptors that come, and what a signal of one does."""

from __future__ import annotations

import errno
import os
import select
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vfiouser_conformance import wire
from vfiouser_conformance.case import CannotTell, CaseEffect, Level, NotApplicable, check, same
from vfiouser_conformance.cases.io_fds import AREA as AREA
from vfiouser_conformance.cases.io_fds import IO_FDS, NO_FD, ask, bars
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import IoFdType

SHOULD = Level.SHOULD
_ROOM = 1 << 20
#: How often a counter is looked at, in milliseconds: nothing tells when it is read.
_LOOK_MS = 5


@dataclass(frozen=True, slots=True)
class _Entry:
    """One sub-region, as it was answered.

    Args:
        region: its region.
        offset: inside the region.
        kind: IoFdType.
        numbers: places of its descriptor and, if it has one, of its shadow memory.
        fd: its descriptor; None = none.
    """

    region: int
    offset: int
    kind: int
    numbers: tuple[int, ...]
    fd: int | None


def _entries(t: Trial, link: RawLink) -> Iterator[tuple[list[_Entry], tuple[int, ...]]]:
    """The entries of each BAR that has some, and the descriptors that came with them."""
    none = True
    for index in bars(t):
        size, _, count, _, _ = ask(link, index, 16)
        if not count:
            continue
        none = False
        full, _, count, data, fds = ask(link, index, size)
        stride = (full - 16) // count if count else 40
        found = []
        for n in range(count):
            offset, _, number, kind, _, shadow = struct.unpack_from("<QQIIII", data, n * stride)
            numbers = (number, shadow) if kind == IoFdType.IOEVENTFD_SHADOW else (number,)
            found.append(_Entry(index, offset, kind, numbers, fds[number] if number < len(fds) else None))
        yield found, fds
    if none:
        raise NotApplicable("no BAR of the device has ioeventfds")


@AREA.case(5, SHOULD, "R422")
def large_argsz(t: Trial) -> None:
    """Room for more than a megabyte is refused or left empty.

    Sends: GET_REGION_IO_FDS with argsz 1 MiB + 1, and 0xffffffff, for each BAR.
    Expects: an error (libvfio-user), or a reply as long as its argsz says; which of both is reported.
    """
    link = t.attach()
    for index in bars(t):
        for argsz in (_ROOM + 1, 0xFFFFFFFF):
            reply = link.call(IO_FDS, wire.info(argsz, 0, index))
            t.saw("GET_REGION_IO_FDS with room for more than 1 MiB", "refused" if reply.failed else "answered",
                  recommended=True)  # fmt: skip
            if not reply.failed:
                same(wire.INFO.unpack_from(reply.payload)[0], len(reply.payload), "bytes of the reply; its argsz says")
    link.alive()


@AREA.case(6, SHOULD, "R216 R423")
def each_descriptor_once(t: Trial) -> None:
    """Each descriptor that comes is named by an entry; several entries may share one, or have none.

    Sends: GET_REGION_IO_FDS of each BAR, in full.
    Expects: as many descriptors as the entries name, 0xffffffff being none. Whether an eventfd comes twice is reported.
    """
    link = t.attach()
    for entries, fds in _entries(t, link):
        named = {number for entry in entries for number in entry.numbers} - {NO_FD}
        same(sorted(named), list(range(len(fds))), "places of the descriptors that came; the entries name")
        known = [found for fd in fds if (found := _field(fd, "eventfd-id")) is not None]
        once = len(known) == len(set(known))
        t.saw("an eventfd of several sub-regions", "sent once" if once else "sent twice", recommended=once)


@AREA.case(7, SHOULD, "R424", effect=CaseEffect.DEVICE)
def signals(t: Trial) -> None:
    """A signalled ioeventfd reaches the server.

    Sends: GET_REGION_IO_FDS of each BAR, in full; a count of 1 to the first ioeventfd of each.
    Expects: the count is taken from it in time, and the server lives. What the device does then is its own business.
    """
    link = t.attach()
    tried = False
    for entries, _ in _entries(t, link):
        chosen = next((e for e in entries if e.fd is not None and e.kind == IoFdType.IOEVENTFD), None)
        if chosen is None or chosen.fd is None:
            continue
        tried = True
        try:
            os.write(chosen.fd, struct.pack("=Q", 1))
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "an error")
            check(False, f"the ioeventfd at {chosen.offset:#x} of region {chosen.region} cannot be signalled: {name}")
        check(
            _taken(chosen.fd, t.timeout), f"nobody read the ioeventfd at {chosen.offset:#x} of region {chosen.region}"
        )
    if not tried:
        raise NotApplicable("no BAR has an ioeventfd, only other kinds")
    link.alive()


def _field(fd: int, name: str) -> int | None:
    """What the kernel tells of an eventfd; None if it is none, or the kernel does not tell."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value, 16 if name == "eventfd-count" else 10)
    return None


def _taken(fd: int, timeout: float) -> bool:
    """Whether an eventfd's count is 0 again in time."""
    deadline = time.monotonic() + timeout
    poller = select.poll()
    while (count := _field(fd, "eventfd-count")) is not None:
        if not count or time.monotonic() >= deadline:
            return not count
        poller.poll(_LOOK_MS)
    raise CannotTell("the kernel does not show a count for the descriptor, or it is not an eventfd")
