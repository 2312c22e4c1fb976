"""Whatever makes the daemon say something."""

from __future__ import annotations

from hostilekit.case import Stage, attack
from hostilekit.wire import Peer
from rawclient import VERSION

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
