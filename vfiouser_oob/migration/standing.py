"""What a function does, as far as anybody knows: the state, whether it is certain, and the task that finds out."""

from __future__ import annotations

import errno
import time
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum

import trio

from vfiouser_agents.api import Agent, AgentState, Outcome, Status
from vfiouser_agents.errors import AgentError, Fate
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.migration.actions import Actions, Work
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.arcs import Bound, Undo
from vfiouser_oob.migration.backoff import Backoff
from vfiouser_oob.migration.fence import AS_STATE
from vfiouser_oob.migration.trace import Tracer
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.persist.capabilities import Drawer, Facts
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError, VfioUserError

#: Kept back of a message's time so that our own answer comes before the connection's.
_MARGIN_S = 0.05
_MARGIN_PART = 0.05


class Owner(Enum):
    """Who moves the state."""

    V1 = "v1"
    V2 = "v2"


class Truth(Enum):
    """Whether the state is what the function really does."""

    KNOWN = "known"
    #: A call's effect is not known; a task finds out.
    UNKNOWN = "unknown"
    #: The agent said that the function is broken; only a reset leads out.
    FAILED = "failed"


class Goal(Enum):
    """What the task that settles an unknown truth works for."""

    RESUME = "resume"
    RESET = "reset"
    #: Find out and touch nothing.
    LEARN = "learn"


def message_deadline() -> float:
    """The time by which work for the current message has to be done, as trio's clock has it."""
    deadline = trio.current_effective_deadline()
    left = deadline - trio.current_time()
    return deadline - min(_MARGIN_S, left * _MARGIN_PART) if 0 < left < float("inf") else deadline


class Standing:
    """Where one function stands in its migration.

    Args:
        name: the function's name.
        agent: its agent; entered and left by the caller.
        function_id: the agent's name for it.
        config: its migration settings.
        events: where changes are announced.
        log: a logger with the function's fields.
        memory: where the agent's capabilities are kept beyond the daemon's end; None: nowhere.
    """

    def __init__(
        self,
        name: str,
        agent: Agent,
        function_id: str,
        config: MigrationConfig,
        events: EventHub,
        log: Logger,
        memory: Drawer | None = None,
    ) -> None:
        self.config = config
        self.tracer = Tracer(name, events, log)
        self.link = AgentLink(agent, function_id, self.tracer)
        self.actions = Actions(self.link, config, self.tracer)
        self.state = DeviceState.RUNNING
        self.owner: Owner | None = None
        self.truth = Truth.KNOWN
        #: Since when the truth is not known, in seconds since 1970.
        self.unknown_since: float | None = None
        #: Whether the agent was asked, since the daemon began or a client left a migration behind.
        self.asked = False
        self.fenced = False
        #: STOP is a pause without the agent: the function was never stopped, and does what it was told before.
        self.paused_over_link = False
        #: The client's reset was answered without the agent, which still has to do its part; until then the guest's
        #: accesses are held.
        self.reset_due = False
        #: Guest accesses wait, since the function may stand still and is being brought back.
        self.awaiting = False
        #: Why the function cannot be migrated, for a reason that does not pass by itself.
        self.blocked: str | None = None
        #: Told after every reset of the function through the agent, which ends its dirty log.
        self.after_agent_reset: Callable[[float], Awaitable[None]] | None = None
        #: The reset that is settled is the backend's matter, too, and not one that the guest did through it.
        self._resets_device = True
        self.memory = memory
        self.link.told = self._remember
        self._lock = trio.Lock()
        #: Counts what may have changed the state, so that who waited meanwhile knows that something did.
        self._turn = 0
        self._turn_made = trio.Event()
        self._hurry = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._settled = trio.Event()
        self._settled.set()
        self._settling: trio.CancelScope | None = None
        #: An attempt to settle is under way.
        self._trying = False
        self._leaving: trio.CancelScope | None = None
        self.actions.device_failed = self._fail_device
        self._bounds = {Bound.CALL: config.call_s, Bound.STOP: config.stop_s, Bound.DATA: config.data_s}

    @property
    def work(self) -> Work:
        """What the migration under way holds."""
        return self.actions.work

    @property
    def _busy(self) -> bool:
        return self.state is not DeviceState.RUNNING or self.truth is not Truth.KNOWN

    @property
    def moved(self) -> int:
        """Bytes of the stream that the client took, or gave."""
        source, destination = self.work.source, self.work.destination
        return source.taken if source is not None else destination.written if destination is not None else 0

    @property
    def _shown(self) -> str:
        """The state as events and errors name it."""
        return _SHOWN.get(self.truth, self.state.name)

    def require_owner(self, owner: Owner, what: str) -> None:
        """Refuse a command of the generation that does not own the migration.

        Args:
            owner: whose command it is.
            what: the command's name.

        Raises:
            CommandError: EBUSY.
        """
        if self.owner not in (None, owner):
            assert self.owner is not None
            raise CommandError(
                f"{what}: the migration belongs to generation {self.owner.value} until RUNNING or a reset", errno.EBUSY
            )

    async def settle(self) -> None:
        """Wait until nothing is left to be brought back; for an orderly end of the daemon."""
        await self._settled.wait()

    @property
    def runs(self) -> bool:
        """Whether the function is known to run."""
        return self.truth is Truth.KNOWN and (self.state in _RUNS or self.paused_over_link)

    @property
    def certain(self) -> bool:
        """Whether the state is what the function does at this moment, with no call under way that may change it."""
        return self.truth is not Truth.UNKNOWN and not (self._trying and not self.link.changing.unsent)

    async def known(self) -> None:
        """Wait until it is known what the function does, and nothing is being done about it."""
        while self.awaiting:
            await self._turn_made.wait()

    # Changes

    def _turned(self) -> None:
        self._turn += 1
        self._turn_made.set()
        self._turn_made = trio.Event()

    def _back_to_running(self, why: str) -> None:
        self.work.drop_pipelines()
        self._now(DeviceState.RUNNING, why)
        self._leave_later()

    def _adopt(self, status: Status) -> None:
        """Make the agent's word the truth; it is not QUIESCED, which is no state to stay in."""
        state = AS_STATE[status.state]
        if state is DeviceState.ERROR:
            self._fail_device(status.detail or "the agent says that the function is in ERROR")
        elif state is DeviceState.RUNNING:
            self._back_to_running("the agent says that it runs")
        elif self.state in (*_RUNS, DeviceState.RESUMING):
            self.work.drop_pipelines()
            self._now(state, "the agent says so")
        else:
            self._now(self.state, "the agent says so")

    def _now(self, state: DeviceState, why: str, *, over_link: bool = False) -> None:
        """The function is in this state: known.

        Args:
            state: which.
            why: for people.
            over_link: it is a pause without the agent.
        """
        old, self.state = self._shown, state
        self.truth = Truth.KNOWN
        self.paused_over_link = over_link
        self.awaiting = self.reset_due = False
        self.unknown_since = None
        self._settled.set()
        if state is DeviceState.RUNNING:
            self._leave_later(Outcome.SUCCESS if self.work.committed else Outcome.CANCELLED)
            self.owner = None
            self.fenced = False
            self.asked = True
            self.work.trailer_handed = self.work.committed = False
        self._turned()
        if state.name != old:
            self.tracer.state(old, state.name, why)

    def _fail_device(self, why: str) -> None:
        self.work.drop_pipelines()
        self._stop_settling()
        old = self._shown
        self.truth = Truth.FAILED
        self.awaiting = self.reset_due = self.paused_over_link = False
        self.unknown_since = None
        self._turned()
        self.tracer.state(old, self._shown, why)

    def _leave_load(self, why: str) -> None:
        """A load that failed stays RESUMING: nothing else is true, and only the client's reset leads out.

        One of nothing is left by a reset of our own, which may have been done or not: so it is done in any case.
        """
        destination = self.work.destination
        if destination is not None and not destination.written:
            self.work.drop_pipelines()
            self._settle(Goal.RESET, why)
        elif destination is not None and destination.failure is None:
            destination.failure = why

    # Leaving a migration at the agent

    def _leave_later(self, outcome: Outcome = Outcome.CANCELLED) -> None:
        """End what was begun at the agent, in the background, since the function runs in any case."""
        if self.link.begun is not None and self._leaving is None and self._nursery is not None:
            self._leaving = trio.CancelScope()
            self._nursery.start_soon(self._leave, outcome, self._leaving)

    async def _leave(self, outcome: Outcome, scope: trio.CancelScope) -> None:
        pauses = Backoff(self.config.retry_s)
        with scope:
            while self.link.begun is not None:
                try:
                    await self.link.leave(outcome, trio.current_time() + self.config.call_s, abort=True)
                except AgentError as error:  # traced; the migration is left when the agent is back
                    if error.fatal:
                        break
                    await pauses.pause()
            if self.actions.device is None:
                await self.link.close()
        if self._leaving is scope:
            self._leaving = None

    def _stop_leaving(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    # Finding out

    def _settle(self, goal: Goal, why: str, *, sure: bool = False) -> None:
        """Work for the goal in the background until it is reached.

        Args:
            goal: which.
            why: for people.
            sure: what the function does is known all the same, until a call may have changed it.
        """
        self._stop_settling()
        self.awaiting = True
        if not sure:
            self._doubt(why)
        if self._nursery is None:  # the daemon ends; the next one asks the agent
            return
        self._settled = trio.Event()
        self._settling = trio.CancelScope()
        self._nursery.start_soon(self._settle_until_done, goal, self._settling, self._settled)

    def _doubt(self, why: str) -> None:
        """It is not known any more what the function does."""
        old = self._shown
        self.truth = Truth.UNKNOWN
        if self.unknown_since is None:
            self.unknown_since = time.time()
        self._turned()
        self.tracer.state(old, self._shown, why)

    def _stop_settling(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None

    def _take_over(self) -> None:
        """What is being brought back in the background is asked for by the client now, so the background leaves it.

        Where a call of it may have been sent, its answer is waited for as everywhere.
        """
        if self._settling is None or self._settled.is_set() or self.truth is not Truth.KNOWN:
            return
        if self._trying and not self.link.changing.unsent:
            self._doubt("a call of the background is under way")
        else:
            self._stop_settling()
            self._settled.set()

    async def _settle_until_done(self, goal: Goal, scope: trio.CancelScope, settled: trio.Event) -> None:
        pauses = Backoff(self.config.retry_s)
        try:
            with scope:
                while not await self._try_settle(goal):
                    self._hurry = trio.Event()
                    await pauses.pause(self._hurry)
        finally:
            settled.set()

    async def _try_settle(self, goal: Goal) -> bool:
        """Make one attempt; returns whether the truth is known now."""
        self._trying = True
        try:
            await _SETTLING[goal](self, trio.current_time() + self.config.stop_s)
            if self.actions.device is None and not self._busy:
                await self.link.close()
        except AgentError as error:
            if error.fate is Fate.FAILED:
                self._fail_device(str(error))
                return True
            if error.unclear and self.truth is Truth.KNOWN:
                self._doubt(str(error))
            return False
        except VfioUserError as error:
            self.tracer.note("the device could not be reset", error=str(error))
            return False
        finally:
            self._trying = False
        return self.truth is not Truth.UNKNOWN

    async def _settle_by_asking(self, deadline: float) -> None:
        status = await self.link.status(deadline)
        if status.pending:
            return
        if status.state is AgentState.QUIESCED:
            # Half-way: it may not be started by us, so it is stopped, which does no harm to any copy.
            await self.actions.stop(deadline)
            status = await self.link.status(deadline)
            if status.state is AgentState.QUIESCED:
                return
        self._adopt(status)

    async def _settle_by_resuming(self, deadline: float) -> None:
        await self.actions.resume(deadline)
        self._back_to_running("brought back")

    async def _settle_by_resetting(self, deadline: float) -> None:
        due, device = self.reset_due, self._resets_device
        await self.actions.reset_agent(deadline)
        if due:
            await self.actions.reset_device_late(deadline, device=device)
        elif device:
            await self.actions.reset_device(deadline)
        await self._agent_was_reset(deadline)
        if due and self.paused_over_link:
            self._now(DeviceState.STOP, "reset", over_link=True)
        else:
            self._back_to_running("reset")

    async def state_now(self) -> DeviceState:
        """The state for a client that asks by message: the truth, or ERROR if the agent's answer does not tell it."""
        if self.truth is Truth.FAILED:
            return DeviceState.ERROR
        if self.certain or self.reset_due:
            return self.state
        try:
            status = await self.link.status(message_deadline())
        except AgentError as error:
            # That nobody is there says nothing about the function.
            return self.state_shown if self._settled.is_set() or error.unsent else DeviceState.ERROR
        return self.state_shown if self._settled.is_set() else AS_STATE.get(status.state, self.state)

    @property
    def state_shown(self) -> DeviceState:
        """The state for a client that must never see an error that may pass: the old one while the truth is unknown."""
        return DeviceState.ERROR if self.truth is Truth.FAILED else self.state

    def _remember(self, facts: Facts) -> None:
        """The agent has said what it can do."""
        if self.memory is not None and self._nursery is not None:
            self._nursery.start_soon(self.memory.remember, facts)

    def _goal(self, undo: Undo) -> Goal:
        """What to work for in the background; a function whose state may live elsewhere is only asked about."""
        if undo is Undo.LEARN and not (self.work.trailer_handed or self.work.committed):
            return Goal.RESUME
        return _GOALS[undo]

    async def _agent_was_reset(self, deadline: float) -> None:
        if self.after_agent_reset is not None:
            await self.after_agent_reset(deadline)


#: What stands for a state that is not known, or that only a reset leads out of.
_SHOWN: Mapping[Truth, str] = {Truth.UNKNOWN: "UNKNOWN", Truth.FAILED: "ERROR"}
_RUNS = (DeviceState.RUNNING, DeviceState.PRE_COPY)
_SETTLING: Mapping[Goal, Callable[[Standing, float], Awaitable[None]]] = {
    Goal.LEARN: Standing._settle_by_asking,
    Goal.RESUME: Standing._settle_by_resuming,
    Goal.RESET: Standing._settle_by_resetting,
}
_GOALS: Mapping[Undo, Goal] = {
    Undo.RESUME: Goal.RESUME,
    Undo.RESET: Goal.RESET,
    Undo.LEARN: Goal.LEARN,
    Undo.LEAVE: Goal.RESUME,
}
