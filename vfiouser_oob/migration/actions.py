"""What each step of an arc does: the methods behind the names of `arcs.Do`."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import trio

from vfiouser_agents.api import Outcome, Role, Session
from vfiouser_agents.errors import AgentError, InvalidState, Unsupported
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.devices.base import BackendSession
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.arcs import Action, Do
from vfiouser_oob.migration.backoff import Backoff, agent_is_away, persist
from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_oob.migration.descriptor import decode_descriptor, encode_descriptor, require_similar
from vfiouser_oob.migration.destination import DestinationPipeline
from vfiouser_oob.migration.sharing import Sharing
from vfiouser_oob.migration.source import SourcePipeline
from vfiouser_oob.migration.trace import Tracer
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.errors import CommandError, VfioUserError


@dataclass(slots=True)
class Device:
    """The device as the attached client has it.

    Args:
        session: the backend's session.
        shadow: configuration space as the client wrote it.
        drained: waits until no write of the guest is held back any more; None if none ever is.
    """

    session: BackendSession
    shadow: ConfigShadow
    drained: Callable[[], Awaitable[None]] | None = None


@dataclass(slots=True)
class Work:
    """What a migration under way holds; all of it goes with RUNNING or a reset.

    Args:
        source: the saving side's pipeline.
        destination: the loading side's pipeline.
        trailer_handed: the client has the whole state: this function must not run again unless it says so.
        committed: a state was loaded and applied, so what runs next is the migrated function.
    """

    source: SourcePipeline | None = None
    destination: DestinationPipeline | None = None
    trailer_handed: bool = False
    committed: bool = False

    def drop_pipelines(self) -> None:
        """Stop moving data and forget what is buffered."""
        if self.source is not None:
            self.source.halt()
        if self.destination is not None:
            self.destination.halt()
        self.source = self.destination = None


class Actions:
    """The steps, as methods that take a deadline.

    Args:
        link: the function's agent.
        config: its migration settings.
        tracer: where steps are traced.
    """

    def __init__(self, link: AgentLink, config: MigrationConfig, tracer: Tracer) -> None:
        self._link = link
        self._config = config
        self._tracer = tracer
        self.nursery: trio.Nursery | None = None
        self.device: Device | None = None
        self.work = Work()
        #: With whom memory for state is shared; a daemon has one for all its functions.
        self.sharing = Sharing()
        #: Told why, when the agent says that the function is broken.
        self.device_failed: Callable[[str], None] = lambda why: None
        self.table: Mapping[Do, Action] = {
            Do.FLUSH: self.flush,
            Do.QUIESCE: self.quiesce,
            Do.STOP: self.stop,
            Do.RESUME: self.resume,
            Do.BEGIN_SOURCE: self.begin_source,
            Do.BEGIN_DESTINATION: self.begin_destination,
            Do.OPEN_STREAM: self.open_stream,
            Do.START_STREAM: self.start_stream,
            Do.HOLD_STREAM: self.hold_stream,
            Do.FINISH_STREAM: self.finish_stream,
            Do.DROP_STREAM: self.drop_stream,
            Do.ABORT: self.abort,
            Do.END_CANCELLED: self.end_cancelled,
            Do.END: self.end,
            Do.LOAD_BEGIN: self.load_begin,
            Do.LOAD_COMMIT: self.load_commit,
        }

    # The device

    async def flush(self, deadline: float) -> None:
        """Make sure that what the guest wrote is at the device, not in a socket."""
        assert self.device is not None
        with self._tracer.step("flush"):
            if self.device.drained is not None:
                await _within(self.device.drained(), deadline, "what the guest wrote did not reach the device in time")
            done = self.device.session.flush()
            if done is not None:
                await _within(done, deadline, "the device did not answer a read in time")

    async def quiesce(self, deadline: float) -> bool:
        """No new DMA; without a step of its own, `stop` does it.

        Returns:
            Whether there was such a step.
        """
        return await self._link.call("quiesce", _quiesce, deadline)

    async def stop(self, deadline: float) -> None:
        """Hold still."""
        await self._link.call("stop", lambda session: session.stop(), deadline)

    async def resume(self, deadline: float) -> None:
        """Run."""
        await self._link.call("resume", lambda session: session.resume(), deadline)

    async def reset_agent(self, deadline: float) -> None:
        """Reset the function through its agent, whatever it was doing.

        An agent that cannot do that lets it run, but not before the device itself was reset: what it holds may be the
        state of a function that runs elsewhere, or half of one.
        """
        if self._link.caps is None or self._link.caps.reset:
            try:
                await self._link.call("reset", lambda session: session.reset(), deadline)
                self._link.begun = None
                return
            except Unsupported:
                pass
        try:
            await self._link.leave(Outcome.FAILED, deadline, abort=True)
        except AgentError as error:
            if error.away or self.device is None:
                raise
            # It is stuck in what it was doing, and the reset of its device is what leads out.
            self._link.begun = None
        if self.device is None:
            raise InvalidState("its agent cannot reset it, and there is no client whose device could be")
        # What its client has written since it was told of the reset stays.
        await self.reset_device_late(deadline, device=True)
        await self._link.call("was_reset", lambda session: session.was_reset(), deadline)
        await self.resume(deadline)

    async def reset_device(self, deadline: float) -> None:
        """Reset the function through its backend.

        Raises:
            CommandError: it cannot be.
        """
        if self.device is not None:
            self.device.shadow.clear()
            try:
                done = self.device.session.reset()
                if done is not None:
                    await _within(done, deadline, "the device did not finish its reset in time")
            except CommandError:
                raise
            except VfioUserError as error:  # a lost contact is nobody's bug
                raise CommandError(f"the device could not be reset: {error}", error.errno) from error

    async def reset_device_late(self, deadline: float, *, device: bool) -> None:
        """Reset the function once more, behind its agent, and leave configuration space as the client wrote it since.

        Args:
            deadline: when to give up.
            device: the backend resets it, too; otherwise the guest has done so.
        """
        if self.device is None:
            return
        shadow = self.device.shadow.copy()
        if device:
            await self.reset_device(deadline)
        self.device.shadow.take(shadow)
        await self._write_config(deadline)

    # Saving

    async def begin_source(self, deadline: float) -> None:
        """Begin a migration away from here."""
        await self._begin(Role.SOURCE, deadline)

    async def _begin(self, role: Role, deadline: float) -> None:
        begun = self._link.begun
        if begun is not None and begun[0] is not role:
            await self._link.leave(Outcome.CANCELLED, deadline, abort=True)
            begun = None
        name = uuid.uuid4().hex if begun is None else begun[1]
        await self._link.begin(role, name, deadline)
        caps = self._link.caps
        if caps is not None and not caps.stop_copy:
            raise Unsupported("the agent cannot save this function's state; it cannot be migrated")

    async def open_stream(self, deadline: float) -> None:
        """Begin to fetch the state."""
        assert self.nursery is not None
        assert self.device is not None
        descriptor = await self.describe(deadline)
        self.work.source = SourcePipeline(
            self._link,
            self._tracer,
            descriptor=descriptor,
            pci=self.device.shadow.encode,
            chunk_size=self._config.chunk_size,
            data_s=self._config.data_s,
            retry_s=self._config.retry_s,
            device_failed=self.device_failed,
            sharing=self.sharing,
        )
        await self._estimate(deadline)
        self.nursery.start_soon(self.work.source.run)

    async def restart_stream(self, source: SourcePipeline, deadline: float, pauses: Backoff) -> None:
        """The function is not what was saved so far any more: begin the stream anew, in the next generation.

        Args:
            source: whose stream it is.
            deadline: when to give up.
            pauses: between attempts while the agent is away.
        """
        await source.hold(trio.current_time())

        async def described_anew() -> bytes:
            await self._void_stream(deadline)
            return await self.describe(deadline)

        try:
            source.restart(await persist(described_anew, pauses, agent_is_away))
        except AgentError:
            source.halt()  # what it has must not be taken for the function's state
            raise
        await self._estimate(deadline)

    async def _void_stream(self, deadline: float) -> None:
        """Make the agent drop what it gave: else it may repeat a chunk that it gave before."""
        try:
            await self._link.call("abort", lambda session: session.abort(), deadline)
        except AgentError as error:  # traced
            if error.fatal:
                raise

    async def describe(self, deadline: float) -> bytes:
        """Ask what the function is, as the stream carries it."""
        return encode_descriptor(await self._link.call("describe", lambda session: session.describe(), deadline))

    async def _estimate(self, deadline: float) -> None:
        """Ask how much there is; a figure for progress and `pending_bytes`, so a failure is no matter."""
        source = self.work.source
        assert source is not None
        try:
            source.estimated(await self._link.call("estimate", lambda session: session.estimate(), deadline))
        except AgentError:
            pass

    async def start_stream(self, deadline: float) -> None:
        """Fetch what can be had while the function runs."""
        assert self.work.source is not None
        self.work.source.release()
        await trio.lowlevel.checkpoint()

    async def hold_stream(self, deadline: float) -> None:
        """Let the chunk under way arrive."""
        assert self.work.source is not None
        await self.work.source.hold(deadline)

    async def finish_stream(self, deadline: float) -> None:
        """Go on to the end of the state."""
        assert self.work.source is not None
        await self._estimate(deadline)
        self.work.source.finish()

    async def drop_stream(self, deadline: float) -> None:
        """Forget what was fetched."""
        self.work.drop_pipelines()
        await trio.lowlevel.checkpoint()

    async def abort(self, deadline: float) -> None:
        """Tell the agent to forget, unless the client has everything."""
        if not self.work.trailer_handed:
            await self._link.call("abort", lambda session: session.abort(), deadline)

    async def end_cancelled(self, deadline: float) -> None:
        """Leave a migration that did not happen."""
        await self._link.leave(Outcome.CANCELLED, deadline, abort=False)

    async def end(self, deadline: float) -> None:
        """Leave the migration, if there was one."""
        outcome = Outcome.SUCCESS if self.work.committed else Outcome.CANCELLED
        await self._link.leave(outcome, deadline, abort=False)

    # Loading

    async def begin_destination(self, deadline: float) -> None:
        """Begin a migration to here."""
        await self._begin(Role.DESTINATION, deadline)

    async def load_begin(self, deadline: float) -> None:
        """Get the agent ready for a state."""
        assert self.nursery is not None
        assert self.device is not None
        await self._link.call("load_begin", lambda session: session.load_begin(None), deadline)
        # From here on it has what the client writes while it loads, which wins over what the stream brings.
        self.device.shadow.clear()
        self.work.destination = DestinationPipeline(
            self._link,
            self._tracer,
            self.nursery,
            check=self.check,
            data_s=self._config.data_s,
            retry_s=self._config.retry_s,
            device_failed=self.device_failed,
        )

    async def check(self, payload: bytes, deadline: float) -> None:
        """Judge a source's descriptor: what is plain at once, the rest by the agent."""
        theirs = decode_descriptor(payload)
        ours = await self._link.call("describe", lambda session: session.describe(), deadline)
        assert self._link.caps is not None
        require_similar(theirs, ours, self._link.caps)
        await self._link.call("check", lambda session: session.check(theirs), deadline)

    async def load_commit(self, deadline: float) -> None:
        """Apply what came; if nothing came, the load was cancelled and the function is left reset."""
        destination = self.work.destination
        assert destination is not None
        if not destination.written:
            await self.reset_agent(deadline)
            await self.reset_device(deadline)
            await self.stop(deadline)
            self.work.drop_pipelines()
            return
        with self._tracer.step("commit") as span:
            span.bytes = destination.written
            self._take_config(destination.pci)
            await destination.finish(deadline)
            await self._write_config(deadline)
        self.work.drop_pipelines()
        self.work.committed = True

    def _take_config(self, payload: bytes | None) -> None:
        """Take configuration space as the source's client wrote it; nothing is applied yet that it could spoil."""
        assert self.device is not None
        if payload is not None:
            try:
                self.device.shadow.decode_under(payload)
            except ValueError as error:
                raise CommandError(f"the state has {error}; the load has failed", errno.EILSEQ) from error

    async def _write_config(self, deadline: float) -> None:
        """Write configuration space as both clients together want it; what this side's client wrote has won."""
        assert self.device is not None
        for offset, data in self.device.shadow.writes():
            done = self.device.session.region_write(RegionIndex.CONFIG, offset, data, posted=False)
            if done is not None:
                await _within(done, deadline, "the device did not take its configuration in time")


async def _within(done: Awaitable[None], deadline: float, message: str) -> None:
    with trio.move_on_at(deadline) as scope:
        await done
    if scope.cancelled_caught:
        raise CommandError(message, errno.ETIMEDOUT)


async def _quiesce(session: Session) -> bool:
    if session.caps.p2p:
        await session.quiesce()
    return session.caps.p2p
