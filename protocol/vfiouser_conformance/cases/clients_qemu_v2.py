"""What QEMU's client with migration needs beyond its usual sequence, and what it does when something goes wrong."""

from __future__ import annotations

import struct

from vfiouser_conformance import wire
from vfiouser_conformance.case import Level, NotApplicable, check, same
from vfiouser_conformance.cases.clients import AREA as AREA
from vfiouser_conformance.cases.logging_cases import start_request
from vfiouser_conformance.cases.migrate_data import READ, WRITE, change_state, state_of
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
    check_set_reply,
    get_state,
    go,
    name,
    read_stream,
    save,
    set_request,
    to_running,
    try_state,
    write_stream,
)
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command, DeviceState, MigrationFlags

COMPAT = Level.COMPAT
_WHOSE = "QEMU's client with migration, in review"
_GET_DATA_SIZE = 0x10009
_GET_PRECOPY_INFO = 19
_PAGE = wire.PAGE
#: What the client assumes where it is not told.
_ASSUMED = 100 << 30
_P2P, _PRE_COPY_P2P = int(DeviceState.RUNNING_P2P), int(DeviceState.PRE_COPY_P2P)


@AREA.case(16, COMPAT, "R440", compat=_WHOSE)
def no_descriptor_comes_with_a_state(t: Trial) -> None:
    """A reply to SET says that no descriptor comes with the state.

    Sends: SET of STOP, STOP_COPY and STOP with data_fd 0.
    Expects: success, and data_fd -1 in each reply: the client takes anything else for a descriptor, and asks for no
    further state.
    """
    link = begin(t)
    for state in (STOP, STOP_COPY, STOP):
        request = set_request(state)
        said = check_set_reply(request, link.ok(FEATURE, request).payload)
        same(-1, said, f"data_fd of the reply to SET {name(state)}")


@AREA.case(17, COMPAT, "R441", compat=_WHOSE)
def the_size_is_told(t: Trial) -> None:
    """A client that asks how much is to be read is told, before, during and after the save.

    Sends: GET of MIG_DATA_SIZE in RUNNING, STOP_COPY, at the end of the stream, and in STOP.
    Expects: 16 bytes each; less than the 100 GiB that are assumed otherwise, with which a migration is never finished.
    """
    link = begin(t)
    _size(link)
    go(link, STOP_COPY)
    _size(link)
    read_stream(link, t.facts.transfer)
    _size(link)
    go(link, STOP)
    _size(link)


def _size(link: RawLink) -> None:
    payload = link.ok(FEATURE, wire.feature(_GET_DATA_SIZE, argsz=16)).payload
    same(16, len(payload), "payload of GET MIG_DATA_SIZE")
    argsz, flags, size = struct.unpack("<IIQ", payload)
    same((16, _GET_DATA_SIZE), (argsz, flags), "argsz and flags of GET MIG_DATA_SIZE")
    check(size < _ASSUMED, f"MIG_DATA_SIZE says that {size} bytes are left")


@AREA.case(18, COMPAT, "R442", compat=_WHOSE)
def asks_for_the_figures_of_pre_copy(t: Trial) -> None:
    """A client that asks for pre-copy's figures by command 19 may be refused, and goes on.

    Sends: command 19 with argsz 0 in RUNNING and in a saving state, each followed by a GET of the state; a read.
    Expects: an error, or a reply of 24 bytes; the state as before; data.
    """
    link = begin(t)
    saving = PRE_COPY if t.facts.pre_copy else STOP_COPY
    for state in (RUNNING, saving):
        go(link, state)
        reply = link.call(_GET_PRECOPY_INFO, struct.pack("<IIQQ", 0, 0, 0, 0))
        check(reply.failed or len(reply.payload) == 24, f"{len(reply.payload)} bytes answer command 19")
        same(name(state), name(get_state(link)), "state after command 19")
    link.ok(READ, wire.mig_data(_PAGE))


@AREA.case(19, COMPAT, "R443", compat=_WHOSE)
def several_functions(t: Trial) -> None:
    """A device of a VM of several goes by the P2P states.

    Sends: RUNNING_P2P and back; PRE_COPY and PRE_COPY_P2P, if there is pre-copy, else RUNNING_P2P and STOP; STOP_COPY,
    the stream, STOP; then on another state RESUMING, the stream, RUNNING_P2P, RUNNING.
    Expects: success; each state under the name that was asked for; the saved state in the end.
    """
    if not t.facts.migratable() & MigrationFlags.P2P:
        raise NotApplicable("the server offers no P2P, so QEMU refuses to migrate a VM of several functions")
    link = begin(t)
    change_state(t, link, 0x51)
    before = state_of(t, link)
    go(link, _P2P, RUNNING)
    go(link, *((PRE_COPY, _PRE_COPY_P2P) if t.facts.pre_copy else (_P2P, STOP)), STOP_COPY)
    data = read_stream(link, t.facts.transfer)
    go(link, STOP)
    t.drop(link)
    link = begin(t)
    change_state(t, link, 0x52)
    go(link, RESUMING)
    write_stream(link, data, t.facts.transfer)
    go(link, _P2P, RUNNING)
    same(before.hex(), state_of(t, link).hex(), "state of the device after the migration")


@AREA.case(20, COMPAT, "R444", compat=_WHOSE)
def zeros_for_what_was_not_read(t: Trial) -> None:
    """A stream of which the client made up the second half, as it does when its source fails, is not run.

    Sends: a save; another state; RESUMING, half of the stream and as many zeros as are missing, RUNNING; a reset.
    Expects: an error before the device runs; RUNNING after the reset.
    """
    link = begin(t)
    change_state(t, link, 0x61)
    data = save(t, link)
    if not any(data[len(data) // 2 :]):
        raise NotApplicable("the second half of the device's stream is zeros")
    back(link)
    change_state(t, link, 0x62)
    go(link, RESUMING)
    spoiled = data[: len(data) // 2].ljust(len(data), b"\0")
    refused = False
    for at in range(0, len(spoiled), t.facts.transfer):
        part = spoiled[at : at + t.facts.transfer]
        refused = refused or link.call(WRITE, wire.mig_data(len(part), part)).failed
    check(try_state(link, RUNNING).failed or refused, "a stream that ends in zeros was loaded, and the device runs")
    check(get_state(link) != RUNNING, "the device runs after a load that failed")
    to_running(link)
    same(name(RUNNING), name(get_state(link)), "state after a reset")


@AREA.case(21, COMPAT, "R445", compat=_WHOSE)
def a_part_of_a_write(t: Trial) -> None:
    """A client that counts a write as sent of which a part was, so that what follows is taken for data, does no harm.

    Sends: RESUMING; the head of a MIG_DATA_WRITE of 64 KiB and 1000 bytes of it; SET RUNNING; then it leaves.
    Expects: the next client is served, and can bring the device to RUNNING.
    """
    link = begin(t)
    go(link, RESUMING)
    size = min(1 << 16, t.facts.transfer)
    message = wire.pack(WRITE, wire.mig_data(size, bytes(size)), msg_id=1)
    link.send(message[: 24 + min(1000, size // 2)])
    link.send(wire.pack(FEATURE, set_request(RUNNING), msg_id=2))
    t.drop(link)
    link = begin(t)
    same(name(RUNNING), name(get_state(link)), "state for the next client")


@AREA.case(22, COMPAT, "R446", compat=_WHOSE)
def resets_after_a_refusal(t: Trial) -> None:
    """After a SET that is refused a reset succeeds, without which QEMU ends the VM.

    Sends: in RUNNING, STOP, STOP_COPY, RESUMING and PRE_COPY: SET of a state that there is not; DEVICE_RESET.
    Expects: an error, then success; RUNNING. That a reset in STOP or STOP_COPY is refused, or leaves the device there,
    as libvfio-user has it, is reported.
    """
    t.facts.resets()
    link = begin(t)
    may_refuse = (STOP, STOP_COPY)
    for state in (RUNNING, STOP, STOP_COPY, RESUMING, *((PRE_COPY,) if t.facts.pre_copy else ())):
        go(link, state)
        check(try_state(link, 99).failed, "SET of state 99 succeeded")
        reply = link.call(Command.DEVICE_RESET)
        left = f"refused with error {reply.error}" if reply.failed else name(get_state(link))
        check(left == name(RUNNING) or state in may_refuse, f"DEVICE_RESET in {name(state)}: {left}")
        t.saw(f"DEVICE_RESET in {name(state)}", left, recommended=left == name(RUNNING))
        back(link)


@AREA.case(23, COMPAT, "R447", compat=_WHOSE)
def a_pointer_for_a_range(t: Trial) -> None:
    """An older patch that sends a pointer where its range should be is refused: who accepts it loses dirty pages.

    Sends: DMA_LOGGING_START of one range, with 8 bytes of an address in its place.
    Expects: an error; nothing is logged.
    """
    t.facts.logs()
    link = begin(t)
    link.refused(FEATURE, start_request(_PAGE, 1, struct.pack("<Q", 0x7F00_1234_5678)))
    link.alive()
