"""The resets of the client and of its guest. None of them fails for want of an agent.

| the function | the agent is away |
|---|---|
| was never stopped | the device resets it, and that is all; the agent's migration, if any, is left when it is back |
| stands still, or may | the device resets what it reaches and the client is answered; the guest's accesses are held |
|                      | until the agent has done its part in the background |
"""

from __future__ import annotations

import trio

from vfiouser_agents.errors import AgentError, Fate
from vfiouser_oob.devices.base import ResetKind
from vfiouser_oob.devices.resets import RESETS, MigrationEffect
from vfiouser_oob.migration.arcs import MessageTime
from vfiouser_oob.migration.backoff import WAITING_PAUSE_MAX_S, Backoff, agent_is_away, persist
from vfiouser_oob.migration.hearing import Hearing
from vfiouser_oob.migration.source import SourcePipeline
from vfiouser_oob.migration.standing import Goal, Truth, message_deadline
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError

#: Of the time that a reset has: for the agent; the rest is for the device.
_AGENT = 0.75


class Resetting(Hearing):
    """A standing that can be reset; takes what `Standing` takes."""

    async def reset(self) -> None:
        """DEVICE_RESET: always the device, and the agent if there is any doubt that the function runs.

        Raises:
            CommandError: the device cannot be reset, or the agent says that the function is broken for good.
        """
        if not self._busy:
            if self.link.begun is not None:
                await self._clear_agent(message_deadline())
            await self.actions.reset_device(message_deadline())
            return
        async with self._lock:
            await self._reset_through_agent(message_deadline(), device=True)

    async def _clear_agent(self, deadline: float) -> None:
        """Reset an agent that has not left the migration of a function that runs; else it is told to later."""
        self._stop_leaving()
        try:
            await self.actions.reset_agent(MessageTime.until(deadline).forward)
            await self._agent_was_reset(deadline)
        except AgentError:  # traced
            self._leave_later()

    async def function_reset(self) -> None:
        """The guest has reset the function through configuration space, which the device has done already."""
        deadline = message_deadline()
        if self.actions.device is not None:
            self.actions.device.shadow.clear()
        if not self._busy:
            return
        async with self._lock:
            source = self.work.source
            restarts = RESETS[ResetKind.FUNCTION_LEVEL].migration is MigrationEffect.RESTARTS
            if restarts and self.state is DeviceState.PRE_COPY and self.truth is Truth.KNOWN and source is not None:
                await self._restart_stream(source, deadline)
                await self._agent_was_reset(deadline)
            else:
                await self._reset_through_agent(deadline, device=False)

    async def _restart_stream(self, source: SourcePipeline, deadline: float) -> None:
        """Begin the stream anew. Without the agent there is none any more; the guest's reset is done all the same."""
        try:
            await self.actions.restart_stream(source, deadline, self._patience(deadline))
        except AgentError as error:
            if error.fate is Fate.FAILED:
                self._fail_device(str(error))
            elif agent_is_away(error):
                self.tracer.note(
                    "the state cannot be saved any more: its stream could not begin anew", error=str(error)
                )
                return
            raise CommandError(f"the stream could not begin anew: {error}", error.errno) from error

    def _patience(self, deadline: float) -> Backoff:
        """Pauses as long as there is time; none, if others have waited before for the agent that is away."""
        now = trio.current_time()
        until = now if self._long_away(deadline) else now + (deadline - now) * _AGENT
        return Backoff(self.config.retry_s, WAITING_PAUSE_MAX_S, until)

    def _long_away(self, deadline: float) -> bool:
        """Whether the agent has been away for so long that others have waited for it in vain."""
        now = trio.current_time()
        return self.link.away_since is not None and now - self.link.away_since > (deadline - now) / 2

    async def _reset_through_agent(self, deadline: float, *, device: bool) -> None:
        """Reset by the agent and the device, or by what of the two there is."""
        never_stopped = self.runs
        self._stop_settling()
        self._stop_leaving()
        self.work.drop_pipelines()
        now = trio.current_time()
        late = now + (deadline - now) * _AGENT
        missing: AgentError | None = None
        try:
            await persist(lambda: self.actions.reset_agent(late), self._patience(deadline), agent_is_away)
        except AgentError as error:
            if error.fate is Fate.FAILED:
                self._settle(Goal.RESET, f"the reset failed: {error}")
                raise CommandError(f"the function could not be reset: {error}", error.errno) from error
            missing = error
        except trio.Cancelled:
            self._settle(Goal.RESET, "the reset was given up")
            raise
        if device:
            await self._reset_device(deadline)
        if missing is None:
            self._now(DeviceState.RUNNING, "reset")
            await self._agent_was_reset(deadline)
        elif never_stopped and missing.unsent:
            self._back_to_running(f"reset without its agent: {missing}")
        else:
            self._owe_reset(missing, device=device)

    async def _reset_device(self, deadline: float) -> None:
        done = False
        try:
            await self.actions.reset_device(deadline)
            done = True
        finally:
            if not done:
                self._settle(Goal.RESET, "the device could not be reset")

    def _owe_reset(self, missing: AgentError, *, device: bool) -> None:
        """Answer the client's reset; the agent does its part when it can, and no guest's access goes on before."""
        self.tracer.note("the function is reset as soon as its agent answers; until then it is not used")
        old, self.state = self._shown, DeviceState.RUNNING
        self.paused_over_link = self.fenced = False
        self.owner = None
        self.work.trailer_handed = self.work.committed = False
        self.reset_due, self._resets_device = True, device
        self.asked = True
        self._settle(Goal.RESET, f"reset without its agent: {missing}")
        self.tracer.state(old, self._shown, "reset")
