"""Migration by DEVICE_FEATURE: states and what may be done in them."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CannotTell, CaseEffect, CaseFailed, Level, NotApplicable, check, same
from vfiouser_conformance.cases.dma import by_messages, into_device, pattern, ready
from vfiouser_conformance.cases.dma_map import BASE, MAP, SIZE
from vfiouser_conformance.link import Closed, RawLink, TimedOut
from vfiouser_conformance.memory import ServedMemory
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
    pre_copy,
    read_chunk,
    save,
    set_request,
    try_state,
    write_stream,
)
from vfiouser_conformance.trial import SILENCE_S, Trial
from vfiouser_protocol.constants import Command, MigrationFlags, RegionIndex

AREA = Area("MIGRATION", "migration (DEVICE_FEATURE)", CaseEffect.DEVICE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
_STATES = (STOP, RUNNING, STOP_COPY, RESUMING)


@AREA.case(1, MUST, "R260", effect=CaseEffect.NONE)
def initial(t: Trial) -> None:
    """A device begins in RUNNING.

    Sends: GET of the state.
    Expects: RUNNING.
    """
    t.facts.migratable()
    same(name(RUNNING), name(get_state(t.attach())), "state")


def _enter(t: Trial, link: RawLink, state: int) -> None:
    """Bring the device from anywhere to a state; a device in RESUMING has a whole stream."""
    back(link)
    if state == RESUMING:
        data = save(t, link)
        go(link, RESUMING)
        write_stream(link, data, t.facts.transfer)
    elif state != RUNNING:
        go(link, state)


def _arcs(t: Trial, link: RawLink, sources: tuple[int, ...], targets: tuple[int, ...]) -> None:
    for source in sources:
        for target in targets:
            _enter(t, link, source)
            what = f"{name(source)} to {name(target)}"
            reply = try_state(link, target)
            if reply.failed and target == RUNNING and get_state(link) == STOP and try_state(link, RUNNING).failed:
                raise CannotTell(f"the device stays in STOP: SET RUNNING fails with error {reply.error}, as it may")
            if (source, target) == (STOP_COPY, PRE_COPY):
                check(reply.failed, f"{what} succeeded; a saving device cannot run again and go on saving")
                same(name(STOP_COPY), name(get_state(link)), f"state after a refused {what}")
            else:
                check(not reply.failed, f"{what} failed with error {reply.error}")
                same(name(target), name(get_state(link)), f"state after {what}")


@AREA.case(2, MUST, "R261 R262")
def arcs(t: Trial) -> None:
    """Every state can be reached from every other, over those in between.

    Sends: all 16 pairs of STOP, RUNNING, STOP_COPY and RESUMING; a device in RESUMING has got a whole stream.
    Expects: success, and the state that was asked for.
    """
    _arcs(t, begin(t), _STATES, _STATES)


@AREA.case(3, MUST, "R261 R262")
def pre_copy_arcs(t: Trial) -> None:
    """The arcs of PRE_COPY are there, and the one that is not is not.

    Sends: PRE_COPY to every state, and every state to PRE_COPY.
    Expects: success, but for STOP_COPY to PRE_COPY.
    """
    pre_copy(t)
    link = begin(t)
    _arcs(t, link, (PRE_COPY,), (*_STATES, PRE_COPY))
    _arcs(t, link, _STATES, (PRE_COPY,))


@AREA.case(4, MUST, "R263")
def odd_states(t: Trial) -> None:
    """States that do not exist cannot be set.

    Sends: SET of ERROR, 8, 9, 255 and 0xffffffff, and of RUNNING_P2P and PRE_COPY_P2P where they are not offered.
    Expects: errors; the state is RUNNING as before.
    """
    link = begin(t)
    unknown = () if t.facts.migratable() & MigrationFlags.P2P else (5, 7)
    for state in (0, *unknown, 8, 9, 255, 0xFFFFFFFF):
        check(try_state(link, state).failed, f"SET of state {state} succeeded")
        same(name(RUNNING), name(get_state(link)), f"state after SET of {state}")


@AREA.case(5, MUST, "R264")
def no_way_back(t: Trial) -> None:
    """A device in STOP_COPY does not go to PRE_COPY.

    Sends: SET PRE_COPY in STOP_COPY.
    Expects: an error; the state is STOP_COPY as before.
    """
    link = begin(t)
    go(link, STOP_COPY)
    check(try_state(link, PRE_COPY).failed, "SET PRE_COPY in STOP_COPY succeeded")
    same(name(STOP_COPY), name(get_state(link)), "state")


@AREA.case(6, MUST, "R265")
def same_state(t: Trial) -> None:
    """The state that the device is in can be set, and loses nothing.

    Sends: SET STOP_COPY twice, with a MIG_DATA_READ in between; SET RUNNING twice, SET STOP twice.
    Expects: success; the stream goes on.
    """
    link = begin(t)
    go(link, RUNNING, RUNNING, STOP, STOP, STOP_COPY)
    data = read_chunk(link, 16)
    go(link, STOP_COPY)
    rest = read_chunk(link, t.facts.transfer)
    go(link, STOP, STOP_COPY)
    whole = read_chunk(link, t.facts.transfer)
    same(len(whole), min(len(data + rest), t.facts.transfer), "bytes of the stream, read in one piece and in two")


@AREA.case(7, MUST, "R267")
def set_is_done(t: Trial) -> None:
    """SET is answered when the state is reached.

    Sends: SET STOP and GET of the state in one piece, then SET RUNNING and GET.
    Expects: the new state in each GET.
    """
    link = begin(t)
    for state in (STOP, RUNNING, STOP_COPY, RUNNING):
        get = wire.pack(FEATURE, wire.feature(0x10002, argsz=16), msg_id=2)
        link.send(wire.pack(FEATURE, set_request(state), msg_id=1) + get)
        failed = link.reply(1, FEATURE).failed
        if failed and state == RUNNING:
            link.reply(2, FEATURE)
            go(link, RUNNING)  # a device may be unable to leave STOP
        check(not failed, f"SET of {name(state)} failed")
        payload = link.reply(2, FEATURE).payload
        same(name(state), name(struct.unpack_from("<I", payload, 8)[0]), "state right after SET")


@AREA.case(8, MUST, "R289")
def without_pre_copy(t: Trial) -> None:
    """Without the PRE_COPY flag there is no PRE_COPY state.

    Sends: SET PRE_COPY to a device whose migration flags lack it.
    Expects: an error; the state is RUNNING.
    """
    t.facts.migratable()
    if t.facts.pre_copy:
        raise NotApplicable("the migration has a PRE_COPY state")
    link = begin(t)
    check(try_state(link, PRE_COPY).failed, "SET PRE_COPY succeeded")
    same(name(RUNNING), name(get_state(link)), "state")


@AREA.case(9, SHOULD, "R283")
def commands_while_stopped(t: Trial) -> None:
    """A stopped device still answers.

    Sends: GET_INFO, a read of config space, DMA_MAP, DMA_UNMAP and SET_IRQS in STOP and in STOP_COPY.
    Expects: success. libvfio-user refuses most of them, which is reported.
    """
    link = begin(t)
    refused = set()
    for state in (STOP, STOP_COPY):
        go(link, state)
        for command, payload in (
            (Command.DEVICE_GET_INFO, wire.info()),
            (Command.REGION_READ, wire.access(RegionIndex.CONFIG, 0, 4)),
            (Command.DMA_MAP, wire.dma_map(BASE, SIZE)),
            (Command.DMA_UNMAP, wire.dma_unmap(BASE, SIZE)),
            (Command.DEVICE_SET_IRQS, wire.set_irqs(0x21, t.facts.vectors()[0], 0, 0)),
        ):
            if link.call(command, payload).failed:
                refused.add(command.name)
    names = ", ".join(sorted(refused))
    t.saw("commands while stopped", f"refused: {names}" if refused else "served", recommended=not refused)


@AREA.case(10, MUST, "R234")
def reset(t: Trial) -> None:
    """DEVICE_RESET brings a device back to RUNNING from every state.

    Sends: DEVICE_RESET in STOP, STOP_COPY, RESUMING, and PRE_COPY if there is one.
    Expects: success and RUNNING. libvfio-user refuses it or keeps the state, which is reported.
    """
    t.facts.resets()
    link = begin(t)
    odd = []
    for state in (STOP, STOP_COPY, RESUMING, *([PRE_COPY] if t.facts.pre_copy else [])):
        back(link)
        go(link, state)
        reply = link.call(Command.DEVICE_RESET)
        now = get_state(link)
        check(now in (RUNNING, state), f"DEVICE_RESET in {name(state)} led to {name(now)}")
        if reply.failed or now != RUNNING:
            odd.append(f"{name(state)}: {'refused' if reply.failed else 'kept'}")
    t.saw("DEVICE_RESET while migrating", ", ".join(odd) or "RUNNING", recommended=not odd)


@AREA.case(11, MUST, "R235")
def disconnect(t: Trial) -> None:
    """A device that a client left stopped serves the next client.

    Sends: SET STOP, then STOP_COPY in another connection; closes; GET of the state on a new connection.
    Expects: RUNNING. libvfio-user keeps the state, which is reported.
    """
    t.facts.migratable()
    kept = []
    for state in (STOP, STOP_COPY, RESUMING):
        link = t.attach()
        go(link, state)
        t.drop(link)
        again = t.attach()
        now = get_state(again)
        back(again)
        t.drop(again)
        check(now in (RUNNING, state), f"a device left in {name(state)} was found in {name(now)}")
        if now != RUNNING:
            kept.append(name(state))
    t.saw("migration state at the end of a connection", "kept" if kept else "RUNNING", recommended=not kept)


@AREA.case(12, MUST, "R284")
def stopped_device_is_quiet(t: Trial) -> None:
    """A stopped device does no DMA.

    Sends: SET STOP, then what makes the device write to client memory.
    Expects: no message and no change of memory in 100 ms; the access itself may succeed or fail.
    """
    link = begin(t)
    device = ready(t, link)
    fd = t.memfd(SIZE)
    view = t.map(fd, SIZE)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [fd])
    device.load(link, pattern(4096, 7))
    go(link, STOP)
    try:
        device.start_write(link, BASE, 4096)
    except CaseFailed as failure:
        if isinstance(failure, TimedOut | Closed):
            raise
    link.silent(SILENCE_S)
    check(not bytes(view).strip(b"\0"), "a stopped device wrote to client memory")
    check(not link.commands, "a stopped device sent DMA commands")


@AREA.case(13, MUST, "R285")
def pre_copy_runs(t: Trial) -> None:
    """A device in PRE_COPY works.

    Sends: SET PRE_COPY; the device reads client memory.
    Expects: the right bytes.
    """
    pre_copy(t)
    link = begin(t)
    device = ready(t, link)
    by_messages(t, link)
    go(link, PRE_COPY)
    assert isinstance(link.on_command, ServedMemory)
    expected = bytes(link.on_command.data[:4096])
    same(expected, into_device(link, device, BASE, 4096), "what the device read in PRE_COPY")


@AREA.case(14, MUST, "R261")
def golden(t: Trial) -> None:
    """The golden bytes that stop a device stop it.

    Sends: SET STOP, byte by byte as it is written down.
    Expects: a reply of 32 bytes whose payload is the request's, though data_fd may be -1; the state is STOP.
    """
    link = begin(t)
    request = vectors.message("set state stop")
    link.send(request)
    reply = link.receive()
    head = wire.HEADER.pack(reply.msg_id, reply.command, reply.size, reply.flags, reply.error)
    same("0e001000200000000100000000000000", head.hex(), "header")
    check_set_reply(request[16:], reply.payload)
    same(name(STOP), name(get_state(link)), "state")
