"""How long each step may take, and until when it is attempted again, by how its plan divides a message's time."""

from __future__ import annotations

import trio

from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.events import Take
from vfiouser_oob.migration.message_time import MessageTime
from vfiouser_oob.migration.plans import Bound, Do, TimeAllotment

#: Until when what is attempted once is attempted again.
NEVER = float("-inf")


class StepTimes:
    """The times of one function's steps.

    Args:
        config: its limits.
        link: its agent, for which nobody waits that has waited in vain.
    """

    def __init__(self, config: MigrationConfig, link: AgentLink) -> None:
        self._call_s = config.call_s
        self._link = link
        self._bounds = {Bound.CALL: config.call_s, Bound.STOP: config.stop_s, Bound.DATA: config.data_s}

    def deadline(self, due: Take, message: MessageTime) -> float:
        """When an attempt of a step that begins now has to be over, by trio's clock.

        Args:
            due: the step.
            message: the time that there is.
        """
        now = trio.current_time()
        if due.manner is TimeAllotment.FORWARD:
            return min(message.attempt, now + self._bounds[due.step.bound])
        if due.manner is TimeAllotment.ATTACHING and due.step.do is Do.ASK:
            return min(message.end, now + self._call_s)
        if due.manner is TimeAllotment.RESETTING and due.step.do is Do.RESET_AGENT:
            return message.agent
        return message.end

    def patience(self, due: Take, message: MessageTime) -> float:
        """Until when a step is attempted again; if others have waited for the agent in vain before, it is not.

        Args:
            due: the step.
            message: the time that there is.
        """
        if due.manner is TimeAllotment.ATTACHING:
            return message.again
        if due.manner is TimeAllotment.FORWARD:
            return NEVER if due.pausing and self._long_away(message.end) else message.again
        return NEVER if self._long_away(message.end) else message.agent

    def _long_away(self, deadline: float) -> bool:
        """Whether the agent has been away for so long that others have waited for it in vain."""
        now = trio.current_time()
        return self._link.away_since is not None and now - self._link.away_since > (deadline - now) / 2
