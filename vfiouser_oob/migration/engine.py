"""The heart: one migration state machine per function, for both generations, with the agent's doings behind it.

Rule 1: *the state is the truth*. It changes when the agent has done something, not when it was asked to. While the
        truth is not known (a call was lost or timed out), `truth` says so, and a task finds out.
Rule 2: *never two running copies*. Until the client has the whole state, a source that may stand still is brought
        back; from then on it starts only when the client says RUNNING, or by a reset. A destination runs only what was
        verified and only when the client says so.
Rule 3: *one owner*. The generation that first leaves RUNNING moves the state until RUNNING or a reset.
Rule 4: *every client message has one deadline*; what is done for it shares that deadline, and the last part of it is
        kept for undoing.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum

import trio

from vfiouser_agents.api import Agent, AgentState, Outcome, Status
from vfiouser_agents.errors import AgentError, Fate
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.control.events import EventHub
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.migration.actions import Actions, Device, Work
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.arcs import ARCS, Bound, StepFailed, Undo, travel
from vfiouser_oob.migration.fence import AS_STATE, Verdict, verdict
from vfiouser_oob.migration.trace import Tracer
from vfiouser_oob.observability.log import Logger
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError, VfioUserError
from vfiouser_protocol.migration_v2 import Arc, require_path

#: Of the time that a message has: for going forward, the rest is for undoing.
_FORWARD = 0.6
#: Kept back of a message's time so that our own answer comes before the connection's.
_MARGIN_S = 0.05
_MARGIN_PART = 0.05
_PAUSE_MAX_S = 5.0
_RUNS = (DeviceState.RUNNING, DeviceState.PRE_COPY)


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


class MigrationEngine:
    """The migration of one function; lives as long as the function.

    Args:
        name: the function's name.
        agent: its agent; entered and left by the caller.
        function_id: the agent's name for it.
        config: its migration settings.
        events: where changes are announced.
        log: a logger with the function's fields.
    """

    def __init__(
        self, name: str, agent: Agent, function_id: str, config: MigrationConfig, events: EventHub, log: Logger
    ) -> None:
        self.config = config
        self.tracer = Tracer(name, events, log)
        self.link = AgentLink(agent, function_id, self.tracer)
        self.actions = Actions(self.link, config, self.tracer)
        self.state = DeviceState.RUNNING
        self.owner: Owner | None = None
        self.truth = Truth.KNOWN
        #: Whether the agent was asked, since the daemon began or a client left a migration behind.
        self.asked = False
        self.fenced = False
        self._paused = False
        #: Told after every reset of the function through the agent, which ends its dirty log.
        self.after_agent_reset: Callable[[float], Awaitable[None]] | None = None
        self._log = log
        self._lock = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._settled = trio.Event()
        self._settled.set()
        self._settling: trio.CancelScope | None = None
        self._leaving: trio.CancelScope | None = None
        self._probing: trio.CancelScope | None = None
        self.actions.device_failed = self._fail_device
        self._bounds = {Bound.CALL: config.call_s, Bound.STOP: config.stop_s, Bound.DATA: config.data_s}

    @property
    def work(self) -> Work:
        """What the migration under way holds."""
        return self.actions.work

    async def run(self) -> None:
        """Run the engine's tasks; runs as long as the function does."""
        async with trio.open_nursery() as nursery:
            self._nursery = self.actions.nursery = nursery
            self._running.set()
            nursery.start_soon(self._probe)
            await trio.sleep_forever()

    # Coming and going of clients

    async def _probe(self) -> None:
        """Ask the agent where the function is, in the background; what the client wants goes first."""
        if self._probing is not None or self._busy or self.link.begun is not None:
            return
        pause = self.config.retry_s
        with trio.CancelScope() as scope:
            self._probing = scope
            while not await self._ask_in_background():
                await trio.sleep(pause)
                pause = min(2 * pause, _PAUSE_MAX_S)
        if self._probing is scope:
            self._probing = None

    def _stop_probing(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            self._probing = None

    async def _ask_in_background(self) -> bool:
        """Ask once; returns whether there is no need to ask again."""
        try:
            status = await self.link.status(trio.current_time() + self.config.call_s)
        except AgentError:  # traced; it is of interest as long as nobody ever answered
            return self.asked
        if not self._busy and self.link.begun is None:
            self._judge(status)
            await self.link.close()
        return True

    @property
    def _busy(self) -> bool:
        return self.state is not DeviceState.RUNNING or self.truth is not Truth.KNOWN

    def _judge(self, status: Status) -> None:
        """Take what the agent says about a function that no migration of ours is about."""
        self.asked = True
        found = verdict(status)
        self.fenced = found is Verdict.FENCED
        self._paused = found is Verdict.PAUSED
        if found is Verdict.FREE:
            return
        self.tracer.note("the function does not run", agent_state=status.state.value, verdict=found.value)
        if self.actions.device is not None:
            # A client came before we knew: the function is of no use to it until this is done.
            self._settle(Goal.RESET if self.fenced else Goal.RESUME)

    async def attach(self, device: Device) -> None:
        """Make the function fit for a new client, before its first reply.

        Args:
            device: the device as opened for the client.

        Raises:
            BackendUnavailable: the function must not run before it was reset, and that cannot be done now.
        """
        await self._running.wait()
        deadline = message_deadline()
        async with self._lock:
            self._stop_probing()
            self.actions.device = device
            try:
                await self._free(deadline)
            except (AgentError, VfioUserError) as error:
                self.actions.device = None
                raise BackendUnavailable(
                    f"the function was stopped for a migration and cannot be reset now: {error}"
                ) from error
        assert self._nursery is not None
        self._nursery.start_soon(self._probe)

    async def _free(self, deadline: float) -> None:
        """Ask, if there is any doubt that the function runs, and reset it if it must not go on."""
        if not (self._busy or self.fenced or self._paused) and self.asked:
            return
        if not self._busy and not self.asked:
            with trio.move_on_at(min(deadline, trio.current_time() + self.config.call_s)):
                await self._ask_first()
            if not self.asked:  # the agent is away; what it stopped stays stopped, and the client gets to know later
                return
        if self.truth is Truth.UNKNOWN and not self.fenced:
            with trio.move_on_at(trio.current_time() + (deadline - trio.current_time()) * _FORWARD):
                await self._settled.wait()
        if self._paused and not self._busy:
            await self.actions.resume(deadline)
            self._paused = False
            await self.link.close()
        if self.fenced or self._busy:
            self._stop_settling()
            self.work.drop_pipelines()
            try:
                await self.actions.reset_agent(deadline)
            except AgentError:
                self.fenced = True
                raise
            await self.actions.reset_device(deadline)
            self._now(DeviceState.RUNNING, "reset for a new client")

    async def _ask_first(self) -> None:
        try:
            status = await self.link.status(trio.current_time() + self.config.call_s)
        except AgentError:
            return
        self.asked = True
        found = verdict(status)
        self.fenced = found is Verdict.FENCED
        self._paused = found is Verdict.PAUSED
        if found is Verdict.FREE:
            await self.link.close()

    async def detach(self, *, logged: bool) -> None:
        """The client has gone: bring a source back that it did not take, fence what may live elsewhere.

        Args:
            logged: the agent logs dirty pages that nobody will ask for any more.
        """
        async with self._lock:
            self.actions.device = None
            self.after_agent_reset = None
            if self._nursery is None:
                return
            handed, loading = self.work.trailer_handed, self.work.destination is not None or self.work.committed
            self.work.drop_pipelines()
            if logged:
                self._nursery.start_soon(self._stop_logging)
            if self.state is DeviceState.RUNNING and self.truth is Truth.KNOWN:
                await self._let_go()
            elif handed or loading or self.truth is Truth.FAILED:
                # Whoever has the state may run it; only a reset gives this function back.
                self._stop_settling()
                self.fenced = True
                self.tracer.note("the function stays stopped until it is reset for its next client")
                await self.link.close(force=True)
            elif self.state is DeviceState.PRE_COPY and self.truth is Truth.KNOWN:
                self._leave_later()
                self._now(DeviceState.RUNNING, "the client has gone")
            elif self.truth is Truth.KNOWN:
                self._settle(Goal.RESUME)
            self.owner = None

    async def _let_go(self) -> None:
        """A function that runs and has no client needs no session."""
        assert self._nursery is not None
        if self.link.begun is not None:
            self._leave_later()
        else:
            await self.link.close(force=True)

    async def _stop_logging(self) -> None:
        try:
            deadline = trio.current_time() + self.config.call_s
            await self.link.call("dirty_stop", lambda session: session.dirty_stop(), deadline)
        except AgentError:  # traced; the next start ends it first
            pass
        if not self._busy:
            await self.link.close()

    def _leave_later(self, outcome: Outcome = Outcome.CANCELLED) -> None:
        """End what was begun at the agent, in the background, since the function runs in any case."""
        assert self._nursery is not None
        if self.link.begun is not None and self._leaving is None:
            self._leaving = trio.CancelScope()
            self._nursery.start_soon(self._leave, outcome, self._leaving)

    async def _leave(self, outcome: Outcome, scope: trio.CancelScope) -> None:
        pause = self.config.retry_s
        with scope:
            while self.link.begun is not None:
                try:
                    await self.link.leave(outcome, trio.current_time() + self.config.call_s, abort=True)
                except AgentError as error:  # traced; the migration is left when the agent is back
                    if error.fatal:
                        break
                    await trio.sleep(pause)
                    pause = min(2 * pause, _PAUSE_MAX_S)
            if self.actions.device is None:
                await self.link.close()
        if self._leaving is scope:
            self._leaving = None

    def _stop_leaving(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    async def settle(self) -> None:
        """Wait until nothing is left to be brought back; for an orderly end of the daemon."""
        await self._settled.wait()

    # What the client asks for

    async def request(self, plan: Callable[[DeviceState], Sequence[Arc]], owner: Owner) -> None:
        """Change the state.

        Args:
            plan: the arcs that lead from a state to where the client wants to be.
            owner: the generation that asks.

        Raises:
            CommandError: illegal, or it failed; the state that is read afterwards is the truth.
        """
        deadline = message_deadline()
        async with self._lock:
            await self._require_known(deadline)
            self._stop_probing()
            self._stop_leaving()
            self.require_owner(owner, "a state change")
            origin = self.state
            now = trio.current_time()
            forward = now + (deadline - now) * _FORWARD
            for arc in plan(self.state_shown):
                await self._travel(arc, origin, forward, deadline)
                if self.state is not DeviceState.RUNNING:
                    self.owner = owner

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

    async def _require_known(self, deadline: float) -> None:
        if self.truth is Truth.UNKNOWN:
            now = trio.current_time()
            with trio.move_on_at(now + (deadline - now) * _FORWARD):
                await self._settled.wait()
            if self.truth is Truth.UNKNOWN:
                raise CommandError("what the function does is not known: its agent does not answer", errno.EIO)

    async def _travel(self, arc: Arc, origin: DeviceState, forward: float, deadline: float) -> None:
        plan = ARCS[arc.source, arc.target]
        name = f"{arc.source.name} → {arc.target.name}"
        try:
            with self.tracer.step("arc", arc=name):
                await travel(plan, self.actions.table, self._bounds, forward)
        except StepFailed as failure:
            await self._undo(plan.undo, origin, failure, deadline)
            raise CommandError(f"{name} failed at {failure}; the state is {self._shown}", failure.errno) from failure
        except trio.Cancelled:
            self._given_up(plan.undo)
            raise
        self._now(arc.target, "as the client asked")

    @property
    def _shown(self) -> str:
        return self.state.name if self.truth is Truth.KNOWN else self.truth.value

    def _given_up(self, undo: Undo) -> None:
        """The client vanished, or its time was up, in the middle of a step."""
        if undo is Undo.LOAD_FAILED:
            self._fail_load("it was given up while it was applied")
        elif undo is Undo.LEAVE and self.state is DeviceState.RUNNING:
            self._back_to_running("the client gave up")
        else:
            self._settle(self._goal(undo))

    def _goal(self, undo: Undo) -> Goal:
        """What to work for in the background; a function whose state may live elsewhere is only asked about."""
        if undo is Undo.LEARN and not (self.work.trailer_handed or self.work.committed):
            return Goal.RESUME
        return _GOALS[undo]

    async def _undo(self, undo: Undo, origin: DeviceState, failure: StepFailed, deadline: float) -> None:
        """Do what a failed arc leaves to be done, in what is left of the message's time."""
        if failure.device_failed:
            self._fail_device(str(failure))
            return
        if undo is Undo.LOAD_FAILED:
            self._fail_load(str(failure))
            return
        try:
            await _UNDOING[undo](self, origin, failure, deadline)
        except AgentError as error:
            if error.fate is Fate.FAILED:
                self._fail_device(str(error))
            else:
                self._settle(self._goal(undo))
        except trio.Cancelled:
            self._given_up(undo)
            raise

    async def _undo_resume(self, origin: DeviceState, failure: StepFailed, deadline: float) -> None:
        source = self.work.source
        await self.actions.resume(deadline)
        if origin is DeviceState.PRE_COPY and source is not None:
            # It ran again in between, so what was saved so far need not fit what comes: begin anew.
            source.restart(await self.actions.describe(deadline))
            self._now(DeviceState.PRE_COPY, f"brought back: {failure}")
        else:
            self._back_to_running(f"brought back: {failure}")

    async def _undo_leave(self, origin: DeviceState, failure: StepFailed, deadline: float) -> None:
        self.work.drop_pipelines()
        if origin in _RUNS and self.state is DeviceState.STOP:
            await self.actions.resume(deadline)
            self._back_to_running(f"brought back: {failure}")
        elif self.state is DeviceState.RUNNING:
            self._back_to_running(str(failure))
        else:
            self._leave_later(Outcome.FAILED)

    async def _undo_reset(self, origin: DeviceState, failure: StepFailed, deadline: float) -> None:
        self.work.drop_pipelines()
        await self.actions.reset_agent(deadline)
        await self._agent_was_reset(deadline)
        if origin in _RUNS:
            self._back_to_running(f"reset: {failure}")
        else:
            await self.actions.stop(deadline)

    async def _undo_learn(self, origin: DeviceState, failure: StepFailed, deadline: float) -> None:
        status = await self.link.status(deadline)
        if failure.unclear and status.state is not AgentState.RUNNING:
            self._settle(self._goal(Undo.LEARN))  # what was asked for may still be under way
        else:
            self._adopt(status)

    def _back_to_running(self, why: str) -> None:
        self.work.drop_pipelines()
        self._now(DeviceState.RUNNING, why)
        self._leave_later()

    def _adopt(self, status: Status) -> None:
        """Make the agent's word the truth."""
        state = AS_STATE[status.state]
        if state is DeviceState.ERROR:
            self._fail_device(status.detail or "the agent says that the function is in ERROR")
        elif state is DeviceState.RUNNING:
            self._back_to_running("the agent says that it runs")
        elif self.state in (DeviceState.RUNNING, DeviceState.PRE_COPY, DeviceState.RESUMING):
            self._now(state, "the agent says so")
        else:
            self._now(self.state, "the agent says so")

    def _now(self, state: DeviceState, why: str) -> None:
        """The function is in this state: known."""
        old, self.state = self.state, state
        self.truth = Truth.KNOWN
        self._settled.set()
        if state is DeviceState.RUNNING:
            self._leave_later(Outcome.SUCCESS if self.work.committed else Outcome.CANCELLED)
            self.owner = None
            self.fenced = False
            self.asked = True
            self.work.trailer_handed = self.work.committed = False
        if state is not old:
            self.tracer.state(old.name, state.name, why)

    def _fail_device(self, why: str) -> None:
        self.work.drop_pipelines()
        self._stop_settling()
        self.truth = Truth.FAILED
        self.tracer.state(self.state.name, "ERROR", why)

    def _fail_load(self, why: str) -> None:
        """A load that failed stays RESUMING: nothing else is true, and only a reset leads out."""
        if self.work.destination is not None and self.work.destination.failure is None:
            self.work.destination.failure = why

    # Finding out

    def _settle(self, goal: Goal) -> None:
        """Find out in the background, and work for the goal until it is reached."""
        assert self._nursery is not None
        self._stop_settling()
        self.truth = Truth.UNKNOWN
        self._settled = trio.Event()
        self._settling = trio.CancelScope()
        self._nursery.start_soon(self._settle_until_done, goal, self._settling, self._settled)

    def _stop_settling(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None

    async def _settle_until_done(self, goal: Goal, scope: trio.CancelScope, settled: trio.Event) -> None:
        pause = self.config.retry_s
        try:
            with scope:
                while not await self._try_settle(goal):
                    await trio.sleep(pause)
                    pause = min(2 * pause, _PAUSE_MAX_S)
        finally:
            settled.set()

    async def _try_settle(self, goal: Goal) -> bool:
        """Make one attempt; returns whether the truth is known now."""
        try:
            deadline = trio.current_time() + self.config.stop_s
            if goal is Goal.LEARN:
                status = await self.link.status(deadline)
                if status.pending:
                    return False
                self._adopt(status)
            elif goal is Goal.RESUME:
                await self.actions.resume(deadline)
                self._back_to_running("brought back")
            else:
                await self.actions.reset_agent(deadline)
                await self.actions.reset_device(deadline)
                await self._agent_was_reset(deadline)
                self._back_to_running("reset")
            if self.actions.device is None and not self._busy:
                await self.link.close()
        except AgentError as error:
            if error.fate is not Fate.FAILED:
                return False
            self._fail_device(str(error))
        except VfioUserError as error:
            self.tracer.note("the device could not be reset", error=str(error))
            return False
        return True

    async def state_now(self) -> DeviceState:
        """The state for a client that asks by message: the truth, or ERROR if not even `status` tells it."""
        if self.truth is Truth.FAILED:
            return DeviceState.ERROR
        if self.truth is Truth.KNOWN:
            return self.state
        try:
            status = await self.link.status(message_deadline())
        except AgentError:
            return self.state_shown if self._settled.is_set() else DeviceState.ERROR
        return self.state_shown if self._settled.is_set() else AS_STATE[status.state]

    @property
    def state_shown(self) -> DeviceState:
        """The state for a client that must never see an error that may pass: the old one while the truth is unknown."""
        return DeviceState.ERROR if self.truth is Truth.FAILED else self.state

    def plan_for(self, target: int) -> Callable[[DeviceState], Sequence[Arc]]:
        """The arcs to a state of the v2 generation, as `request` takes them."""

        return lambda current: require_path(current, target, precopy=self.config.precopy)

    # Resets

    async def reset(self) -> None:
        """DEVICE_RESET: always the device, and the agent if there is any doubt that the function runs."""
        deadline = message_deadline()
        if not self._busy:
            if self.link.begun is not None:
                await self._clear_agent(deadline)
            await self.actions.reset_device(deadline)
            return
        async with self._lock:
            await self._reset_through_agent(deadline, device=True)

    async def _clear_agent(self, deadline: float) -> None:
        """Reset an agent that has not left the migration of a function that runs; else it is told to later."""
        now = trio.current_time()
        self._stop_leaving()
        try:
            await self.actions.reset_agent(now + (deadline - now) * _FORWARD)
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
            if self.state is DeviceState.PRE_COPY and self.truth is Truth.KNOWN and source is not None:
                try:
                    source.restart(await self.actions.describe(deadline))
                except AgentError as error:
                    raise CommandError(f"the stream could not begin anew: {error}", error.errno) from error
                await self._agent_was_reset(deadline)
            else:
                await self._reset_through_agent(deadline, device=False)

    async def _reset_through_agent(self, deadline: float, *, device: bool) -> None:
        self._stop_settling()
        self._stop_leaving()
        self.work.drop_pipelines()
        try:
            await self.actions.reset_agent(deadline)
        except AgentError as error:
            self._settle(Goal.RESET)
            raise CommandError(f"the function could not be reset: {error}", error.errno) from error
        except trio.Cancelled:
            self._settle(Goal.RESET)
            raise
        if device:
            await self.actions.reset_device(deadline)
        self._now(DeviceState.RUNNING, "reset")
        await self._agent_was_reset(deadline)

    async def _agent_was_reset(self, deadline: float) -> None:
        if self.after_agent_reset is not None:
            await self.after_agent_reset(deadline)


_GOALS: Mapping[Undo, Goal] = {
    Undo.RESUME: Goal.RESUME,
    Undo.RESET: Goal.RESET,
    Undo.LEARN: Goal.LEARN,
    Undo.LEAVE: Goal.RESUME,
}
_UNDOING = {
    Undo.RESUME: MigrationEngine._undo_resume,
    Undo.LEAVE: MigrationEngine._undo_leave,
    Undo.RESET: MigrationEngine._undo_reset,
    Undo.LEARN: MigrationEngine._undo_learn,
}
