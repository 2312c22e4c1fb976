"""VERSION: what may be proposed, and what comes back."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from typing import Any

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, check, same
from vfiouser_conformance.facts import parse_capabilities
from vfiouser_conformance.link import Closed, RawLink, TimedOut
from vfiouser_conformance.trial import SILENCE_S, Trial
from vfiouser_conformance.wire import Received
from vfiouser_protocol.constants import Command, RegionIndex

AREA = Area("VERSION", "version negotiation", CaseEffect.NONE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
_TRANSFER_MAX = 64 << 20
_PROPOSED = json.loads(vectors.QEMU_CAPABILITIES[:-1])["capabilities"]


def negotiate(t: Trial, data: bytes = b"", *, minor: int = 0) -> tuple[RawLink, Received]:
    """Connect and propose; the reply has to be a success of major version 0."""
    link = t.connect()
    reply = link.ok(Command.VERSION, wire.version(data, minor=minor))
    check(len(reply.payload) >= 4, f"the VERSION reply has a payload of {len(reply.payload)} bytes")
    same(0, struct.unpack_from("<H", reply.payload)[0], "major version of the reply")
    return link, reply


def minor_of(reply: Received) -> int:
    """The minor version of a reply."""
    return int(struct.unpack_from("<HH", reply.payload)[1])


@AREA.case(1, MUST, "R041")
def without_data(t: Trial) -> None:
    """Version data is optional.

    Sends: the golden bytes of VERSION 0.0 without JSON.
    Expects: success with version 0.0; what JSON there is ends with NUL.
    """
    link = t.connect()
    link.send(vectors.message("version 0.0 without data"))
    reply = link.reply(1, Command.VERSION)
    check(not reply.failed, f"VERSION without data failed with error {reply.error}")
    same(b"\0\0\0\0", reply.payload[:4], "version of the reply")
    parse_capabilities(reply.payload)
    link.alive()


@AREA.case(2, MUST, "R042 R043")
def minor_versions(t: Trial) -> None:
    """The minor version of the reply is at most the proposed one.

    Sends: VERSION 0.0, 0.1, 0.2 and 0.99, each on a connection of its own.
    Expects: major 0 and a minor that is not higher; the same or a higher one for a higher proposal.
    """
    last = 0
    for minor in (0, 1, 2, 99):
        link, reply = negotiate(t, vectors.QEMU_CAPABILITIES, minor=minor)
        found = minor_of(reply)
        check(last <= found <= minor, f"0.{minor} was proposed, 0.{found} came back (0.{last} for a lower one)")
        last = found
        t.drop(link)


@AREA.case(3, MUST, "R059")
def unknown_members(t: Trial) -> None:
    """Members that the server does not know are ignored.

    Sends: VERSION with unknown members beside and inside `capabilities`.
    Expects: success; the members do not come back.
    """
    data = json.dumps({"x-top": [1], "capabilities": {"max_msg_fds": 8, "x-unknown": {"a": None}}}).encode() + b"\0"
    link, reply = negotiate(t, data)
    check("x-unknown" not in parse_capabilities(reply.payload), "an unknown capability came back")
    link.alive()


@AREA.case(4, MUST, "R070")
def empty_object(t: Trial) -> None:
    """Every capability has a default.

    Sends: VERSION with the JSON `{}`.
    Expects: success.
    """
    negotiate(t, b"{}\0")[0].alive()


@AREA.case(5, MUST, "R060")
def subset(t: Trial) -> None:
    """The reply has no capability that was not proposed.

    Sends: VERSION with `max_msg_fds` only, and VERSION without data.
    Expects: no other capability in the first reply. A server that answers with limits of its own in the second is
    reported: libvfio-user does so.
    """
    _, reply = negotiate(t, wire.capabilities({"max_msg_fds": 8}))
    found = parse_capabilities(reply.payload)
    limits = {"max_msg_fds", "max_data_xfer_size"}
    extra = set(found) - limits - {"migration"}
    check(not extra, f"capabilities that were not proposed: {sorted(extra)}")
    unproposed = set(found) - {"max_msg_fds"}
    t.saw("limits that were not proposed", "announced" if unproposed else "left out", recommended=True)


_TYPES: dict[str, type | tuple[type, ...]] = {
    "max_msg_fds": int,
    "max_data_xfer_size": int,
    "max_dma_maps": int,
    "pgsizes": int,
    "write_multiple": bool,
    "migration": dict,
    "twin_socket": dict,
}


@AREA.case(6, MUST, "R060 R064 R065")
def types_of_capabilities(t: Trial) -> None:
    """Capabilities have the types that the specification gives them.

    Sends: VERSION with all of QEMU's capabilities.
    Expects: integers are integers, not 8.0 or "8"; booleans are booleans; objects are objects; nothing is negative.
    """
    _, reply = negotiate(t, vectors.QEMU_CAPABILITIES)
    _check_types(parse_capabilities(reply.payload))


def _check_types(found: dict[str, Any]) -> None:
    for name, value in found.items():
        expected = _TYPES.get(name, object)
        right = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
        check(right, f"capability {name} is {value!r}")
        check(expected is not int or value >= 0, f"capability {name} is negative: {value!r}")


@AREA.case(7, COMPAT, "R061", compat="QEMU 11")
def fits_qemu(t: Trial) -> None:
    """The reply is not longer than QEMU's request, whose buffer takes it, and says 0.0.

    Sends: VERSION 0.0 as QEMU 11 sends it, 214 bytes.
    Expects: a reply of at most 214 bytes with minor version 0.
    """
    _, reply = negotiate(t, vectors.QEMU_CAPABILITIES)
    check(reply.size <= 214, f"the reply has {reply.size} bytes; QEMU takes 214")
    same(0, minor_of(reply), "minor version")


@AREA.case(8, COMPAT, "R062", compat="QEMU's v1 forks")
def fits_old_qemu(t: Trial) -> None:
    """The reply is not longer than the request of the older QEMU forks.

    Sends: VERSION 0.0 as they send it, 120 bytes.
    Expects: a reply of at most 120 bytes.
    """
    _, reply = negotiate(t, vectors.V1_CAPABILITIES)
    check(reply.size <= 120, f"the reply has {reply.size} bytes; the client takes 120")


@AREA.case(9, COMPAT, "R064 R065", compat="QEMU 11")
def limits_for_qemu(t: Trial) -> None:
    """The limits of the reply are ones that QEMU accepts.

    Sends: VERSION as QEMU 11 sends it.
    Expects: max_msg_fds at most 16; max_data_xfer_size at least the size of config space and at most 64 MiB;
    max_dma_maps at most 65535; pgsizes and migration.pgsize multiples of 4096.
    """
    _, reply = negotiate(t, vectors.QEMU_CAPABILITIES)
    found = parse_capabilities(reply.payload)
    fds = found.get("max_msg_fds", 1)
    check(fds <= 16, f"max_msg_fds is {fds}")
    size = found.get("max_data_xfer_size", wire.DEFAULT_TRANSFER)
    config = t.facts.regions[RegionIndex.CONFIG].size if len(t.facts.regions) > RegionIndex.CONFIG else 256
    check(config <= size <= _TRANSFER_MAX, f"max_data_xfer_size is {size}, config space has {config} bytes")
    check(found.get("max_dma_maps", 1) <= 65535, f"max_dma_maps is {found.get('max_dma_maps')}")
    for pages in (found.get("pgsizes", 4096), found.get("migration", {}).get("pgsize", 4096)):
        check(pages >= 4096 and pages % 4096 == 0, f"a page size of {pages}")


@AREA.case(10, MUST, "R069")
def ends_with_nul(t: Trial) -> None:
    """The version data of the reply ends with a NUL that msg_size counts.

    Sends: VERSION with QEMU's, the forks' and rust-vmm's data.
    Expects: a last byte of 0, and none before it.
    """
    for data in (vectors.QEMU_CAPABILITIES, vectors.V1_CAPABILITIES, vectors.RUST_CAPABILITIES):
        link, reply = negotiate(t, data)
        if len(reply.payload) > 4:
            same(len(reply.payload) - 5, reply.payload[4:].find(b"\0"), "place of the NUL in the version data")
        t.drop(link)


@AREA.case(11, COMPAT, "R400", compat="rust-vmm")
def has_capabilities(t: Trial) -> None:
    """The reply has version data with a `capabilities` member, which rust-vmm's client cannot do without.

    Sends: VERSION 0.1 as rust-vmm's client sends it.
    Expects: JSON with `capabilities`; `migration`, if any, has an integer `pgsize`.
    """
    _, reply = negotiate(t, vectors.RUST_CAPABILITIES, minor=1)
    check(len(reply.payload) > 4, "the reply has no version data")
    data = json.loads(reply.payload[4:].rstrip(b"\0"))
    check("capabilities" in data, f"no capabilities in {data}")
    migration = data["capabilities"].get("migration")
    check(migration is None or isinstance(migration.get("pgsize"), int), f"migration is {migration}")


@AREA.case(12, MUST, "R063")
def write_multiple(t: Trial) -> None:
    """`write_multiple` is true only where REGION_WRITE_MULTI works.

    Sends: VERSION with write_multiple; REGION_WRITE_MULTI without entries if it comes back as true.
    Expects: success of the command where it was agreed.
    """
    link, reply = negotiate(t, vectors.QEMU_CAPABILITIES)
    if parse_capabilities(reply.payload).get("write_multiple") is not True:
        raise NotApplicable("the server does not offer write_multiple")
    payload = link.ok(Command.REGION_WRITE_MULTI, wire.write_multi([])).payload
    same(struct.pack("<Q", 0), payload, "writes done by an empty REGION_WRITE_MULTI")


@AREA.case(13, SHOULD, "R054")
def smaller_page_size(t: Trial) -> None:
    """Of two migration page sizes the smaller one is used.

    Sends: VERSION with migration.pgsize 8192.
    Expects: success with a pgsize of at most 8192, or none. libvfio-user refuses, which is reported.
    """
    link = t.connect()
    data = wire.capabilities({"max_msg_fds": 8, "migration": {"pgsize": 8192}})
    reply = link.call(Command.VERSION, wire.version(data))
    if reply.failed:
        t.saw("migration.pgsize other than the host's", "refused", recommended=False)
        return
    pgsize = parse_capabilities(reply.payload).get("migration", {}).get("pgsize", 4096)
    check(0 < pgsize <= 8192, f"migration.pgsize is {pgsize}")
    t.saw("migration.pgsize other than the host's", "accepted", recommended=True)


@AREA.case(14, MUST, "R056")
def twin_socket(t: Trial) -> None:
    """A granted twin socket comes with the reply and is a connected socket.

    Sends: VERSION that asks for a twin socket.
    Expects: if granted, `supported` true, `fd_index` 0 and one descriptor, a stream socket; otherwise no descriptor.
    """
    data = wire.capabilities({"max_msg_fds": 8, "twin_socket": {"supported": True}})
    link, reply = negotiate(t, data)
    twin = parse_capabilities(reply.payload).get("twin_socket")
    if not twin or not twin.get("supported"):
        same((), reply.fds, "descriptors of a reply that grants no twin socket")
        raise NotApplicable("the server grants no twin socket")
    same(1, len(reply.fds), "descriptors of a reply that grants a twin socket")
    same(0, twin.get("fd_index"), "fd_index")
    check(reply.fds_in_header, "the descriptor did not come with the header")
    check(stat.S_ISSOCK(os.fstat(reply.fds[0]).st_mode), "the descriptor is not a socket")
    with socket.socket(fileno=os.dup(reply.fds[0])) as twin_socket:
        same(socket.SOCK_STREAM, twin_socket.type, "type of the twin socket")
    link.alive()


@AREA.case(15, MUST, "R057")
def twin_unasked(t: Trial) -> None:
    """A twin socket that nobody asked for is not granted.

    Sends: VERSION without twin_socket, and with `supported` false.
    Expects: no descriptor and no grant.
    """
    for members in ({"max_msg_fds": 8}, {"max_msg_fds": 8, "twin_socket": {"supported": False}}):
        link, reply = negotiate(t, wire.capabilities(members))
        same((), reply.fds, "descriptors of the reply")
        twin = parse_capabilities(reply.payload).get("twin_socket", {})
        check(not twin.get("supported"), f"a twin socket was granted: {twin}")
        t.drop(link)


@AREA.case(16, SHOULD, "R058")
def twin_without_fds(t: Trial) -> None:
    """A client that takes no descriptors gets no twin socket.

    Sends: VERSION with max_msg_fds 0 that asks for a twin socket.
    Expects: success without a descriptor.
    """
    data = wire.capabilities({"max_msg_fds": 0, "twin_socket": {"supported": True}})
    link, reply = negotiate(t, data)
    same((), reply.fds, "descriptors of the reply")
    link.alive()


@AREA.case(17, SHOULD, "R066")
def version_with_fd(t: Trial) -> None:
    """A descriptor that comes with VERSION is closed.

    Sends: VERSION with the writing end of a pipe.
    Expects: any reply or none; all copies of the descriptor are closed in time, while the connection is still open.
    """
    link = t.connect()
    witness = t.witness()
    link.command(Command.VERSION, wire.version(vectors.QEMU_CAPABILITIES), witness.fds)
    witness.check_closed("with or after VERSION")


@AREA.case(18, SHOULD, "R067")
def version_no_reply(t: Trial) -> None:
    """VERSION is answered in any case.

    Sends: VERSION with NO_REPLY, then GET_INFO.
    Expects: the VERSION reply (recommended), or none; then the reply to GET_INFO.
    """
    link = t.connect()
    msg_id = link.command(Command.VERSION, wire.version(vectors.QEMU_CAPABILITIES), flags=wire.NO_REPLY)
    try:
        link.reply(msg_id, Command.VERSION, SILENCE_S * 3)
        t.saw("VERSION with NO_REPLY", "answered", recommended=True)
    except TimedOut:
        t.saw("VERSION with NO_REPLY", "not answered", recommended=False)
    link.alive()


@AREA.case(19, SHOULD, "R068")
def second_version(t: Trial) -> None:
    """The version is negotiated once.

    Sends: a second VERSION on a negotiated connection.
    Expects: an error reply, or the end of the connection; never a success.
    """
    link = t.attach()
    msg_id = link.command(Command.VERSION, wire.version(vectors.QEMU_CAPABILITIES))
    try:
        reply = link.reply(msg_id, Command.VERSION)
    except Closed:
        return
    check(reply.failed, "a second VERSION succeeded")
    link.alive()


@AREA.case(20, MUST, "R040")
def version_first(t: Trial) -> None:
    """Nothing works before VERSION.

    Sends: GET_INFO, DMA_MAP or REGION_READ as the first message of a connection.
    Expects: an error reply or the end of the connection; never a success.
    """
    for command, payload in (
        (Command.DEVICE_GET_INFO, wire.info()),
        (Command.DMA_MAP, wire.dma_map(0x100000, 0x1000)),
        (Command.REGION_READ, wire.access(RegionIndex.CONFIG, 0, 4)),
    ):
        link = t.connect()
        msg_id = link.command(command, payload)
        try:
            check(link.reply(msg_id, command).failed, f"{command.name} succeeded before VERSION")
        except Closed:
            pass
        t.drop(link)
    t.attach().alive()


@AREA.case(21, MUST, "R070")
def odd_json(t: Trial) -> None:
    """JSON is read as JSON: order, spacing and escapes do not matter.

    Sends: VERSION with line breaks, tabs, an escaped key and members in another order.
    Expects: success.
    """
    data = b'{\n\t"capabilities" :\r\n { "max_data_xfer_size":1048576 , "\\u006dax_msg_fds" : 8 }\n}\0'
    negotiate(t, data)[0].alive()


@AREA.case(22, COMPAT, "R059", compat="clients from before 2021")
def old_names(t: Trial) -> None:
    """Names of capabilities that drafts used are ignored like any unknown one.

    Sends: VERSION with `max_fds` and `max_msg_size`.
    Expects: success.
    """
    negotiate(t, wire.capabilities({"max_fds": 8, "max_msg_size": 4096}))[0].alive()
