"""Whatever makes the daemon say something."""

from __future__ import annotations

from hostilekit.case import Stage, attack
from hostilekit.wire import PAYLOADS, Peer
from rawmessages import VERSION

#: Bytes of log that a client may cause per second.
LOG_PER_SECOND = 20 << 10


def _storm(stage: Stage) -> None:
    """Connections that are refused for another reason each time."""
    going = stage.clock()
    number = 0
    while going():
        number += 1
        try:
            with Peer(stage.first) as peer:
                peer.send(peer.pack(VERSION, b"\0\0\0\0{%d}\0" % number))
                peer.receive()
        except (OSError, EOFError):
            pass


@attack(stderr="full", seconds=3.0)
def reconnecting_while_nobody_reads_the_log(stage: Stage) -> None:
    """Standard error is a small pipe that is full, and every connection is worth some lines."""
    _storm(stage)


@attack(seconds=3.0)
def log_flood_by_reconnecting(stage: Stage) -> None:
    """The same with a log that is read: how much is said is limited per function and not per connection."""
    log = stage.directory / "daemon.log"
    before = log.stat().st_size
    _storm(stage)
    said = log.stat().st_size - before
    allowed = LOG_PER_SECOND * stage.seconds
    assert said <= allowed, f"{said} bytes were logged in {stage.seconds} s, {allowed:g} are allowed"


@attack(seconds=3.0)
def log_flood_by_refusals(stage: Stage) -> None:
    """Commands that are refused, some of them on each of many connections."""
    log = stage.directory / "daemon.log"
    before = log.stat().st_size
    going = stage.clock()
    while going():
        try:
            with Peer(stage.first) as peer:
                peer.negotiate()
                for command in (9, 10, 2, 5, 8):
                    peer.command(command, PAYLOADS[command][:-1])
        except (OSError, EOFError, AssertionError):
            pass
    said = log.stat().st_size - before
    allowed = LOG_PER_SECOND * stage.seconds
    assert said <= allowed, f"{said} bytes were logged in {stage.seconds} s, {allowed:g} are allowed"
