"""What becomes of a command that a process took with it: it is never executed twice unless that does no harm."""

from __future__ import annotations

import itertools

import pytest

from vfiouser_oob.persist.command_page import Stage, Taken
from vfiouser_oob.persist.successor.in_flight import CONFIRMABLE, REPEATABLE, Fate, fate
from vfiouser_protocol.constants import Command

READ, WRITE, INFO, MAP = Command.REGION_READ, Command.REGION_WRITE, Command.DEVICE_GET_INFO, Command.DMA_MAP


def taken(
    command: int, stage: Stage, *, payload: bytes | None = b"", no_reply: bool = False, with_fds: bool = False
) -> Taken:
    """A command as a page has it."""
    return Taken(1, 2, command, stage, no_reply, with_fds, payload)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (WRITE, (Fate.EXECUTE, Fate.FAIL, Fate.CONFIRM_IF_UNHEARD, Fate.FAIL_IF_UNHEARD)),
        (READ, (Fate.EXECUTE, Fate.FAIL, Fate.FAIL_IF_UNHEARD, Fate.FAIL_IF_UNHEARD)),
        (INFO, (Fate.EXECUTE, Fate.EXECUTE, Fate.EXECUTE_IF_UNHEARD, Fate.FAIL_IF_UNHEARD)),
    ],
)
def test_by_how_far_it_was(command: int, expected: tuple[Fate, ...]) -> None:
    """What was not begun is done; what may have been done is done again only if that does no harm."""
    assert expected == tuple(fate(taken(command, stage)) for stage in Stage)


def test_a_device_whose_reads_do_nothing() -> None:
    """Its reads are repeated."""
    repeatable = REPEATABLE | {READ}
    expected = (Fate.EXECUTE, Fate.EXECUTE, Fate.EXECUTE_IF_UNHEARD, Fate.FAIL_IF_UNHEARD)
    assert expected == tuple(fate(taken(READ, stage), repeatable) for stage in Stage)


@pytest.mark.parametrize("command", [READ, WRITE, INFO, MAP])
def test_what_is_gone_is_not_guessed(command: int) -> None:
    """Without its payload or its descriptors nothing is executed; what was executed may still be confirmed."""
    for missing in ({"payload": None}, {"with_fds": True}):
        fates = {fate(taken(command, stage, **missing)) for stage in Stage}
        assert not fates & {Fate.EXECUTE, Fate.EXECUTE_IF_UNHEARD}
    expected = Fate.CONFIRM_IF_UNHEARD if command in CONFIRMABLE else Fate.FAIL_IF_UNHEARD
    if command == MAP:
        assert expected == fate(taken(command, Stage.ANSWERING, with_fds=True))


def test_nobody_is_answered_who_does_not_wait() -> None:
    """A posted write is executed if it was not begun, and forgotten otherwise: never twice, never answered."""
    assert [Fate.EXECUTE, Fate.FORGET, Fate.FORGET, Fate.FORGET] == [
        fate(taken(WRITE, stage, no_reply=True)) for stage in Stage
    ]


def test_nothing_is_done_twice() -> None:
    """Over all commands: once it may have been executed, only what is repeatable is executed again."""
    whether = (False, True)
    for command, stage, no_reply, with_fds, payload in itertools.product(
        [*Command, 127], Stage, whether, whether, [None, b""]
    ):
        case = taken(command, stage, payload=payload, no_reply=no_reply, with_fds=with_fds)
        decided = fate(case)
        executes = decided in (Fate.EXECUTE, Fate.EXECUTE_IF_UNHEARD)
        assert not executes or stage is Stage.TAKEN or command in REPEATABLE, case
        assert not executes or (payload is not None and not with_fds), case
        assert no_reply == (decided is Fate.FORGET) or decided is Fate.EXECUTE, case
