"""What the record keeps of a client's own ways: the P2P name of a state, and that it migrates the function itself."""

from __future__ import annotations

import pytest

from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration.machine import advance
from vfiouser_oob.migration.plans import arc_name
from vfiouser_oob.migration.record import MigrationRecord, Owner
from vfiouser_protocol.constants import DeviceState

NAMED = MigrationRecord(attached=True, asked=True, p2p=True, by_client=True)
STOPS = (arc_name(DeviceState.RUNNING, DeviceState.STOP),)


def test_a_name_is_taken_and_given_back() -> None:
    """A P2P name changes nothing else, and asks for nothing."""
    record = MigrationRecord(attached=True)
    named, effects = advance(record, ev.P2pNamed(True))
    assert (True, ()) == (named.p2p, effects)
    assert (record, ()) == advance(named, ev.P2pNamed(False))


@pytest.mark.parametrize(
    "event",
    [
        ev.Requested(STOPS, Owner.V2),
        ev.ResetAsked(),
        ev.GuestReset(restarts=False),
        ev.ClientCame(),
        ev.ClientWent(logged=False),
        ev.Started(),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_ends_a_p2p_name(event: ev.MigrationEvent) -> None:
    """Whatever may change the state, and whatever a client does not know of the one before."""
    assert not advance(NAMED, event)[0].p2p


@pytest.mark.parametrize("owner", [None, *Owner])
def test_who_moves_it(owner: Owner | None) -> None:
    """A client that has begun, or will, moves it; a carrier's own work does not make it the client's."""
    record = MigrationRecord(attached=True, owner=owner)
    assert (owner in (Owner.V1, Owner.V2)) is record.moved_by_client
    assert advance(record, ev.ClientMigrates())[0].moved_by_client


@pytest.mark.parametrize("event", [ev.ClientCame(), ev.ClientWent(logged=False)], ids=["came", "went"])
def test_the_next_client_is_asked_anew(event: ev.MigrationEvent) -> None:
    """What one client does says nothing of the next one; a reset, and a daemon that goes on for it, change nothing."""
    assert not advance(NAMED, event)[0].by_client
    assert advance(NAMED, ev.ResetAsked())[0].by_client
    assert advance(NAMED, ev.Started())[0].by_client
