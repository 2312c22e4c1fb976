"""Attempts that are made again: pauses, deadlines, and what is known of all of them together."""

from __future__ import annotations

import pytest
import trio

from vfiouser_agents.errors import AgentError, AuthError, Busy, ConnectError, TransportLost
from vfiouser_oob.migration.backoff import Backoff, Pace, agent_is_away, persist, repeatable


async def test_pauses_double_up_to_the_longest(autojump_clock: trio.abc.Clock) -> None:
    """1, 2, 4, 5, 5 …; a hurry ends one at once."""
    pauses, begun = Backoff(1.0, 5.0), trio.current_time()
    seen = []
    for _ in range(5):
        assert await pauses.pause()
        seen.append(trio.current_time() - begun)
    assert [1, 3, 7, 12, 17] == seen
    hurry = trio.Event()
    hurry.set()
    assert await pauses.pause(hurry)
    assert 17 == trio.current_time() - begun


async def test_no_pause_leads_beyond_the_deadline(autojump_clock: trio.abc.Clock) -> None:
    """What would begin too late is not waited for."""
    begun = trio.current_time()
    pauses = Backoff(1.0, 5.0, begun + 3.5)
    assert await pauses.pause()
    assert await pauses.pause()
    assert not await pauses.pause()
    assert 3 == trio.current_time() - begun


class Attempts:
    """Fails with one error after the other, then succeeds."""

    def __init__(self, *errors: AgentError) -> None:
        self.errors = list(errors)

    async def __call__(self) -> str:
        """Make one."""
        await trio.lowlevel.checkpoint()
        if self.errors:
            raise self.errors.pop(0)
        return "done"


async def test_it_goes_on_while_the_agent_is_away(autojump_clock: trio.abc.Clock) -> None:
    """What was not reached, or was lost, is tried again; a refusal is an answer."""
    attempts = Attempts(ConnectError("refused"), TransportLost("gone"), AuthError("no"))
    assert "done" == await persist(attempts, Backoff(0.1), agent_is_away)
    with pytest.raises(Busy):
        await persist(Attempts(ConnectError("refused"), Busy("later")), Backoff(0.1), agent_is_away)
    assert "done" == await persist(Attempts(Busy("later")), Backoff(0.1), repeatable)


@pytest.mark.parametrize("lost_before", [False, True])
async def test_the_last_error_is_about_all_of_them(lost_before: bool, autojump_clock: trio.abc.Clock) -> None:
    """Once an attempt may have had its effect, a later one that was not sent does not undo the doubt."""
    errors = [ConnectError("refused") for _ in range(100)]
    attempts = Attempts(*([TransportLost("gone")] if lost_before else []), *errors)
    with pytest.raises(ConnectError) as caught:
        await persist(attempts, Backoff(0.1, 0.4, trio.current_time() + 2), agent_is_away)
    assert (not lost_before, lost_before) == (caught.value.unsent, caught.value.unclear)
    assert 1 < len(errors) - len(attempts.errors) < 10


async def test_pace(autojump_clock: trio.abc.Clock) -> None:
    """So much happens at once and no more in a stretch; who is slow is not held up."""
    pace, begun = Pace(3, 1.0), trio.current_time()
    seen = []
    for _ in range(7):
        await pace.taken()
        seen.append(trio.current_time() - begun)
    assert [0, 0, 1, 1, 1, 2, 2] == seen
    for _ in range(5):
        await trio.sleep(5)
        before = trio.current_time()
        await pace.taken()
        assert before == trio.current_time()
