"""The migration region of the older generation: registers, states, data."""

from __future__ import annotations

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, check, same
from vfiouser_conformance.cases.dma_map import BASE, SIZE
from vfiouser_conformance.cases.migrate_data import change_state, state_of
from vfiouser_conformance.facts import parse_capabilities, parse_region, read_region
from vfiouser_conformance.migration_v1 import (
    DATA_OFFSET,
    DATA_SIZE,
    NAMES,
    PENDING,
    PRE_COPY,
    REGISTERS,
    RESERVED,
    RESUMING,
    RUNNING,
    STATE,
    STOP_COPY,
    STOPPED,
    View,
    begin,
    load,
    save,
)
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command, RegionFlags

AREA = Area("V1", "migration region (v1)", CaseEffect.DEVICE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
_OLD_QEMU = "QEMU's v1 forks"


@AREA.case(1, MUST, "R320 R321", effect=CaseEffect.NONE)
def description(t: Trial) -> None:
    """The migration region is found by its TYPE capability, and can be read and written.

    Sends: GET_REGION_INFO with argsz 32 and with the full argsz.
    Expects: the short form, then READ, WRITE, CAPS, TYPE 3/1; room for the registers at least.
    """
    view = begin(t)
    region = read_region(view.link, view.index)
    both = RegionFlags.READ | RegionFlags.WRITE
    same(int(both), region.flags & both, "READ and WRITE of the migration region")
    same((3, 1), region.kind, "type and subtype")
    check(region.size > REGISTERS, f"the migration region has {region.size} bytes")


@AREA.case(2, MUST, "R322", effect=CaseEffect.NONE)
def page_size(t: Trial) -> None:
    """A server with a migration region tells its page size in VERSION.

    Sends: VERSION with `migration`.
    Expects: `migration` with a pgsize that is a power of two.
    """
    t.facts.v1()
    reply = t.connect().ok(Command.VERSION, wire.version(vectors.V1_CAPABILITIES))
    size = parse_capabilities(reply.payload).get("migration", {}).get("pgsize", 0)
    check(size and size & (size - 1) == 0, f"migration.pgsize is {size}")


@AREA.case(3, MUST, "R323", effect=CaseEffect.NONE)
def initial(t: Trial) -> None:
    """A device begins as running.

    Sends: a read of device_state.
    Expects: 1.
    """
    same("running", NAMES.get(View(t, t.attach()).state()), "device_state")


@AREA.case(4, SHOULD, "R324")
def widths(t: Trial) -> None:
    """Registers are accessed with their own size.

    Sends: reads of 2, 3 and 8 bytes of device_state and of 4 bytes of pending_bytes.
    Expects: errors.
    """
    view = begin(t)
    for offset, count in ((STATE, 2), (STATE, 3), (STATE, 8), (PENDING, 4)):
        check(view.read(offset, count).failed, f"a read of {count} bytes at {offset} succeeded")


@AREA.case(5, SHOULD, "R325")
def reserved(t: Trial) -> None:
    """The reserved register has no value.

    Sends: a write of it, and a read.
    Expects: success and 0, or errors (libvfio-user), which is reported.
    """
    view = begin(t)
    refused = view.write(RESERVED, b"\xff" * 4).failed
    reply = view.read(RESERVED, 4)
    check(reply.failed or not reply.payload[16:].strip(b"\0"), "the reserved register holds a value")
    seen = "refused" if refused or reply.failed else "ignored"
    t.saw("the reserved register of the migration region", seen, recommended=seen == "ignored")


@AREA.case(6, MUST, "R326")
def transitions(t: Trial) -> None:
    """The transitions that every client needs are there.

    Sends: running to stopped and back, to stop-and-copy, stopped and back, to pre-copy, stop-and-copy and running, to
    resuming and back with a whole stream.
    Expects: success; device_state reads what was written.
    """
    view = begin(t)
    view.go(STOPPED, RUNNING, STOP_COPY, STOPPED, RUNNING, PRE_COPY, STOP_COPY, RUNNING)
    chunks = save(view)
    view.go(RUNNING)
    load(view, chunks)


@AREA.case(7, MUST, "R327")
def forbidden(t: Trial) -> None:
    """The transitions that make no sense are refused, and change nothing.

    Sends: resuming to stopped, stop-and-copy and pre-copy; stop-and-copy to pre-copy and resuming.
    Expects: errors; device_state as before.
    """
    view = begin(t)
    for source, targets in ((RESUMING, (STOPPED, STOP_COPY, PRE_COPY)), (STOP_COPY, (PRE_COPY, RESUMING))):
        for target in targets:
            view.to_running()
            view.go(source)
            check(view.try_state(target).failed, f"{NAMES[source]} to {NAMES[target]} succeeded")
            same(NAMES[source], NAMES.get(view.state()), "device_state after a refused write")


@AREA.case(8, MUST, "R328")
def invalid(t: Trial) -> None:
    """Invalid states are refused.

    Sends: device_state 5 and 7.
    Expects: errors; running as before.
    """
    view = begin(t)
    for state in (5, 7):
        check(view.try_state(state).failed, f"device_state {state} was accepted")
        same("running", NAMES.get(view.state()), "device_state")


@AREA.case(9, COMPAT, "R329", compat=_OLD_QEMU)
def self_transitions(t: Trial) -> None:
    """A state may be written again.

    Sends: running twice, stopped twice, stop-and-copy twice.
    Expects: success.
    """
    view = begin(t)
    view.go(RUNNING, STOPPED, STOPPED)
    view.to_running()
    view.go(STOP_COPY, STOP_COPY)


@AREA.case(10, COMPAT, "R330", compat=_OLD_QEMU)
def cancel(t: Trial) -> None:
    """A pre-copy can be cancelled.

    Sends: pre-copy, an iteration, running; then a save.
    Expects: success.
    """
    view = begin(t)
    view.go(PRE_COPY)
    view.chunk()
    view.go(RUNNING)
    check(save(view) is not None, "no stream")


@AREA.case(11, SHOULD, "R331")
def paused(t: Trial) -> None:
    """A stopped device can be saved: its machine was paused.

    Sends: stopped, then stop-and-copy.
    Expects: success; an error (libvfio-user) is reported, and leaves the device stopped.
    """
    view = begin(t)
    view.go(STOPPED)
    refused = view.try_state(STOP_COPY).failed
    expected = STOPPED if refused else STOP_COPY
    same(NAMES[expected], NAMES.get(view.state()), "device_state")
    t.saw("stopped to stop-and-copy", "refused" if refused else "accepted", recommended=not refused)


@AREA.case(12, SHOULD, "R333")
def reserved_bits(t: Trial) -> None:
    """Bits of device_state that mean nothing do no harm.

    Sends: device_state 0x80000001.
    Expects: success or an error; the low bits read as running.
    """
    view = begin(t)
    view.try_state(0x80000001)
    same("running", NAMES.get(view.state() & 7), "low bits of device_state")


@AREA.case(13, MUST, "R334 R343")
def save_and_load(t: Trial) -> None:
    """A device that loads its own stream is what it was when it was saved.

    Sends: a change of state, the loop of a save in stop-and-copy, another change, the loop of a load.
    Expects: the state of the time of the save.
    """
    view = begin(t)
    change_state(t, view.link, 0x19)
    before = state_of(t, view.link)
    chunks = save(view)
    view.go(RUNNING)
    change_state(t, view.link, 0x28)
    load(view, chunks)
    same(before.hex(), state_of(t, view.link).hex(), "state of the device after it was loaded")


@AREA.case(14, MUST, "R335 R343")
def with_pre_copy(t: Trial) -> None:
    """A save that begins while the device runs is whole, however early the device is stopped.

    Sends: pre-copy, one iteration, a change of state, stop-and-copy, the rest; then a load of it all.
    Expects: the state of the end of the save.
    """
    view = begin(t)
    change_state(t, view.link, 0x31)
    view.go(PRE_COPY)
    first = view.chunk()
    change_state(t, view.link, 0x32)
    before = state_of(t, view.link)
    view.go(STOP_COPY)
    chunks = [*([first] if first else []), *view.stream()]
    view.go(STOPPED, RUNNING)
    change_state(t, view.link, 0x33)
    load(view, chunks)
    same(before.hex(), state_of(t, view.link).hex(), "state of the device after it was loaded")


@AREA.case(15, MUST, "R336")
def constant_offset(t: Trial) -> None:
    """data_offset and data_size stay the same in an iteration.

    Sends: pending_bytes in stop-and-copy, then data_offset and data_size three times.
    Expects: equal values.
    """
    view = begin(t)
    view.go(STOP_COPY)
    if not view.register(PENDING):
        raise NotApplicable("the device has an empty stream")
    found = {(view.register(DATA_OFFSET), view.register(DATA_SIZE)) for _ in range(3)}
    same(1, len(found), "number of different data_offset and data_size")


@AREA.case(16, SHOULD, "R337")
def out_of_order(t: Trial) -> None:
    """data_offset and data_size mean nothing before pending_bytes was read.

    Sends: both in running, and in stop-and-copy before pending_bytes.
    Expects: errors.
    """
    view = begin(t)
    for state in (RUNNING, STOP_COPY):
        view.go(state)
        for offset in (DATA_OFFSET, DATA_SIZE):
            check(view.read(offset, 8).failed, f"register {offset} was given in {NAMES[state]} out of its order")


@AREA.case(17, SHOULD, "R338")
def stays_finished(t: Trial) -> None:
    """pending_bytes stays 0 when the stream has ended.

    Sends: the loop in stop-and-copy to its end, and pending_bytes three times more.
    Expects: 0.
    """
    view = begin(t)
    view.go(STOP_COPY)
    view.stream()
    same([0, 0, 0], [view.register(PENDING) for _ in range(3)], "pending_bytes behind the end")


@AREA.case(18, SHOULD, "R339")
def read_only_registers(t: Trial) -> None:
    """Registers that the device owns cannot be written.

    Sends: writes of pending_bytes and data_offset, and of data_size while saving.
    Expects: errors.
    """
    view = begin(t)
    view.go(STOP_COPY)
    view.register(PENDING)
    for offset in (PENDING, DATA_OFFSET, DATA_SIZE):
        check(view.write(offset, b"\0" * 8).failed, f"a write of register {offset} succeeded")


@AREA.case(19, COMPAT, "R340", compat=_OLD_QEMU)
def narrow_data(t: Trial) -> None:
    """The data can be read in pieces of any natural size.

    Sends: the begin of a chunk in pieces of 1, 2, 4 and 8 bytes, and in one.
    Expects: the same bytes.
    """
    view = begin(t)
    view.go(STOP_COPY)
    if not view.register(PENDING):
        raise NotApplicable("the device has an empty stream")
    offset, size = view.register(DATA_OFFSET), view.register(DATA_SIZE)
    count = min(64, size // 8 * 8)
    whole = t.read(view.link, view.index, offset, count)
    for width in (1, 2, 4, 8):
        parts = [t.read(view.link, view.index, offset + at, width) for at in range(0, count, width)]
        same(whole.hex(), b"".join(parts).hex(), f"data in pieces of {width} bytes")


@AREA.case(20, MUST, "R341")
def mapped_data(t: Trial) -> None:
    """The mapped data section shows what messages show.

    Sends: a chunk read by messages and through the mapping.
    Expects: the same bytes.
    """
    view = begin(t)
    reply = view.link.ok(
        Command.DEVICE_GET_REGION_INFO, wire.region_info(view.index, t.facts.regions[view.index].argsz)
    )
    region = parse_region(view.index, reply.payload)
    if not region.mappable or not reply.fds:
        raise NotApplicable("the migration region cannot be mapped")
    view.go(STOP_COPY)
    if not view.register(PENDING):
        raise NotApplicable("the device has an empty stream")
    offset, size = view.register(DATA_OFFSET), view.register(DATA_SIZE)
    read = t.read(view.link, view.index, offset, min(size, t.facts.transfer))
    compared = 0
    for begins, length in region.areas:
        mapped = t.map(reply.fds[0], length, region.offset + begins)
        low, high = max(begins, offset), min(begins + length, offset + len(read))
        if low < high:
            same(read[low - offset : high - offset], mapped[low - begins : high - begins], "data through the mapping")
            compared += high - low
    check(compared, "no byte of the data section can be mapped although the region says so")


@AREA.case(21, SHOULD, "R342")
def dead_space(t: Trial) -> None:
    """Between registers and data there is nothing.

    Sends: a read of 8 bytes behind the registers in stop-and-copy.
    Expects: an error, if the data section begins later.
    """
    view = begin(t)
    view.go(STOP_COPY)
    if not view.register(PENDING) or view.register(DATA_OFFSET) < REGISTERS + 8:
        raise NotApplicable("the data section begins right behind the registers")
    check(view.read(REGISTERS, 8).failed, "a read between registers and data succeeded")


@AREA.case(22, COMPAT, "R344", compat=_OLD_QEMU)
def chunk_in_parts(t: Trial) -> None:
    """A chunk may be given in parts, to a device with less room.

    Sends: the chunks of a save, each cut into three.
    Expects: success, and a device that runs.
    """
    view = begin(t)
    chunks = save(view)
    view.go(RUNNING)
    parts = [
        chunk[at : at + len(chunk) // 3 + 1] for chunk in chunks for at in range(0, len(chunk), len(chunk) // 3 + 1)
    ]
    load(view, parts)


@AREA.case(23, MUST, "R345")
def reset_running_states(t: Trial) -> None:
    """DEVICE_RESET ends a pre-copy, and a load.

    Sends: DEVICE_RESET in pre-copy and in resuming.
    Expects: success; running.
    """
    _reset(t, (PRE_COPY, RESUMING), tolerant=False)


@AREA.case(24, SHOULD, "R346")
def reset_stopped_states(t: Trial) -> None:
    """DEVICE_RESET brings a stopped device back.

    Sends: DEVICE_RESET in stopped and in stop-and-copy.
    Expects: success and running; an error (libvfio-user) is reported, and leaves the state as it was.
    """
    _reset(t, (STOPPED, STOP_COPY), tolerant=True)


def _reset(t: Trial, states: tuple[int, ...], *, tolerant: bool) -> None:
    t.facts.resets()
    view = begin(t)
    refused = False
    for state in states:
        view.to_running()
        view.go(state)
        reply = view.link.call(Command.DEVICE_RESET)
        check(tolerant or not reply.failed, f"DEVICE_RESET in {NAMES[state]} failed with error {reply.error}")
        refused |= reply.failed
        expected = NAMES[state] if reply.failed else "running"
        same(expected, NAMES.get(view.state()), f"device_state after DEVICE_RESET in {NAMES[state]}")
    if tolerant:
        t.saw("DEVICE_RESET of a stopped device (v1)", "refused" if refused else "accepted", recommended=not refused)


@AREA.case(25, COMPAT, "R347", compat="libvfio-user's v1")
def disconnect(t: Trial) -> None:
    """A device that a client left in any state is found running by the next.

    Sends: stopped, stop-and-copy, pre-copy, resuming, each on a connection of its own that is closed.
    Expects: running on the next.
    """
    t.facts.v1()
    for state in (STOPPED, STOP_COPY, PRE_COPY, RESUMING):
        view = View(t, t.attach())
        view.go(state)
        t.drop(view.link)
        again = View(t, t.attach())
        same("running", NAMES.get(again.state()), f"device_state after a client that left it in {NAMES[state]}")
        t.drop(again.link)


@AREA.case(26, SHOULD, "R348")
def commands_while_stopped(t: Trial) -> None:
    """A stopped device still answers.

    Sends: GET_INFO, DMA_MAP and SET_IRQS in stopped.
    Expects: success. libvfio-user refuses them, which is reported.
    """
    view = begin(t)
    view.go(STOPPED)
    refused = [
        command.name
        for command, payload in (
            (Command.DEVICE_GET_INFO, wire.info()),
            (Command.DMA_MAP, wire.dma_map(BASE, SIZE)),
            (Command.DEVICE_SET_IRQS, wire.set_irqs(0x21, t.facts.vectors()[0], 0, 0)),
        )
        if view.link.call(command, payload).failed
    ]
    t.saw("commands while stopped (v1)", "refused" if refused else "served", recommended=not refused)


@AREA.case(27, MUST, "R343")
def to_another_device(t: Trial) -> None:
    """A device saved here goes on there.

    Sends: a save on the server, a load on the second server (--destination-socket).
    Expects: the second device has the state of the first.
    """
    path = t.destination()
    view = begin(t)
    change_state(t, view.link, 0x51)
    before = state_of(t, view.link)
    chunks = save(view)
    other = begin(t, path)
    load(other, chunks)
    same(before.hex(), state_of(t, other.link).hex(), "state of the second device")


@AREA.case(28, MUST, "R334")
def pending_adds_up(t: Trial) -> None:
    """Data lies inside the region, and there is some while pending_bytes says so.

    Sends: the loop in stop-and-copy.
    Expects: each chunk inside the region; an end after a finite number of chunks.
    """
    view = begin(t)
    view.go(STOP_COPY)
    view.stream()
    same(0, view.register(PENDING), "pending_bytes at the end")
