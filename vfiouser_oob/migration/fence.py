"""What an agent's `status` means: the fence, for a function that no client uses, and the truth for one that is used.

Whether the function must stay stopped is asked of the agent, never remembered by the daemon alone: a copy of it may
run elsewhere, and the daemon may have died in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from vfiouser_agents.api import AgentState, Capabilities, Status
from vfiouser_protocol.constants import DeviceState


class FenceVerdict(Enum):
    """What is to be done before a client may use the function."""

    #: Nothing: it runs.
    FREE = "free"
    #: It was paused with its VM, outside of any migration: it goes on.
    PAUSED = "paused"
    #: Its state may live on elsewhere, or is half loaded: it must not go on; only a reset frees it.
    FENCED = "fenced"


#: By what the function does, outside of a migration, and in one or perhaps in one.
VERDICTS: Mapping[AgentState, tuple[FenceVerdict, FenceVerdict]] = MappingProxyType(
    {
        AgentState.RUNNING: (FenceVerdict.FREE, FenceVerdict.FREE),
        AgentState.QUIESCED: (FenceVerdict.PAUSED, FenceVerdict.PAUSED),
        AgentState.STOPPED: (FenceVerdict.PAUSED, FenceVerdict.FENCED),
        AgentState.LOADING: (FenceVerdict.FENCED, FenceVerdict.FENCED),
        AgentState.LOADED: (FenceVerdict.FENCED, FenceVerdict.FENCED),
        AgentState.ERROR: (FenceVerdict.FENCED, FenceVerdict.FENCED),
    }
)

#: What the client reads for it while the daemon itself does not know better. QUIESCED is missing: between RUNNING and
#: STOP there is no state on the wire, and neither is true, so the last state that was known stands.
AS_STATE: Mapping[AgentState, DeviceState] = MappingProxyType(
    {
        AgentState.RUNNING: DeviceState.RUNNING,
        AgentState.STOPPED: DeviceState.STOP,
        AgentState.LOADING: DeviceState.RESUMING,
        AgentState.LOADED: DeviceState.STOP,
        AgentState.ERROR: DeviceState.ERROR,
    }
)


class Reaction(Enum):
    """What is to be done when the agent says, unasked, where the function is."""

    #: As expected.
    NOTHING = "nothing"
    #: It is no contradiction, but not our doing either.
    NOTE = "note"
    #: The agent's word is the truth.
    ADOPT = "adopt"


_RUNS = {
    AgentState.RUNNING: Reaction.NOTHING,
    AgentState.QUIESCED: Reaction.NOTE,
    AgentState.STOPPED: Reaction.ADOPT,
    AgentState.LOADING: Reaction.ADOPT,
    AgentState.LOADED: Reaction.ADOPT,
    AgentState.ERROR: Reaction.ADOPT,
}
_STANDS = {
    AgentState.RUNNING: Reaction.ADOPT,
    AgentState.QUIESCED: Reaction.NOTE,
    AgentState.STOPPED: Reaction.NOTHING,
    AgentState.LOADING: Reaction.NOTE,
    AgentState.LOADED: Reaction.NOTHING,
    AgentState.ERROR: Reaction.ADOPT,
}
#: A load that begins anew passes through STOPPED, so only the calls of the load tell whether it is lost.
_LOADS = {
    AgentState.RUNNING: Reaction.ADOPT,
    AgentState.QUIESCED: Reaction.NOTE,
    AgentState.STOPPED: Reaction.NOTHING,
    AgentState.LOADING: Reaction.NOTHING,
    AgentState.LOADED: Reaction.NOTHING,
    AgentState.ERROR: Reaction.ADOPT,
}
#: By what the client reads and what the agent says, while nothing is being changed.
REACTIONS: Mapping[DeviceState, Mapping[AgentState, Reaction]] = MappingProxyType(
    {
        DeviceState.RUNNING: _RUNS,
        DeviceState.PRE_COPY: _RUNS,
        DeviceState.STOP: _STANDS,
        DeviceState.STOP_COPY: _STANDS,
        DeviceState.RESUMING: _LOADS,
    }
)


def maybe_migrated(status: Status, caps: Capabilities | None) -> bool:
    """Whether a migration may have left the function where it is.

    An agent that does not itself remember migrations says of a source that gave everything no more than that it stands
    still. So would it of one that was only paused; but whose copy may run elsewhere must not go on.

    Args:
        status: what the agent said.
        caps: what it can do; None if that is not known.
    """
    return status.role is not None or caps is None or not caps.takeover
