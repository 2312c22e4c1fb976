"""What a daemon that begins anew makes of an agent's status."""

from __future__ import annotations

import pytest

from vfiouser_agents.api import AgentState, Capabilities, Role, Status
from vfiouser_oob.migration.fence import VERDICTS, Verdict, maybe_migrated

REMEMBERS, FORGETS = Capabilities(takeover=True), Capabilities(takeover=False)


@pytest.mark.parametrize(
    ("state", "role", "caps", "expected"),
    [
        (AgentState.RUNNING, None, FORGETS, Verdict.FREE),
        (AgentState.RUNNING, Role.SOURCE, FORGETS, Verdict.FREE),
        (AgentState.QUIESCED, None, FORGETS, Verdict.PAUSED),
        (AgentState.STOPPED, None, REMEMBERS, Verdict.PAUSED),
        (AgentState.STOPPED, Role.SOURCE, REMEMBERS, Verdict.FENCED),
        (AgentState.STOPPED, None, FORGETS, Verdict.FENCED),
        (AgentState.STOPPED, None, None, Verdict.FENCED),
        (AgentState.LOADED, None, REMEMBERS, Verdict.FENCED),
    ],
)
def test_verdicts(state: AgentState, role: Role | None, caps: Capabilities | None, expected: Verdict) -> None:
    """A function that stands still is free to go on only if its agent knows that it was in no migration."""
    assert expected is VERDICTS[state][maybe_migrated(Status(state, role), caps)]
