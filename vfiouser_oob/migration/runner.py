"""Carries out what the machine asks for: one per function, which lives as long as the function.

The record is what is known, `feed` is the only place that changes it. An errand's steps are taken one after the other,
each with its part of the message's time; what nobody waits for is done by jobs in the background.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import trio

from vfiouser_agents.api import Agent, Outcome, Status
from vfiouser_agents.api import Event as AgentEvent
from vfiouser_agents.errors import AgentError, Unsupported
from vfiouser_agents.operations import Operation
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.devices.base import BackendUnavailable, ResetKind
from vfiouser_oob.devices.resets import RESETS, MigrationEffect
from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.attached_device import AttachedDevice
from vfiouser_oob.migration.backoff import WAITING_PAUSE_MAX_S, Backoff, agent_is_away, failure_of, persist, until_done
from vfiouser_oob.migration.fence import AS_STATE, maybe_migrated
from vfiouser_oob.migration.hearing import StatusListener
from vfiouser_oob.migration.host import Background, BackgroundJob
from vfiouser_oob.migration.inherited import MigrationNotes, StreamMark, worth_noting
from vfiouser_oob.migration.machine import advance
from vfiouser_oob.migration.message_time import MessageTime, message_deadline
from vfiouser_oob.migration.ownership import require_owner
from vfiouser_oob.migration.plans import PAUSES, PLANS, Again, Do, FailureOutcome, TimeAllotment, arc_name
from vfiouser_oob.migration.record import Certainty, MigrationRecord, Owner
from vfiouser_oob.migration.sharing import BufferShare
from vfiouser_oob.migration.step_times import NEVER, StepTimes
from vfiouser_oob.migration.steps import Steps
from vfiouser_oob.migration.trace import Tracer
from vfiouser_oob.migration.watch import MigrationWatch
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.observability.status import MigrationEntry
from vfiouser_oob.persist.capabilities import READ_S, Facts, FunctionCapabilities
from vfiouser_oob.persist.history import FunctionHistory
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError, VfioUserError
from vfiouser_protocol.migration_v2 import Arc


class MigrationRunner:
    """The migration of one function.

    Args:
        name: the function's name.
        agent: its agent; entered and left by the caller.
        function_id: the agent's name for it.
        config: its migration settings.
        events: where changes are announced.
        log: a logger with the function's fields.
        memory: where the agent's capabilities are kept beyond the daemon's end; None: nowhere.
        sharing: with whom memory for state is shared; a daemon has one for all its functions.
        history: where migrations that are over are kept; None: nowhere.
        notes: takes the record down for the daemon after this one; None: nobody does.
        left: what the daemon before this one has left of a client's migration; None: nothing.
        probes: what functions of the same agent take turns by when they ask where they are.
    """

    def __init__(
        self,
        name: str,
        agent: Agent,
        function_id: str,
        config: MigrationConfig,
        events: EventHub,
        log: Logger,
        memory: FunctionCapabilities | None = None,
        sharing: BufferShare | None = None,
        history: FunctionHistory | None = None,
        notes: MigrationNotes | None = None,
        left: MigrationRecord | None = None,
        probes: trio.CapacityLimiter | None = None,
    ) -> None:
        self.config = config
        self._probes = probes or trio.CapacityLimiter(1)
        self.memory = memory
        self.history = history
        self._watch = MigrationWatch(name)
        self._notes = notes
        #: What is gone on with when its client is.
        self._left = left
        self.record = left or MigrationRecord()
        self.background = Background()
        self.tracer = Tracer(name, events, log)
        self.link = AgentLink(agent, function_id, self.tracer, self)
        self.steps = Steps(self.link, config, self.tracer, self, sharing or BufferShare())
        self._lock = trio.Lock()
        self._hearing = StatusListener(self, self.link, self.tracer, config, self._lock)
        self._changed = trio.Event()
        self._hurry = trio.Event()
        self._running = trio.Event()
        self._settling, self._leaving, self._probing = (BackgroundJob(self.background) for _ in range(3))
        self._times = StepTimes(config, self.link)
        self._effects: Mapping[type[ev.Effect], Callable[[Any], None]] = {
            ev.Settle: lambda _: self._settling.begin(self._settle),
            ev.Cease: lambda _: self._settling.cancel(),
            ev.Leave: lambda effect: self._leaving.begin(partial(self._leave, effect.outcome)),
            ev.CeaseLeaving: lambda _: self._leaving.cancel(),
            ev.Probe: lambda _: self._probing.begin(self._probe),
            ev.CeaseProbing: lambda _: self._probing.cancel(),
            ev.Drop: lambda _: self.steps.drop_pipelines(),
            ev.HaltSource: lambda _: self.steps.halt_source(),
            ev.ReleaseSource: lambda _: self.steps.release_source(),
            ev.LetGo: lambda effect: self.link.close(force=effect.force),
            ev.StopLogging: self._stop_logging_later,
            ev.Tell: lambda effect: self.tracer.state(effect.old, effect.new, effect.why),
            ev.Note: lambda effect: self.tracer.note(effect.text, **effect.fields),
        }

    async def run(self) -> None:
        """Run the tasks; runs as long as the function does."""
        if self.memory is not None:
            self.link.facts = await self.memory.recall()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.background.run)
            if self.history is not None:
                nursery.start_soon(self.history.run)
            nursery.start_soon(self._hearing.listen)
            self._running.set()
            if self._left is None:
                self._probing.begin(self._probe)

    async def ready(self) -> None:
        """Wait until what was remembered is known, as far as the disk answers in time."""
        with trio.move_on_after(2 * READ_S):
            await self._running.wait()

    # The machine

    def feed(self, event: ev.MigrationEvent) -> ev.Take | ev.Answer | None:
        """Take an event, and do what it asks for.

        Args:
            event: what has happened.

        Returns:
            What an errand needs next, if that has changed.
        """
        before, now = self.record, time.time()
        self.record, effects = advance(before, event, now)
        entry = self._watch.follow(before, self.record, now)
        if entry is not None:
            self._finished(entry)
        moved = isinstance(event, ev.Moved)  # which nobody waits for
        if self._notes is not None and (not moved or worth_noting(before, self.record)):
            self._notes.migration(self.record)
        if not moved:
            self._changed.set()
            self._changed = trio.Event()
        due: ev.Take | ev.Answer | None = None
        for effect in effects:
            if isinstance(effect, ev.Take | ev.Answer):
                due = effect
            else:
                self._effects[type(effect)](effect)
        return due

    def _finished(self, entry: MigrationEntry) -> None:
        """A migration is over: tell of it, and keep it."""
        self.tracer.finished(entry)
        if self.history is not None:
            self.history.add(entry)

    async def _until(self, wanted: Callable[[], bool]) -> None:
        while not wanted():
            await self._changed.wait()

    async def _carry_out(self, event: ev.MigrationEvent, message: MessageTime) -> None:
        """Feed what the client asks for, and take the steps that it needs.

        Raises:
            CommandError: it failed; the state that is read afterwards is the truth.
        """
        due = self.feed(event)
        while isinstance(due, ev.Take):
            errand = self.record.errand
            assert errand is not None
            if PLANS[errand.plan].fall is FailureOutcome.ARC:
                due = await self._travel(errand.plan, due, message)
            else:
                due = self.feed(await self._take(due, message))
        if due is not None and due.text is not None:
            raise CommandError(due.text, due.errno)

    async def _travel(self, arc: str, due: ev.Take, message: MessageTime) -> ev.Take | ev.Answer | None:
        """Take the steps of an arc, as one traced step."""
        following: ev.Take | ev.Answer | None = due
        try:
            with self.tracer.step("arc", arc=arc) as span:
                span.bytes = self.steps.moved
                while isinstance(following, ev.Take) and self.record.errand and self.record.errand.plan == arc:
                    outcome = await self._take(following, message)
                    step = following.step
                    following = self.feed(outcome)
                    left = self.record.errand is None or self.record.errand.plan != arc
                    if left and isinstance(outcome, ev.StepRefused):
                        raise _ArcFailed(f"{step.do.value}: {outcome.failure}")
        except _ArcFailed:  # it is traced; what follows is known
            pass
        return following

    async def _take(self, due: ev.Take, message: MessageTime) -> ev.StepTaken | ev.StepRefused:
        """Take a step, attempting again what is worth it; given up, that is fed before the cancellation goes on."""
        step = due.step
        until = NEVER if step.again is Again.NOTHING else self._times.patience(due, message)
        try:
            said = await persist(
                lambda: self.steps.take(step.do, self._times.deadline(due, message)),
                Backoff(self.config.retry_s, WAITING_PAUSE_MAX_S, until),
                agent_is_away,
            )
        except (AgentError, VfioUserError) as error:
            if isinstance(error, Unsupported) and due.manner is TimeAllotment.ATTACHING and step.do is Do.ASK:
                self.feed(ev.Blocked(str(error)))
            return ev.StepRefused(failure_of(error))
        except trio.Cancelled:
            if due.manner is not TimeAllotment.BACKGROUND:  # whose goal stands
                self.feed(ev.Abandoned())
            raise
        if isinstance(said, Status):
            return ev.StepTaken(status=said, migrated=maybe_migrated(said, self.link.caps))
        return ev.StepTaken(did=said is not False)

    # Coming and going of clients

    async def attach(self, device: AttachedDevice) -> None:
        """Make the function fit for a new client, before its first reply.

        Args:
            device: the device as opened for the client.

        Raises:
            BackendUnavailable: the function must not run before it was reset, and that cannot be done now.
        """
        await self._running.wait()
        message = MessageTime.until(message_deadline())
        async with self._lock:
            self._give_up_left()
            self.steps.device = device
            self.feed(ev.ClientCame())
            try:
                with trio.move_on_at(message.forward):
                    await self._until(lambda: self.record.fenced or self._found_out)
                await self._carry_out(ev.FitWanted(), message)
            except CommandError as error:
                raise BackendUnavailable(
                    f"the function was stopped for a migration and cannot be reset now: {error}"
                ) from error
            finally:
                if not self.record.attached:
                    self.steps.device = None

    async def go_on(self, device: AttachedDevice, mark: StreamMark) -> None:
        """Go on with a client that another daemon has served: what is left of its migration is as the client knows it.

        Args:
            device: the device as opened for the client.
            mark: how far the client has come with a state that is being saved.

        Raises:
            BackendUnavailable: the function must not run before it was reset, and that cannot be done now.
        """
        await self._running.wait()
        if self._left is None:
            await self.attach(device)
            return
        message = MessageTime.until(message_deadline())
        async with self._lock:
            self._left = None
            self.steps.device, self.steps.mark = device, mark
            try:
                await self._carry_out(ev.Started(True, mark.taken, mark.whole), message)
            except CommandError as error:
                raise BackendUnavailable(
                    f"the function was stopped for a migration and cannot be reset now: {error}"
                ) from error
            finally:
                if not self.record.attached:
                    self.steps.device = None
            self._hearing.contact_lost()

    async def give_up_left(self) -> None:
        """The client that another daemon has served has gone with that; nothing to do if this one goes on with it."""
        if self._left is not None:
            await self._running.wait()
            async with self._lock:
                self._give_up_left()

    def _give_up_left(self) -> None:
        if self._left is not None:
            self._left = None
            self.feed(ev.Started())
            self.feed(ev.ClientWent(logged=False))
            self._probing.begin(self._probe)

    async def detach(self, *, logged: bool) -> None:
        """The client has gone: bring a source back that it did not take, fence what may live elsewhere.

        Args:
            logged: the agent logs dirty pages that nobody will ask for any more.
        """
        async with self._lock:
            self.steps.device = None
            self.feed(ev.ClientWent(logged))

    def _stop_logging_later(self, effect: ev.StopLogging) -> None:
        self.background.begin(self._stop_logging)

    async def _stop_logging(self) -> None:
        try:
            deadline = trio.current_time() + self.config.call_s
            await self.link.call(Operation.DIRTY_STOP, deadline)
        except AgentError:  # traced; the next start ends it first
            pass
        if not self.record.busy:
            self.link.close()

    # What the client asks for

    async def request(self, plan: Callable[[DeviceState], Sequence[Arc]], owner: Owner, *, p2p: bool = False) -> None:
        """Change the state.

        Args:
            plan: the arcs that lead from a state to where the client wants to be.
            owner: the generation that asks.
            p2p: whether the client calls that state by its P2P name.

        Raises:
            CommandError: illegal, or it failed; the state that is read afterwards is the truth.
        """
        message = MessageTime.until(message_deadline())
        async with self._lock:
            self.feed(ev.TakenOver(under_way=not self.certain))
            await self._require_known(plan, message)
            require_owner(self.record, owner, "a state change")
            arcs = tuple(arc_name(arc.source, arc.target) for arc in plan(self.record.state_shown))
            if arcs:
                await self._carry_out(ev.Requested(arcs, owner), message)
            if self.record.p2p != p2p:
                self.feed(ev.P2pNamed(p2p))

    async def _require_known(self, plan: Callable[[DeviceState], Sequence[Arc]], message: MessageTime) -> None:
        record = self.record
        if record.certainty is not Certainty.UNKNOWN:
            return
        arcs = [arc_name(arc.source, arc.target) for arc in plan(record.state_shown)]
        if record.reset_due and len(arcs) == 1 and arcs[0] in PAUSES:
            return
        with trio.move_on_at(message.again):
            await self._until(lambda: self.settled)
        if self.record.certainty is Certainty.UNKNOWN:
            raise CommandError("the state of the function is unknown: its agent does not answer", errno.EIO)

    async def reset(self) -> None:
        """DEVICE_RESET: always the device, and the agent if there is any doubt that the function runs.

        Raises:
            CommandError: the device cannot be reset, or the agent says that the function is broken for good.
        """
        await self._reset(ev.ResetAsked())

    async def function_reset(self) -> None:
        """The guest has reset the function through configuration space, which the device has done already."""
        if self.steps.device is not None:
            self.steps.device.shadow.clear(keep_addresses=True)
        effect = RESETS[ResetKind.FUNCTION_LEVEL].migration
        await self._reset(ev.GuestReset(restarts=effect is MigrationEffect.RESTARTS))

    async def _reset(self, event: ev.MigrationEvent) -> None:
        message = MessageTime.until(message_deadline())
        async with self._lock:
            await self._carry_out(event, message)

    # What others want to know

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be found out, or nobody does so any more."""
        return self.record.goal is None or not self.background.is_open

    @property
    def certain(self) -> bool:
        """Whether the state is what the function does at this moment, with no call under way that may change it."""
        errand = self.record.errand
        trying = errand is not None and PLANS[errand.plan].manner is TimeAllotment.BACKGROUND
        return self.record.certainty is not Certainty.UNKNOWN and not (trying and not self.link.changing.unsent)

    async def known(self) -> None:
        """Wait until it is known what the function does, and nothing is being done about it."""
        await self._until(lambda: not self.record.awaiting)

    @property
    def _found_out(self) -> bool:
        return self.settled or self.record.certainty is not Certainty.UNKNOWN

    async def settle(self) -> None:
        """Wait until nothing is left to be brought back; for an orderly end of the daemon."""
        await self._until(lambda: self.settled)

    async def state_now(self) -> DeviceState:
        """The state for a client that asks by message: the truth, or ERROR if the agent's answer does not tell it."""
        record = self.record
        if record.certainty is Certainty.FAILED:
            return DeviceState.ERROR
        if self.certain or record.reset_due:
            return record.state
        try:
            status = await self.link.status(message_deadline())
        except AgentError as error:
            # That nobody is there says nothing about the function.
            return self.record.state_shown if self.settled or error.unsent else DeviceState.ERROR
        return self.record.state_shown if self.settled else AS_STATE.get(status.state, self.record.state)

    # The background

    async def _settle(self) -> None:
        """Work for the record's goal until it is reached."""
        pauses = Backoff(self.config.retry_s)
        while self.record.goal is not None:
            await self._attempt(MessageTime.until(trio.current_time() + self.config.stop_s))
            if self.record.goal is not None:
                self._hurry = trio.Event()
                await pauses.pause(self._hurry)

    async def _attempt(self, message: MessageTime) -> None:
        due = self.feed(ev.AttemptDue())
        while isinstance(due, ev.Take):
            errand = self.record.errand
            outcome = await self._take(due, message)
            if self.record.errand is not errand:  # somebody else has taken over
                return
            due = self.feed(outcome)

    async def _leave(self, outcome: Outcome) -> None:
        """End what was begun at the agent; a migration is left when the agent is back."""

        async def left() -> bool:
            try:
                await self.link.leave(outcome, trio.current_time() + self.config.call_s, abort=True)
            except AgentError as error:  # traced
                return error.fatal
            return True

        await until_done(left, Backoff(self.config.retry_s))
        if not self.record.attached:
            self.link.close()

    async def _probe(self) -> None:
        """Ask the agent where the function is; what the client wants goes first."""

        async def asked() -> bool:
            async with self._probes:
                if self.record.busy or self.record.begun is not None:
                    return True
                try:
                    status = await self.link.status(trio.current_time() + self.config.call_s)
                except Unsupported as error:
                    self.feed(ev.Blocked(str(error)))  # the next client's attach asks again
                    return True
                except AgentError:  # traced; it is of interest as long as nobody ever answered
                    return self.record.asked
                self.feed(ev.Probed(status, maybe_migrated(status, self.link.caps)))
                return True

        await until_done(asked, Backoff(self.config.retry_s))

    # What the link tells

    def learned(self, facts: Facts) -> None:
        """The agent has said what it can do."""
        if self.memory is not None:
            self.background.begin(self.memory.remember, facts)

    def heard(self, event: AgentEvent) -> None:
        """The agent has told something without being asked."""
        if self._hearing.heard(event):
            self._hurry.set()

    def contact_lost(self) -> None:
        """A session was lost."""
        self._hearing.contact_lost()


class _ArcFailed(Exception):
    """A step of an arc was refused, which ends its trace."""
