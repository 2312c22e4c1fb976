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
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

import trio

from vfiouser_agents.api import Agent, AgentState, Outcome, Status
from vfiouser_agents.errors import AgentError, Fate, Unsupported
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.migration.actions import Device
from vfiouser_oob.migration.arcs import AHEAD, ARCS, HALT, Do, MessageTime, Step, StepFailed, Undo, travel
from vfiouser_oob.migration.backoff import WAITING_PAUSE_MAX_S, Backoff, agent_is_away, persist
from vfiouser_oob.migration.fence import Verdict, verdict
from vfiouser_oob.migration.resetting import Resetting
from vfiouser_oob.migration.standing import Goal, Owner, Truth, message_deadline
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.persist.capabilities import READ_S, Drawer
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError, VfioUserError
from vfiouser_protocol.migration_v2 import Arc, require_path

_RUNS = (DeviceState.RUNNING, DeviceState.PRE_COPY)


class MigrationEngine(Resetting):
    """The migration of one function; lives as long as the function.

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
        super().__init__(name, agent, function_id, config, events, log, memory)
        self._running = trio.Event()
        self._probing: trio.CancelScope | None = None
        #: Found paused with its VM, by a daemon before us.
        self._paused = False

    async def run(self) -> None:
        """Run the engine's tasks; runs as long as the function does."""
        async with trio.open_nursery() as nursery:
            if self.memory is not None:
                self.link.facts = await self.memory.recall()
            self._nursery = self.actions.nursery = self.link.nursery = nursery
            self._running.set()
            nursery.start_soon(self._listen)
            nursery.start_soon(self._probe)
            try:
                await trio.sleep_forever()
            finally:
                # Here, since clients may still be going when the nursery takes no more tasks.
                self._nursery = self.actions.nursery = self.link.nursery = None

    async def ready(self) -> None:
        """Wait until what was remembered is known, as far as the disk answers in time."""
        with trio.move_on_after(2 * READ_S):
            await self._running.wait()

    # Coming and going of clients

    async def _probe(self) -> None:
        """Ask the agent where the function is, in the background; what the client wants goes first."""
        if self._probing is not None or self._busy or self.link.begun is not None:
            return
        pauses = Backoff(self.config.retry_s)
        with trio.CancelScope() as scope:
            self._probing = scope
            while not await self._ask_in_background():
                await pauses.pause()
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
        except Unsupported as error:
            self._block(error)  # traced; the next client's attach asks again
            return True
        except AgentError:  # traced; it is of interest as long as nobody ever answered
            return self.asked
        self.blocked = None
        if not self._busy and self.link.begun is None:
            self._judge(status)
            await self.link.close()
        return True

    def _block(self, error: Unsupported) -> None:
        """Note what keeps the function from being migrated until somebody changes it; that is told once."""
        if self.blocked != str(error):
            self.blocked = str(error)
            self.tracer.note("the function cannot be migrated", reason=self.blocked)

    def _judge(self, status: Status) -> None:
        """Take what the agent says about a function that no migration of ours is about."""
        self.asked = True
        found = verdict(status, self.link.caps)
        self.fenced = found is Verdict.FENCED
        self._paused = found is Verdict.PAUSED
        if found is Verdict.FREE:
            return
        self.tracer.note("the function does not run", agent_state=status.state.value, verdict=found.value)
        if self.actions.device is not None:
            # A client came before we knew: the function is of no use to it until this is done.
            self._settle(Goal.RESET if self.fenced else Goal.RESUME, f"the agent says {status.state.value}")

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
        if self._nursery is not None:
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
            with trio.move_on_at(MessageTime.until(deadline).forward):
                await self._settled.wait()
        if self._paused and not self._busy:
            await persist(lambda: self.actions.resume(deadline), self._whole(deadline), agent_is_away)
            self._paused = False
            await self.link.close()
        if self.fenced or self._busy:
            self._stop_settling()
            self.work.drop_pipelines()
            try:
                await persist(lambda: self.actions.reset_agent(deadline), self._whole(deadline), agent_is_away)
            except AgentError:
                self.fenced = True
                raise
            await self.actions.reset_device(deadline)
            self._now(DeviceState.RUNNING, "reset for a new client")

    def _whole(self, deadline: float) -> Backoff:
        """Pauses for all of the time: without the agent a client that comes now is turned away."""
        return Backoff(self.config.retry_s, WAITING_PAUSE_MAX_S, MessageTime.until(deadline).again)

    async def _ask_first(self) -> None:
        try:
            status = await self.link.status(trio.current_time() + self.config.call_s)
        except Unsupported as error:
            self._block(error)
            return
        except AgentError:
            return
        self.asked, self.blocked = True, None
        found = verdict(status, self.link.caps)
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
            if self.paused_over_link:
                self._unpause("the client has gone")
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
                self._settle(Goal.RESUME, "the client has gone")
            self.owner = None

    async def _let_go(self) -> None:
        """A function that runs and has no client needs no session."""
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

    # What the client asks for

    async def request(self, plan: Callable[[DeviceState], Sequence[Arc]], owner: Owner) -> None:
        """Change the state.

        Args:
            plan: the arcs that lead from a state to where the client wants to be.
            owner: the generation that asks.

        Raises:
            CommandError: illegal, or it failed; the state that is read afterwards is the truth.
        """
        time = MessageTime.until(message_deadline())
        async with self._lock:
            self._take_over()
            await self._require_known(plan, time)
            self._stop_probing()
            self._stop_leaving()
            self.require_owner(owner, "a state change")
            origin = self.state
            arcs = plan(self.state_shown)
            for arc, after in zip_longest(arcs, arcs[1:]):
                runs = arc.source is DeviceState.RUNNING and after is not None
                await self._go(arc, origin, time, AHEAD.get(after.target) if runs else None, last=after is None)
                if self.state is not DeviceState.RUNNING:
                    self.owner = owner

    async def _require_known(self, plan: Callable[[DeviceState], Sequence[Arc]], time: MessageTime) -> None:
        if self.truth is not Truth.UNKNOWN or (self.reset_due and _is_pause(plan(self.state_shown))):
            return
        with trio.move_on_at(time.again):
            await self._settled.wait()
        if self.truth is Truth.UNKNOWN:
            raise CommandError("what the function does is not known: its agent does not answer", errno.EIO)

    async def _go(self, arc: Arc, origin: DeviceState, time: MessageTime, ahead: Do | None, *, last: bool) -> None:
        """Take an arc: without the agent where it is not needed, or away and can be done without."""
        pause = last and _is_pause([arc])
        if self.reset_due and pause:
            # It holds still in any case, and nothing of the guest reaches it.
            self._pause_over_link("its agent is away") if arc.target is DeviceState.STOP else self._unpause("as asked")
        elif self.paused_over_link and arc.target is DeviceState.RUNNING:
            self._unpause("as the client asked")
        else:
            if self.paused_over_link:
                await self._halt(origin, time)
            await self._travel(arc, origin, time, ahead, pause=pause)

    def _pause_over_link(self, why: str) -> None:
        """A VM that is paused asks nothing of its function, which goes on with what it was asked before."""
        if self.truth is Truth.KNOWN:
            self._now(DeviceState.STOP, f"paused without its agent: {why}", over_link=True)
        else:
            self.state, self.paused_over_link = DeviceState.STOP, True

    def _unpause(self, why: str) -> None:
        if self.truth is Truth.KNOWN:
            self._now(DeviceState.RUNNING, why)
        else:
            self.state, self.paused_over_link, self.owner = DeviceState.RUNNING, False, None

    async def _halt(self, origin: DeviceState, time: MessageTime) -> None:
        """Really stop a function that its VM has paused without it."""
        try:
            await travel(HALT, self.actions.table, self._bounds, time, self.config.retry_s)
        except StepFailed as failure:
            if failure.device_failed:
                self._fail_device(str(failure))
            elif failure.touched:
                self._settle(Goal.RESUME, str(failure))
            raise CommandError(f"it could not be stopped at {failure}; it is {self._shown}", failure.errno) from failure
        except trio.Cancelled:
            self._settle(Goal.RESUME, "it was given up")
            raise
        self._now(DeviceState.STOP, "stopped by its agent")

    async def _travel(self, arc: Arc, origin: DeviceState, time: MessageTime, ahead: Do | None, *, pause: bool) -> None:
        plan = ARCS[arc.source, arc.target]
        if ahead is not None:
            plan = replace(plan, steps=(Step(ahead), *plan.steps))
        name = f"{arc.source.name} → {arc.target.name}"
        stops = pause and arc.target is DeviceState.STOP
        try:
            with self.tracer.step("arc", arc=name) as span:
                span.bytes = self.moved
                chosen = time.once() if stops and self._long_away(time.end) else time
                await travel(plan, self.actions.table, self._bounds, chosen, self.config.retry_s)
        except StepFailed as failure:
            if stops and failure.not_reached and not failure.touched:
                self._pause_over_link(str(failure))
                return
            await self._undo(plan.undo, origin, failure, time.end)
            raise CommandError(f"{name} failed at {failure}; the state is {self._shown}", failure.errno) from failure
        except trio.Cancelled:
            self._given_up(plan.undo)
            raise
        self._now(arc.target, "as the client asked")

    def _given_up(self, undo: Undo) -> None:
        """The client vanished, or its time was up, in the middle of a step."""
        if undo is Undo.LOAD_FAILED:
            self._leave_load("it was given up while it was applied")
        elif undo is Undo.LEAVE and self.state is DeviceState.RUNNING:
            self._back_to_running("the client gave up")
        else:
            self._settle(self._goal(undo), "it was given up")

    async def _undo(self, undo: Undo, origin: DeviceState, failure: StepFailed, deadline: float) -> None:
        """Do what a failed arc leaves to be done, in what is left of the message's time."""
        if failure.device_failed:
            self._fail_device(str(failure))
            return
        if undo is Undo.LOAD_FAILED:
            self._leave_load(str(failure))
            return
        undoing = _UNDOING[undo] if failure.touched else _STANDING[undo]
        try:
            await undoing(self, origin, failure, deadline)
        except AgentError as error:
            if error.fate is Fate.FAILED:
                self._fail_device(str(error))
            else:
                sure = error.unsent and not failure.touched
                self._settle(self._goal(undo), f"{failure}; then {error}", sure=sure)
        except trio.Cancelled:
            self._given_up(undo)
            raise

    async def _undo_resume(self, origin: DeviceState, failure: StepFailed, deadline: float) -> None:
        source = self.work.source
        await persist(lambda: self.actions.resume(deadline), self._patience(deadline), agent_is_away)
        if origin is DeviceState.PRE_COPY and source is not None:
            # It ran again in between, so what was saved so far need not fit what comes: begin anew.
            await self.actions.restart_stream(source, deadline, self._patience(deadline))
            self._now(DeviceState.PRE_COPY, f"brought back: {failure}")
        else:
            self._back_to_running(f"brought back: {failure}")

    async def _stand_running(self, origin: DeviceState, failure: StepFailed, deadline: float) -> None:
        """The function was not stopped, so it runs as before."""
        source = self.work.source
        if self.state is DeviceState.PRE_COPY and source is not None:
            source.release()
            self._now(DeviceState.PRE_COPY, f"it was not stopped: {failure}")
        else:
            self._back_to_running(f"it was not stopped: {failure}")

    async def _stand_stopped(self, origin: DeviceState, failure: StepFailed, deadline: float) -> None:
        """The function was not started, so it stands still; if it is allowed, it is brought back in the background."""
        if self._goal(Undo.LEARN) is Goal.RESUME:
            self._settle(Goal.RESUME, str(failure), sure=True)

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
        if status.state is AgentState.QUIESCED or (failure.unclear and status.state is not AgentState.RUNNING):
            self._settle(self._goal(Undo.LEARN), str(failure))  # what was asked for may still be under way
        else:
            self._adopt(status)

    def plan_for(self, target: int) -> Callable[[DeviceState], Sequence[Arc]]:
        """The arcs to a state of the v2 generation, as `request` takes them."""

        return lambda current: require_path(current, target, precopy=self.config.precopy)


def _is_pause(arcs: Sequence[Arc]) -> bool:
    """Whether all that is asked for is that the VM be paused, or go on."""
    return [(arc.source, arc.target) for arc in arcs] in _PAUSES


_PAUSES = (
    [(DeviceState.RUNNING, DeviceState.STOP)],
    [(DeviceState.STOP, DeviceState.RUNNING)],
)
#: What is left to be done by a failed arc that has not touched the function.
_STANDING = {
    Undo.RESUME: MigrationEngine._stand_running,
    Undo.LEAVE: MigrationEngine._undo_leave,
    Undo.RESET: MigrationEngine._undo_leave,
    Undo.LEARN: MigrationEngine._stand_stopped,
}
_UNDOING = {
    Undo.RESUME: MigrationEngine._undo_resume,
    Undo.LEAVE: MigrationEngine._undo_leave,
    Undo.RESET: MigrationEngine._undo_reset,
    Undo.LEARN: MigrationEngine._undo_learn,
}
