"""VERSION: a proposal that is longer than any message may be."""

from __future__ import annotations

from vfiouser_conformance import wire
from vfiouser_conformance.case import Level, check
from vfiouser_conformance.cases.version import AREA as AREA
from vfiouser_conformance.link import Closed
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command

SHOULD = Level.SHOULD
#: More than any server takes in one message before it knows its client, in bytes.
_LONG = 4 << 20


@AREA.case(50, SHOULD, "R018 R425")
def longer_than_the_maximum(t: Trial) -> None:
    """A VERSION that is longer than any message may be does no harm.

    Sends: VERSION with an object that 4 MiB of blanks fill, whole.
    Expects: an error reply, the end of the connection, or the negotiation; in time. The next client is served.
    """
    data = b'{"capabilities":{' + b" " * _LONG + b"}}\0"
    link = t.connect()
    try:
        reply = link.reply(link.command(Command.VERSION, wire.version(data)), Command.VERSION)
        outcome = "refused" if reply.failed else "accepted"
        check(reply.failed or len(reply.payload) >= 4, "a VERSION reply without a version")
    except Closed:
        outcome = "connection closed"
    t.saw("a VERSION of 4 MiB", outcome, recommended=True)
    t.drop(link)
    t.attach().alive()
