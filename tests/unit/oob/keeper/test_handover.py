"""Descriptors in a row: none is overwritten before it was moved; and how lives of a command follow each other."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.keeper.handover import environment, moves
from vfiouser_oob.keeper.lives import GAVE_UP, HOPELESS, STARTS, WINDOW_S, Ending, Lives


@given(st.lists(st.integers(3, 40), unique=True, max_size=30))
def test_all_arrive(numbers: list[int]) -> None:
    """Carried out one by one, the moves put each where it shall be, and each place is written, even the right one."""
    table = {number: f"file {number}" for number in numbers}
    order = moves(numbers, 3)
    for source, target in order:
        assert source != target  # dup2 would leave it close-on-exec
        table[target] = table[source]
    assert [f"file {number}" for number in numbers] == [table[3 + place] for place in range(len(numbers))]
    assert set(range(3, 3 + len(numbers))) <= {target for _, target in order}
    assert len(order) <= len(numbers) * 3 // 2 + 1 or len(order) <= len(numbers) * 2


def test_many_are_moved_quickly() -> None:
    """The work is in proportion to their number, also if each is in the way of another."""
    count = 20_000
    assert count + 1 == len(moves([*range(4, 3 + count), 3], 3))


def test_the_environment_says_what_is_given() -> None:
    """What was meant for us is not passed on, and a command that gets nothing is told of nothing."""
    ours = {"PATH": "/bin", "LISTEN_PID": "1", "LISTEN_FDS": "9", "LISTEN_FDNAMES": "x", "NOTIFY_SOCKET": "/above"}
    assert {"PATH": "/bin", "NOTIFY_SOCKET": "/n", "FDSTORE": "5"} == environment(ours, [], "/n", 5)
    given = environment(ours, ["a", "b"], "/n", 5)
    assert ("2", "a:b") == (given["LISTEN_FDS"], given["LISTEN_FDNAMES"])
    assert "LISTEN_PID" not in given


KILLED, FAILED, DONE = Ending(None, signal.SIGKILL), Ending(1, None), Ending(0, None)


@pytest.mark.parametrize(
    ("ending", "stopping", "restarting", "code"),
    [
        (KILLED, False, False, None),
        (FAILED, False, False, None),
        (DONE, False, False, 0),
        (DONE, False, True, None),
        (KILLED, False, True, None),
        (DONE, True, False, 0),
        (FAILED, True, True, 1),
        (KILLED, True, True, 0),
        *((Ending(code, None), False, False, code) for code in HOPELESS),
        *((Ending(code, None), False, True, None) for code in HOPELESS),
    ],
)
def test_what_follows_an_ending(ending: Ending, stopping: bool, restarting: bool, code: int | None) -> None:
    """Started again after failures and when that is asked for; not after its own end or a hopeless one."""
    lives = Lives()
    lives.started(0)
    assert code == lives.after(ending, 1, stopping=stopping, restarting=restarting).code


def test_one_that_fails_again_and_again_is_given_up() -> None:
    """Five starts within ten seconds; more slowly it may go on for ever."""
    lives = Lives()
    for number in range(STARTS - 1):
        lives.started(number)
        assert lives.after(KILLED, number, stopping=False, restarting=False).code is None
    lives.started(STARTS)
    verdict = lives.after(KILLED, STARTS, stopping=False, restarting=False)
    assert GAVE_UP == verdict.code
    assert "5 times within 10 s, the last time with signal 9" in str(verdict.reason)
    slow = Lives()
    for number in range(100):
        slow.started(number * WINDOW_S / (STARTS - 1))
        assert slow.after(FAILED, number * WINDOW_S / (STARTS - 1), stopping=False, restarting=False).code is None


@pytest.mark.parametrize(("status", "ending"), [(0, DONE), (1 << 8, FAILED), (9, KILLED)])
def test_how_a_process_ended(status: int, ending: Ending) -> None:
    """As waitpid says it."""
    assert ending == Ending.of(status)
