"""Migration by DEVICE_FEATURE: what fails says so with an error number, and where the device is then."""

from __future__ import annotations

import errno

from vfiouser_conformance import wire
from vfiouser_conformance.case import CannotTell, Level, NotApplicable, check, same
from vfiouser_conformance.cases.migrate import AREA as AREA
from vfiouser_conformance.cases.migrate_data import READ, WRITE
from vfiouser_conformance.link import Closed
from vfiouser_conformance.migration import (
    FEATURE,
    RESUMING,
    RUNNING,
    back,
    begin,
    get_state,
    go,
    name,
    set_request,
    try_state,
)
from vfiouser_conformance.trial import Trial

MUST, SHOULD = Level.MUST, Level.SHOULD
#: Larger limits are not tried, in bytes.
_LIMIT_MAX = 16 << 20
#: No state of any device, we hope.
_RUBBISH = bytes(range(1, 65)) * 4


def _number(t: Trial, what: str, number: int) -> None:
    """An error number has to be one of Linux's."""
    check(number in errno.errorcode, f"{what} fails with {number}, which is not an error number")
    t.saw(f"error of {what}", errno.errorcode[number], recommended=True)


@AREA.case(15, SHOULD, "R266 R268 R278 R263")
def refusals_have_numbers(t: Trial) -> None:
    """What cannot be done in a state fails with an error number, and leaves the state.

    Sends: MIG_DATA_READ, MIG_DATA_WRITE and SET of state 99 in RUNNING.
    Expects: error numbers of Linux, which are reported (EINVAL is usual); the device is in RUNNING.
    """
    link = begin(t)
    requests = (
        ("MIG_DATA_READ in RUNNING", READ, wire.mig_data(64)),
        ("MIG_DATA_WRITE in RUNNING", WRITE, wire.mig_data(8, b"\0" * 8)),
        ("SET of a state that does not exist", FEATURE, set_request(99)),
    )
    for what, command, payload in requests:
        _number(t, what, link.refused(command, payload))
        same(name(RUNNING), name(get_state(link)), f"state after {what}")


@AREA.case(16, SHOULD, "R266 R438")
def failing_transition(t: Trial) -> None:
    """A transition that fails says why, and the device does not run with what it could not load.

    Sends: a stream of rubbish in RESUMING, SET RUNNING; GET of the state.
    Expects: an error number of Linux for the SET, or for the MIG_DATA_WRITE already; a state that is not RUNNING.
    Nothing can be told of a device that takes any stream.
    """
    link = begin(t)
    go(link, RESUMING)
    reply = link.call(WRITE, wire.mig_data(len(_RUBBISH), _RUBBISH))
    what = "MIG_DATA_WRITE of rubbish"
    if not reply.failed:
        what, reply = "SET RUNNING after rubbish", try_state(link, RUNNING)
    if not reply.failed:
        raise CannotTell("the device takes any stream, so no transition can be made to fail")
    _number(t, what, reply.error)
    check(get_state(link) != RUNNING, f"the device is in RUNNING although {what} failed")
    back(link)


@AREA.case(53, SHOULD, "R432")
def write_over_the_limit(t: Trial) -> None:
    """A MIG_DATA_WRITE with more data than the server said it takes is refused.

    Sends: MIG_DATA_WRITE of max_data_xfer_size + 8 bytes in RESUMING, with all its data.
    Expects: an error, and the device can be brought back to RUNNING; or the end of the connection.
    """
    link = begin(t)
    size = t.facts.transfer + 8
    if size > _LIMIT_MAX:
        raise NotApplicable(f"the server takes {t.facts.transfer} bytes at a time")
    go(link, RESUMING)
    try:
        link.refused(WRITE, wire.mig_data(size, bytes(size)))
    except Closed:
        t.drop(link)
        t.saw("MIG_DATA_WRITE over the limit", "the connection ended", recommended=True)
        return
    t.saw("MIG_DATA_WRITE over the limit", "refused", recommended=True)
    back(link)
