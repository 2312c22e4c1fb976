"""What the migration cases do over and over, in both generations."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vfiouser_conformance import wire
from vfiouser_conformance.case import CannotTell, CaseFailed, NotApplicable, check, same
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import Trial
from vfiouser_conformance.wire import Received
from vfiouser_protocol.constants import Command, DeviceState

ERROR, STOP, RUNNING, STOP_COPY, RESUMING = (
    int(state)
    for state in (
        DeviceState.ERROR,
        DeviceState.STOP,
        DeviceState.RUNNING,
        DeviceState.STOP_COPY,
        DeviceState.RESUMING,
    )
)
PRE_COPY = int(DeviceState.PRE_COPY)
_GET_STATE, _SET_STATE = 0x10002, 0x20002
_CHUNK = 1 << 16
#: A stream longer than this is not read to its end, in bytes.
_STREAM_MAX = 256 << 20
FEATURE = int(Command.DEVICE_FEATURE)


def begin(t: Trial, link: RawLink | None = None) -> RawLink:
    """A connection to a device that migrates by DEVICE_FEATURE; in the end the device runs again."""
    t.facts.migratable()
    link = t.attach() if link is None else link
    if found := wake(link):
        raise CannotTell(f"the device is in {found}")
    t.at_end(lambda: None if link.closed else back(link))
    return link


def get_state(link: RawLink) -> int:
    """The device's migration state."""
    payload = link.ok(FEATURE, wire.feature(_GET_STATE, argsz=16)).payload
    same(16, len(payload), "payload of GET MIG_DEVICE_STATE")
    return int(struct.unpack_from("<I", payload, 8)[0])


def set_request(state: int, data_fd: int = 0) -> bytes:
    """A SET of the migration state."""
    return wire.feature(_SET_STATE, struct.pack("<Ii", state, data_fd))


def check_set_reply(request: bytes, payload: bytes) -> int:
    """Look whether a reply repeats a SET of the state, but for data_fd, which may say that there is no descriptor.

    Returns:
        data_fd of the reply.
    """
    same(len(request), len(payload), "bytes of payload in the reply to SET MIG_DEVICE_STATE")
    same(request[:12].hex(), payload[:12].hex(), "payload of the reply to SET MIG_DEVICE_STATE, without data_fd")
    asked, data_fd = (struct.unpack_from("<i", part, 12)[0] for part in (request, payload))
    check(data_fd in (asked, -1), f"data_fd of the reply to SET MIG_DEVICE_STATE is {data_fd}; {asked} was sent")
    return int(data_fd)


def try_state(link: RawLink, state: int) -> Received:
    """SET the state, whatever comes of it."""
    return link.call(FEATURE, set_request(state))


def go(link: RawLink, *states: int) -> None:
    """SET states that have to be reached."""
    for state in states:
        reply = try_state(link, state)
        if reply.failed and state == RUNNING and get_state(link) == STOP:
            raise CannotTell(f"the device stays in STOP: SET RUNNING fails with error {reply.error}, as it may")
        if reply.failed:
            raise CaseFailed(f"SET of state {name(state)} failed with error {reply.error}")
        same(name(state), name(get_state(link)), "state after SET")


def name(state: int) -> str:
    """A state's name."""
    try:
        return DeviceState(state).name
    except ValueError:
        return f"state {state}"


def to_running(link: RawLink) -> None:
    """Bring the device back, by whatever way there is."""
    if try_state(link, RUNNING).failed:
        link.call(Command.DEVICE_RESET)
        try_state(link, RUNNING)


def wake(link: RawLink) -> str:
    """Bring the device to RUNNING; says in which state it is and why it stays there, if it does."""
    reply = link.call(FEATURE, wire.feature(_GET_STATE, argsz=16))
    if reply.failed or len(reply.payload) < 16:
        return ""
    state = struct.unpack_from("<I", reply.payload, 8)[0]
    if state == RUNNING:
        return ""
    error = try_state(link, RUNNING).error
    if get_state(link) == RUNNING:
        return ""
    to_running(link)
    state = get_state(link)
    return "" if state == RUNNING else f"{name(state)}, and SET RUNNING fails with error {error}"


def back(link: RawLink) -> None:
    """Bring the device to RUNNING, by whatever way there is.

    Raises:
        CannotTell: it stays elsewhere; a device may fail a transition.
    """
    to_running(link)
    if found := wake(link):
        raise CannotTell(f"the device is in {found}")


def read_chunk(link: RawLink, size: int) -> bytes:
    """One MIG_DATA_READ; padding behind the data is cut off."""
    reply = link.ok(Command.MIG_DATA_READ, wire.mig_data(size))
    check(len(reply.payload) >= 8, f"a MIG_DATA_READ reply of {len(reply.payload)} bytes")
    argsz, done = wire.MIG_DATA.unpack_from(reply.payload)
    check(done <= size, f"{done} bytes of migration data came where {size} were asked for")
    check(len(reply.payload) - 8 in (done, size), f"{len(reply.payload) - 8} bytes follow a size of {done}")
    same(8 + done, argsz, "argsz of the MIG_DATA_READ reply")
    return reply.payload[8 : 8 + done]


def read_stream(link: RawLink, limit: int, sizes: Iterable[int] = ()) -> bytes:
    """The whole stream of a device in STOP_COPY, in chunks of these sizes, then of a usual one."""
    found = bytearray()
    wanted = iter(sizes)
    while True:
        size = min(next(wanted, _CHUNK), limit)
        data = read_chunk(link, size)
        found += data
        check(len(found) <= _STREAM_MAX, f"the stream has more than {_STREAM_MAX} bytes")
        if len(data) < size:
            return bytes(found)


def write_chunk(link: RawLink, data: bytes) -> None:
    """One MIG_DATA_WRITE that has to succeed."""
    same(16, link.ok(Command.MIG_DATA_WRITE, wire.mig_data(len(data), data)).size, "size of the MIG_DATA_WRITE reply")


def write_stream(link: RawLink, data: bytes, size: int) -> None:
    """A whole stream into a device in RESUMING."""
    for at in range(0, len(data), size):
        write_chunk(link, data[at : at + size])


def save(t: Trial, link: RawLink) -> bytes:
    """Stop the device and take its stream; it ends in STOP."""
    go(link, STOP, STOP_COPY)
    data = read_stream(link, t.facts.transfer)
    go(link, STOP)
    return data


def pre_copy(t: Trial) -> None:
    """Only for servers with PRE_COPY."""
    t.facts.migratable()
    if not t.facts.pre_copy:
        raise NotApplicable("the migration has no PRE_COPY state")
