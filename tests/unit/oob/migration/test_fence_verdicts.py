"""What a daemon that begins anew makes of an agent's status."""

from __future__ import annotations

import pytest

from vfiouser_agents.api import AgentState, Capabilities, Role, Status
from vfiouser_oob.migration.fence import VERDICTS, FenceVerdict, maybe_migrated

REMEMBERS, FORGETS = Capabilities(takeover=True), Capabilities(takeover=False)


@pytest.mark.parametrize(
    ("state", "role", "caps", "expected"),
    [
        (AgentState.RUNNING, None, FORGETS, FenceVerdict.FREE),
        (AgentState.RUNNING, Role.SOURCE, FORGETS, FenceVerdict.FREE),
        (AgentState.QUIESCED, None, FORGETS, FenceVerdict.PAUSED),
        (AgentState.STOPPED, None, REMEMBERS, FenceVerdict.PAUSED),
        (AgentState.STOPPED, Role.SOURCE, REMEMBERS, FenceVerdict.FENCED),
        (AgentState.STOPPED, None, FORGETS, FenceVerdict.FENCED),
        (AgentState.STOPPED, None, None, FenceVerdict.FENCED),
        (AgentState.LOADED, None, REMEMBERS, FenceVerdict.FENCED),
    ],
)
def test_verdicts(state: AgentState, role: Role | None, caps: Capabilities | None, expected: FenceVerdict) -> None:
    """A function that stands still is free to go on only if its agent knows that it was in no migration."""
    assert expected is VERDICTS[state][maybe_migrated(Status(state, role), caps)]
