"""The command table against the specification's overview."""

from __future__ import annotations

import pytest

from vfiouser_protocol.commands import COMMANDS, ConnectionEnd, ConnectionPhase
from vfiouser_protocol.constants import Command

#: number: (sender, least request payload, request descriptors, reply descriptors)
OVERVIEW = {
    1: (ConnectionEnd.CLIENT, 4, 0, 1),
    2: (ConnectionEnd.CLIENT, 32, 1, 0),
    3: (ConnectionEnd.CLIENT, 24, 0, 0),
    4: (ConnectionEnd.CLIENT, 16, 0, 0),
    5: (ConnectionEnd.CLIENT, 32, 0, 1),
    6: (ConnectionEnd.CLIENT, 16, 0, 253),
    7: (ConnectionEnd.CLIENT, 16, 0, 0),
    8: (ConnectionEnd.CLIENT, 20, 253, 0),
    9: (ConnectionEnd.CLIENT, 16, 0, 0),
    10: (ConnectionEnd.CLIENT, 16, 0, 0),
    11: (ConnectionEnd.SERVER, 16, 0, 0),
    12: (ConnectionEnd.SERVER, 16, 0, 0),
    13: (ConnectionEnd.CLIENT, 0, 0, 0),
    14: (ConnectionEnd.CLIENT, 8, 0, 0),
    15: (ConnectionEnd.CLIENT, 8, 0, 0),
    16: (ConnectionEnd.CLIENT, 8, 0, 0),
    17: (ConnectionEnd.CLIENT, 8, 0, 0),
    18: (ConnectionEnd.CLIENT, 8, 0, 0),
}


@pytest.mark.parametrize("number", OVERVIEW)
def test_row(number: int) -> None:
    """Proves that each row says what the specification says."""
    spec = COMMANDS[number]
    actual = (spec.sender, spec.min_payload, spec.request_fds, spec.reply_fds)
    assert OVERVIEW[number] == actual
    assert spec.command == number


def test_the_table_is_complete() -> None:
    """Proves that every command has a row and nothing else has."""
    assert set(Command) == set(COMMANDS)


def test_only_version_negotiates() -> None:
    """Proves that VERSION alone comes before the connection is ready, and alone ignores NO_REPLY."""
    assert {spec.command for spec in COMMANDS.values() if spec.phase is ConnectionPhase.NEGOTIATING} == {1}
    assert {spec.command for spec in COMMANDS.values() if not spec.no_reply} == {1}


def test_roles_are_peers() -> None:
    """Proves that each role is the other's peer."""
    assert ConnectionEnd.CLIENT.peer is ConnectionEnd.SERVER
    assert ConnectionEnd.SERVER.peer is ConnectionEnd.CLIENT
