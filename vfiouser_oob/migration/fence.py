"""The fence: what an agent's `status` means for a function that no client uses.

Whether the function must stay stopped is asked of the agent, never remembered by the daemon alone: a copy of it may
run elsewhere, and the daemon may have died in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from vfiouser_agents.api import AgentState, Status
from vfiouser_protocol.constants import DeviceState


class Verdict(Enum):
    """What is to be done before a client may use the function."""

    #: Nothing: it runs.
    FREE = "free"
    #: It was paused with its VM, outside of any migration: it goes on.
    PAUSED = "paused"
    #: Its state may live on elsewhere, or is half loaded: it must not go on; only a reset frees it.
    FENCED = "fenced"


#: By what the function does, outside of a migration and in one.
VERDICTS: Mapping[AgentState, tuple[Verdict, Verdict]] = MappingProxyType(
    {
        AgentState.RUNNING: (Verdict.FREE, Verdict.FREE),
        AgentState.QUIESCED: (Verdict.PAUSED, Verdict.PAUSED),
        AgentState.STOPPED: (Verdict.PAUSED, Verdict.FENCED),
        AgentState.LOADING: (Verdict.FENCED, Verdict.FENCED),
        AgentState.LOADED: (Verdict.FENCED, Verdict.FENCED),
        AgentState.ERROR: (Verdict.FENCED, Verdict.FENCED),
    }
)

#: What the client reads for it while the daemon itself does not know better.
AS_STATE: Mapping[AgentState, DeviceState] = MappingProxyType(
    {
        AgentState.RUNNING: DeviceState.RUNNING,
        AgentState.QUIESCED: DeviceState.RUNNING,
        AgentState.STOPPED: DeviceState.STOP,
        AgentState.LOADING: DeviceState.RESUMING,
        AgentState.LOADED: DeviceState.STOP,
        AgentState.ERROR: DeviceState.ERROR,
    }
)


def verdict(status: Status) -> Verdict:
    """Judge a function by its agent's status.

    Args:
        status: what the agent said.
    """
    return VERDICTS[status.state][status.role is not None]
