"""Headers, message boundaries, order, and who answers what."""

from __future__ import annotations

import struct
import time

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, CaseFailed, Level, NotApplicable, check, same
from vfiouser_conformance.link import Closed, RawLink
from vfiouser_conformance.trial import SILENCE_S, Trial
from vfiouser_protocol.constants import Command, RegionIndex

AREA = Area("FRAME", "framing and order", CaseEffect.NONE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
_PAUSE_S = 0.1
_BYTE_PAUSE_S = 0.002
_INFO = wire.info()


@AREA.case(1, MUST, "R001 R002")
def reply_header(t: Trial) -> None:
    """A reply repeats the command's message id and command number and has type 1.

    Sends: GET_INFO with the ids 0, 1, 0x1234 and 0xffff.
    Expects: replies with flags 0x1, the same id and command, and the size that msg_size says.
    """
    link = t.attach()
    for msg_id in (0, 1, 0x1234, 0xFFFF):
        link.command(Command.DEVICE_GET_INFO, _INFO, msg_id=msg_id)
        reply = link.reply(msg_id, Command.DEVICE_GET_INFO)
        check(not reply.failed, f"GET_INFO failed with error {reply.error}")
        same(32, reply.size, "msg_size of the reply to GET_INFO")
    link.silent(0)


@AREA.case(2, MUST, "R001")
def golden_bytes(t: Trial) -> None:
    """The golden bytes of the simplest command get the golden bytes of its reply.

    Sends: GET_INFO, byte by byte as it is written down.
    Expects: the header of a success reply, argsz 16, and nothing else but what the device decides.
    """
    link = t.attach()
    link.send(vectors.message("get info"))
    reply = link.receive()
    head = wire.HEADER.pack(reply.msg_id, reply.command, reply.size, reply.flags, reply.error)
    same("02000400200000000100000000000000", head.hex(), "header of the reply")
    same("10000000", reply.payload[:4].hex(), "argsz of the reply")


@AREA.case(3, MUST, "R003")
def error_header(t: Trial) -> None:
    """A command that fails gets a reply with the ERROR bit and a non-negative error number.

    Sends: GET_REGION_INFO of region 4096.
    Expects: flags 0x21.
    """
    link = t.attach()
    link.refused(Command.DEVICE_GET_REGION_INFO, wire.region_info(4096))
    link.alive()


@AREA.case(4, MUST, "R004")
def error_size(t: Trial) -> None:
    """An error reply is a header alone.

    Sends: commands that have to fail, with and without data.
    Expects: 16 bytes. libvfio-user sends the payload of the success reply along, which the specification rules out.
    """
    link = t.attach()
    big = len(t.facts.regions) + 1000
    for command, payload in (
        (Command.DEVICE_GET_REGION_INFO, wire.region_info(big)),
        (Command.REGION_READ, wire.access(big, 0, 64)),
        (Command.DEVICE_FEATURE, wire.feature(0x2FFFF)),
    ):
        reply = link.call(command, payload)
        check(reply.failed, f"{command.name} succeeded; it must fail")
        check(not reply.payload, f"the error reply to {command.name} has {len(reply.payload)} more bytes")


@AREA.case(5, MUST, "R005")
def no_reply(t: Trial) -> None:
    """A command that wants no reply gets none.

    Sends: GET_INFO with NO_REPLY, then GET_INFO with another id.
    Expects: one reply, to the second.
    """
    link = t.attach()
    link.send(vectors.message("get info, no reply wanted"))
    link.silent(SILENCE_S)
    link.alive()


@AREA.case(6, SHOULD, "R006")
def no_reply_to_failures(t: Trial) -> None:
    """Not even a failure is answered when no reply is wanted.

    Sends: command 99, and a GET_REGION_INFO that has to fail, both with NO_REPLY; then GET_INFO.
    Expects: one reply, to GET_INFO.
    """
    link = t.attach()
    link.command(99, b"\0" * 16, flags=wire.NO_REPLY)
    link.command(Command.DEVICE_GET_REGION_INFO, wire.region_info(4096), flags=wire.NO_REPLY)
    link.silent(SILENCE_S)
    link.alive()


@AREA.case(7, MUST, "R005 R007", effect=CaseEffect.DEVICE)
def posted_write(t: Trial) -> None:
    """A posted write is executed, and a later read sees it.

    Sends: REGION_WRITE with NO_REPLY to a register of config space, and at once REGION_READ of it, 20 times.
    Expects: each read returns what was written just before.
    """
    link = t.attach()
    offset, width = t.scratch()
    found = t.read_config(link, offset, width)
    t.at_end(lambda: t.write(link, RegionIndex.CONFIG, offset, found))
    for n in range(20):
        value = bytes([(found[0] ^ (n + 1)) & 0xFF]) * width
        command = Command.REGION_WRITE
        link.command(command, wire.access(RegionIndex.CONFIG, offset, width, value), flags=wire.NO_REPLY)
        same(value, t.read_config(link, offset, width), "what was written with NO_REPLY")


@AREA.case(8, MUST, "R008")
def same_id_twice(t: Trial) -> None:
    """Two outstanding commands may have the same id.

    Sends: GET_IRQ_INFO 0 and GET_INFO with id 7, in one piece.
    Expects: two replies with id 7, first to GET_IRQ_INFO.
    """
    link = t.attach()
    link.send(
        wire.pack(Command.DEVICE_GET_IRQ_INFO, _INFO, msg_id=7) + wire.pack(Command.DEVICE_GET_INFO, _INFO, msg_id=7)
    )
    link.reply(7, Command.DEVICE_GET_IRQ_INFO)
    link.reply(7, Command.DEVICE_GET_INFO)


@AREA.case(9, MUST, "R009")
def pipelined(t: Trial) -> None:
    """Fifty commands in one piece are answered in their order.

    Sends: 50 GET_INFO and GET_IRQ_INFO with different ids, in one send.
    Expects: 50 replies in the same order. Clients wait for the last of a burst only.
    """
    link = t.attach()
    commands = [Command.DEVICE_GET_INFO, Command.DEVICE_GET_IRQ_INFO]
    link.send(b"".join(wire.pack(commands[n % 2], _INFO, msg_id=100 + n) for n in range(50)))
    for n in range(50):
        link.reply(100 + n, commands[n % 2])


@AREA.case(10, SHOULD, "R010")
def unknown_command(t: Trial) -> None:
    """A command that nobody knows is refused, and nothing else happens.

    Sends: the commands 99 and 0xffff.
    Expects: error replies; the connection goes on.
    """
    link = t.attach()
    for number in (99, 0xFFFF):
        link.refused(number, b"\0" * 16)
    link.alive()


@AREA.case(11, SHOULD, "R011")
def command_zero(t: Trial) -> None:
    """Command 0 is no command.

    Sends: command 0 with 16 bytes.
    Expects: an error reply; the connection goes on.
    """
    link = t.attach()
    link.refused(0, b"\0" * 16)
    link.alive()


@AREA.case(12, SHOULD, "R012")
def commands_of_servers(t: Trial) -> None:
    """DMA_READ and DMA_WRITE are the server's to send.

    Sends: both, well-formed.
    Expects: error replies; the connection goes on.
    """
    link = t.attach()
    link.refused(Command.DMA_READ, wire.DMA_ACCESS.pack(0, 16))
    link.refused(Command.DMA_WRITE, wire.DMA_ACCESS.pack(0, 4) + b"\0" * 4)
    link.alive()


def _refused_or_closed(link: RawLink, data: bytes, what: str) -> None:
    """Send something that is no good command: an error reply or the end of the connection, never a success."""
    try:
        link.send(data)
        reply = link.receive()
    except Closed:
        return
    check(reply.failed, f"{what} was answered with success")


@AREA.case(13, MUST, "R013", effect=CaseEffect.DEVICE)
def unsolicited_reply(t: Trial) -> None:
    """A reply that nobody waits for is not executed.

    Sends: a REGION_WRITE of a register whose type bits say reply.
    Expects: an error reply, the end of the connection, or nothing; the register keeps its value.
    """
    _not_executed(t, wire.REPLY, allow_silence=True)


@AREA.case(14, SHOULD, "R014", effect=CaseEffect.DEVICE)
def undefined_type(t: Trial) -> None:
    """A message whose type is undefined is not executed.

    Sends: a REGION_WRITE of a register with type 2, and another with type 15.
    Expects: an error reply or the end of the connection; the register keeps its value.
    """
    for kind in (2, 15):
        _not_executed(t, kind, allow_silence=False)


def _not_executed(t: Trial, kind: int, *, allow_silence: bool) -> None:
    offset, width = t.scratch()
    link = t.attach()
    found = t.read_config(link, offset, width)
    other = bytes(byte ^ 0x11 for byte in found)
    payload = wire.access(RegionIndex.CONFIG, offset, width, other)
    try:
        link.send(wire.pack(Command.REGION_WRITE, payload, msg_id=9, flags=kind))
        reply = link.receive(SILENCE_S if allow_silence else None)
        check(reply.failed, f"a message of type {kind} was answered with success")
    except Closed:
        pass
    except CaseFailed as failure:
        if not (allow_silence and "sent nothing" in str(failure)):
            raise
    t.drop(link)
    again = t.attach()
    same(found, t.read_config(again, offset, width), f"the register after a write of type {kind}")
    t.drop(again)


@AREA.case(15, SHOULD, "R015")
def too_small_size(t: Trial) -> None:
    """A msg_size smaller than the header is no message.

    Sends: GET_INFO headers with msg_size 0, 8 and 15, each on a connection of its own.
    Expects: an error reply or the end of the connection.
    """
    for size in (0, 8, 15):
        link = t.attach()
        _refused_or_closed(link, wire.HEADER.pack(1, Command.DEVICE_GET_INFO, size, 0, 0), f"msg_size {size}")
        t.drop(link)
    t.attach().alive()


@AREA.case(16, SHOULD, "R016")
def missing_payload(t: Trial) -> None:
    """A command that needs a payload is refused without one.

    Sends: a bare header for each command with a fixed part.
    Expects: error replies; the connection goes on.
    """
    link = t.attach()
    for command in range(Command.DMA_MAP, Command.DEVICE_RESET):
        link.refused(command)
    link.alive()


@AREA.case(17, SHOULD, "R018")
def giant_size(t: Trial) -> None:
    """A message of two gigabytes is not waited for.

    Sends: headers with msg_size 0x7fffffff and 0xffffffff, each on a connection of its own.
    Expects: an error reply or the end of the connection, in time.
    """
    for size in (0x7FFFFFFF, 0xFFFFFFFF):
        link = t.attach()
        _refused_or_closed(link, wire.HEADER.pack(1, Command.REGION_WRITE, size, 0, 0), f"msg_size {size:#x}")
        t.drop(link)
    t.attach().alive()


@AREA.case(18, SHOULD, "R019")
def body_is_no_header(t: Trial) -> None:
    """What follows a bad header is never taken for a message.

    Sends: a message of type 2 whose body looks like a GET_INFO command, and GET_INFO behind it.
    Expects: nothing is answered with the id inside the body: the body is skipped or the connection ends.
    """
    link = t.attach()
    inner = wire.pack(Command.DEVICE_GET_INFO, _INFO, msg_id=0x6666)
    outer = wire.HEADER.pack(0x5555, Command.DEVICE_GET_INFO, wire.HEADER_SIZE + len(inner), 2, 0)
    try:
        link.send(outer + inner + wire.pack(Command.DEVICE_GET_INFO, _INFO, msg_id=0x7777))
        for _ in range(3):
            reply = link.receive()
            check(reply.msg_id != 0x6666, "the server read the body of a bad message as a command")
            if reply.msg_id == 0x7777:
                return
    except Closed:
        return


@AREA.case(19, SHOULD, "R020")
def split_header(t: Trial) -> None:
    """A header may come in pieces.

    Sends: GET_INFO with a pause of 100 ms inside its header.
    Expects: the usual reply.
    """
    _in_pieces(t, (5,))


@AREA.case(20, SHOULD, "R021")
def split_body(t: Trial) -> None:
    """A body may come in pieces.

    Sends: GET_INFO as header, pause, and three pieces of body with pauses.
    Expects: the usual reply.
    """
    _in_pieces(t, (16, 20, 27))


@AREA.case(21, SHOULD, "R020 R021")
def byte_by_byte(t: Trial) -> None:
    """Message boundaries have nothing to do with the pieces that a stream comes in.

    Sends: two GET_INFO one byte after the other, the end of the first with the begin of the second.
    Expects: two replies.
    """
    link = t.attach()
    data = wire.pack(Command.DEVICE_GET_INFO, _INFO, msg_id=1) + wire.pack(Command.DEVICE_GET_INFO, _INFO, msg_id=2)
    for at in range(30):
        link.send(data[at : at + 1])
        time.sleep(_BYTE_PAUSE_S)
    link.send(data[30:40])
    link.send(data[40:])
    link.reply(1, Command.DEVICE_GET_INFO)
    link.reply(2, Command.DEVICE_GET_INFO)


def _in_pieces(t: Trial, cuts: tuple[int, ...]) -> None:
    link = t.attach()
    data = wire.pack(Command.DEVICE_GET_INFO, _INFO, msg_id=3)
    begin = 0
    for cut in (*cuts, len(data)):
        link.send(data[begin:cut])
        begin = cut
        if cut < len(data):
            time.sleep(_PAUSE_S)
    reply = link.reply(3, Command.DEVICE_GET_INFO)
    same(32, reply.size, "msg_size of the reply")


@AREA.case(22, SHOULD, "R022")
def reserved_flags(t: Trial) -> None:
    """Bits of the flags that mean nothing yet are ignored.

    Sends: GET_INFO with the flags 0x40, 0x80000000 and 0xffffffc0.
    Expects: the usual replies, without these bits.
    """
    link = t.attach()
    for flags in (0x40, 0x80000000, 0xFFFFFFC0):
        check(not link.call(Command.DEVICE_GET_INFO, _INFO, flags=flags).failed, f"flags {flags:#x} were refused")


@AREA.case(23, SHOULD, "R023")
def error_in_command(t: Trial) -> None:
    """The ERROR bit and the error field mean nothing in a command.

    Sends: GET_INFO with the ERROR bit, and with error 22.
    Expects: the usual replies.
    """
    link = t.attach()
    for flags, error in ((wire.ERROR, 0), (0, 22)):
        link.send(wire.pack(Command.DEVICE_GET_INFO, _INFO, msg_id=4, flags=flags, error=error))
        check(not link.reply(4, Command.DEVICE_GET_INFO).failed, f"flags {flags:#x} error {error} were refused")


@AREA.case(24, MUST, "R024")
def half_messages(t: Trial) -> None:
    """A client that leaves in the middle of a message does no harm.

    Sends: half a header, and half a body, and closes; on fresh connections, before and after VERSION.
    Expects: the next client is served.
    """
    whole = wire.pack(Command.DEVICE_GET_INFO, _INFO)
    for cut in (1, 8, 16, 24):
        for negotiated in (False, True):
            link = t.attach() if negotiated else t.connect()
            link.send(whole[:cut])
            t.drop(link)
    t.attach().alive()


@AREA.case(25, MUST, "R033")
def leaving_before_the_reply(t: Trial) -> None:
    """A client that leaves before it has its reply does no harm.

    Sends: 20 GET_INFO, and closes at once; five times.
    Expects: the next client is served.
    """
    for _ in range(5):
        link = t.attach()
        link.send(wire.pack(Command.DEVICE_GET_INFO, _INFO) * 20)
        t.drop(link)
    t.attach().alive()


@AREA.case(26, MUST, "R001 R391")
def answers_in_time(t: Trial) -> None:
    """Every answer comes within the five seconds that clients wait.

    Sends: 200 commands that ask for information, one after the other.
    Expects: each reply in less than 5 s; the slowest is reported.
    """
    link = t.attach()
    slowest = 0.0
    for n in range(200):
        began = time.monotonic()
        if n % 2:
            link.ok(Command.DEVICE_GET_IRQ_INFO, _INFO)
        else:
            link.alive()
        slowest = max(slowest, time.monotonic() - began)
    limit = min(5.0, t.timeout)
    check(slowest < limit, f"one of 200 replies took {slowest:.1f} s")


@AREA.case(27, MUST, "R009")
def flood(t: Trial) -> None:
    """A client that sends much before it reads anything gets every reply.

    Sends: 2000 GET_INFO, reading only when the server stops taking more.
    Expects: 2000 replies in order.
    """
    link = t.attach()
    for start in range(0, 2000, 250):
        link.send(b"".join(wire.pack(Command.DEVICE_GET_INFO, _INFO, msg_id=start + n) for n in range(250)))
    for n in range(2000):
        link.reply(n, Command.DEVICE_GET_INFO)


@AREA.case(28, MUST, "R002")
def sizes_add_up(t: Trial) -> None:
    """The msg_size of every reply is what the reply has.

    Sends: one of each command that asks for something, in one piece.
    Expects: replies whose sizes lead from one to the next without a gap, and nothing behind the last.
    """
    link = t.attach()
    requests = [
        (Command.DEVICE_GET_INFO, _INFO),
        (Command.DEVICE_GET_REGION_INFO, wire.region_info(0)),
        (Command.DEVICE_GET_REGION_INFO, wire.region_info(RegionIndex.CONFIG, 1000)),
        (Command.DEVICE_GET_IRQ_INFO, _INFO),
        (99, b"\0" * 16),
        (Command.REGION_READ, wire.access(RegionIndex.CONFIG, 0, 64)),
        (Command.DEVICE_GET_INFO, _INFO),
    ]
    link.send(b"".join(wire.pack(command, data, msg_id=n) for n, (command, data) in enumerate(requests)))
    for n, (command, _) in enumerate(requests):
        link.reply(n, command)
    link.silent(SILENCE_S)


@AREA.case(29, SHOULD, "R011")
def unoffered_generations(t: Trial) -> None:
    """The commands of a migration generation that the server does not offer are refused.

    Sends: DIRTY_PAGES to a server without v1 migration, DEVICE_FEATURE to one without v2 migration or logging.
    Expects: error replies; the connection goes on.
    """
    link = t.attach()
    asked = False
    if t.facts.v1_region is None:
        link.refused(Command.DIRTY_PAGES, struct.pack("<II", 8, 1))
        asked = True
    if t.facts.migration is None and not t.facts.logging:
        link.refused(Command.DEVICE_FEATURE, wire.feature(0x10002, argsz=16))
        asked = True
    if not asked:
        raise NotApplicable("the server offers both generations")
    link.alive()
