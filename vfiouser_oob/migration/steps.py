"""What each step of a plan does: the methods behind the names of `plans.Do`."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import trio

from vfiouser_agents.api import Descriptor, Outcome, Role, Session, Status
from vfiouser_agents.errors import AgentError, InvalidState, Unsupported
from vfiouser_agents.operations import Operation
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.attached_device import AttachedDevice
from vfiouser_oob.migration.descriptor import decode_descriptor, encode_descriptor, require_similar
from vfiouser_oob.migration.destination import DestinationPipeline
from vfiouser_oob.migration.events import BeganAtAgent, DeviceBroke
from vfiouser_oob.migration.host import MigrationHost
from vfiouser_oob.migration.inherited import NO_STREAM, StreamMark
from vfiouser_oob.migration.plans import Do
from vfiouser_oob.migration.record import Begun
from vfiouser_oob.migration.sharing import BufferShare
from vfiouser_oob.migration.source import SourcePipeline
from vfiouser_oob.migration.trace import Tracer
from vfiouser_protocol.constants import DeviceState, RegionIndex
from vfiouser_protocol.errors import CommandError, VfioUserError

#: Random bytes in the name of a migration.
_ID_SIZE = 16
#: Takes a step by a deadline.
Action: TypeAlias = Callable[[float], Awaitable["bool | Status | None"]]


class Steps:
    """The steps, as methods that take a deadline.

    Args:
        link: the function's agent.
        config: its migration settings.
        tracer: where steps are traced.
        host: knows what was begun, and is told of what is found out.
        sharing: with whom memory for state is shared; a daemon has one for all its functions.
    """

    def __init__(
        self, link: AgentLink, config: MigrationConfig, tracer: Tracer, host: MigrationHost, sharing: BufferShare
    ) -> None:
        self._link = link
        self._config = config
        self._tracer = tracer
        self._host = host
        self._sharing = sharing
        #: The device, as the attached client has it.
        self.device: AttachedDevice | None = None
        #: The saving side's pipeline, and the loading side's.
        self.source: SourcePipeline | None = None
        self.destination: DestinationPipeline | None = None
        #: How far the client has come with a stream that another daemon has begun.
        self.mark = NO_STREAM
        #: What the function is that a state is loaded into, once known.
        self._ours: Descriptor | None = None
        self._table: Mapping[Do, Action] = {
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
            Do.RESTART_STREAM: self.restart_stream,
            Do.REOPEN_STREAM: self.reopen_stream,
            Do.REOPEN_LOAD: self.reopen_load,
            Do.DROP_STREAM: self.drop_stream,
            Do.ABORT: self.abort,
            Do.END_CANCELLED: self.end_cancelled,
            Do.END: self.end,
            Do.LOAD_BEGIN: self.load_begin,
            Do.LOAD_COMMIT: self.load_commit,
            Do.ASK: self._link.status,
            Do.RESET_AGENT: self.reset_agent,
            Do.RESET_DEVICE: self.reset_device,
            Do.RESET_DEVICE_AGAIN: self.reset_device_again,
            Do.WRITE_CONFIG: self.write_config,
            Do.REARM_LOG: self.rearm_log,
            Do.CLOSE: self.close,
        }

    async def take(self, do: Do, deadline: float) -> bool | Status | None:
        """Take a step.

        Args:
            do: which.
            deadline: when to give up, as trio's clock has it.

        Returns:
            What the agent said, if it was asked; else False if there was nothing to do.

        Raises:
            AgentError: the agent did not do its part.
            VfioUserError: the device did not do its, or the stream is not whole.
        """
        return await self._table[do](deadline)

    @property
    def moved(self) -> int:
        """Bytes of the stream that the client took, or gave."""
        stream = self._host.record.stream
        return 0 if stream is None else stream.position

    def drop_pipelines(self) -> None:
        """Stop moving data and forget what is buffered."""
        if self.source is not None:
            self.source.halt()
        if self.destination is not None:
            self.destination.halt()
        self.source = self.destination = None

    def halt_source(self) -> None:
        """What was saved must not be taken for the function's state any more."""
        if self.source is not None:
            self.source.halt()

    def release_source(self) -> None:
        """Fetching goes on as before."""
        if self.source is not None:
            self.source.release()

    def _broken(self, why: str) -> None:
        self._host.feed(DeviceBroke(why))

    # The device

    async def flush(self, deadline: float) -> None:
        """Make sure that what the guest wrote is at the device, not in a socket."""
        device = self.device
        assert device is not None
        with self._tracer.step("flush"):
            await _within(device.held.drained(), deadline, "the guest's writes did not reach the device in time")
            done = device.session.flush()
            if done is not None:
                await _within(done, deadline, "the device did not answer a read in time")

    async def quiesce(self, deadline: float) -> bool:
        """No new DMA; without a step of its own, `stop` does it.

        Returns:
            Whether there was such a step.
        """
        return await self._link.make(Operation.QUIESCE, deadline, _quiesce)

    async def stop(self, deadline: float) -> None:
        """Hold still."""
        await self._link.call(Operation.STOP, deadline)

    async def resume(self, deadline: float) -> None:
        """Run."""
        await self._link.call(Operation.RESUME, deadline)

    async def reset_agent(self, deadline: float) -> None:
        """Reset the function through its agent, whatever it was doing.

        An agent that cannot do that lets it run, but not before the device itself was reset: what it holds may be the
        state of a function that runs elsewhere, or half of one.
        """
        if self._link.caps is None or self._link.caps.reset:
            try:
                await self._link.call(Operation.RESET, deadline)
                self._host.feed(BeganAtAgent(None))
                return
            except Unsupported:
                pass
        try:
            await self._link.leave(Outcome.FAILED, deadline, abort=True)
        except AgentError as error:
            if error.away or self.device is None:
                raise
            # It is stuck in what it was doing, and the reset of its device is what leads out.
            self._host.feed(BeganAtAgent(None))
        if self.device is None:
            raise InvalidState("its agent cannot reset it, and no client is there whose device could be reset")
        # What its client has written since it was told of the reset stays.
        await self.reset_device_again(deadline)
        await self._link.call(Operation.WAS_RESET, deadline)
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
                raise CommandError(f"the device did not reset: {error}", error.errno) from error

    async def reset_device_again(self, deadline: float) -> None:
        """Reset the device behind its agent, and leave configuration space as the client wrote it since.

        Raises:
            CommandError: it cannot be reset, or its client left meanwhile.
        """
        device = self.device
        if device is not None:
            shadow = device.shadow.copy()
            await self.reset_device(deadline)
            self._require_client(device)
            device.shadow.take(shadow)
            await self.write_config(deadline)

    def _require_client(self, device: AttachedDevice) -> None:
        """A step in the background goes no further when its client leaves, or another one has come."""
        if self.device is not device:
            raise CommandError("the client left before the device was ready")

    async def rearm_log(self, deadline: float) -> None:
        """Begin the agent's log of dirty pages anew, which has ended with its reset."""
        if self.device is not None:
            await self.device.dirty.rearm(deadline)

    async def close(self, deadline: float) -> None:
        """Let go of the session."""
        self._link.close()
        await trio.lowlevel.checkpoint()

    # Saving

    async def begin_source(self, deadline: float) -> None:
        """Begin a migration away from here."""
        await self._begin(Role.SOURCE, deadline)

    async def _begin(self, role: Role, deadline: float) -> None:
        begun = self._host.record.begun
        if begun is not None and begun.role is not role:
            await self._link.leave(Outcome.CANCELLED, deadline, abort=True)
            begun = None
        await self._link.begin(begun or Begun(role, os.urandom(_ID_SIZE).hex()), deadline)
        caps = self._link.caps
        if caps is not None and not caps.stop_copy:
            raise Unsupported("the agent cannot save this function's state; it cannot be migrated")

    async def open_stream(self, deadline: float) -> None:
        """Begin to fetch the state."""
        device = self.device
        assert device is not None
        if self.source is not None:
            # An attempt before this one has lost the agent on its way; two pipelines would take each other's pieces.
            self.drop_pipelines()
            await self._void_stream(deadline)
        source = self.source = self._pipeline(device, NO_STREAM)
        self._host.background.begin(source.run)
        if self._host.record.state is DeviceState.STOP:
            # The first piece is under way while the agent says what the function is. Nobody waits for the estimate,
            # since the guest stands still.
            source.finish()
            self._host.background.begin(self._estimate, source, deadline)
            source.described(await self.describe(deadline))
        else:
            source.described(await self.describe(deadline))
            await self._estimate(source, deadline)

    def _pipeline(self, device: AttachedDevice, mark: StreamMark) -> SourcePipeline:
        return SourcePipeline(
            self._link,
            self._tracer,
            pci=device.shadow.encode,
            chunk_size=self._config.chunk_size,
            data_s=self._config.data_s,
            retry_s=self._config.retry_s,
            device_failed=self._broken,
            sharing=self._sharing,
            mark=mark,
        )

    @property
    def _saving(self) -> SourcePipeline:
        if self.source is None:
            raise CommandError("the daemon dropped the state that it was saving", errno.EIO)
        return self.source

    async def restart_stream(self, deadline: float) -> None:
        """The function is not what was saved so far any more: begin the stream anew, in the next epoch."""
        source = self._saving
        await source.hold(trio.current_time())
        await self._void_stream(deadline)
        source.restart(await self.describe(deadline))
        await self._estimate(source, deadline)

    async def reopen_stream(self, deadline: float) -> bool:
        """Go on with a stream that another daemon has begun: behind what the client has, in the next epoch.

        What was fetched ahead is gone with that daemon, and the agent gives nothing twice.

        Returns:
            Whether there is a stream to go on with.
        """
        device = self.device
        if device is None or not self._host.record.saves:
            return False
        self.drop_pipelines()
        source = self.source = self._pipeline(device, self.mark)
        self._host.background.begin(source.run)
        await self._void_stream(deadline)
        source.restart(await self.describe(deadline))
        if self._host.record.state is DeviceState.STOP_COPY:
            source.finish()
        await self._estimate(source, deadline)
        return True

    async def _void_stream(self, deadline: float) -> None:
        """Make the agent drop what it gave: else it may repeat a chunk that it gave before."""
        try:
            await self._link.call(Operation.ABORT, deadline)
        except AgentError as error:  # traced
            if error.fatal:
                raise

    async def describe(self, deadline: float) -> bytes:
        """Ask what the function is, as the stream carries it."""
        return encode_descriptor(await self._link.call(Operation.DESCRIBE, deadline))

    async def _estimate(self, source: SourcePipeline, deadline: float) -> None:
        """Ask how much there is; a figure for progress and `pending_bytes`, so a failure is no matter."""
        try:
            source.estimated(await self._link.call(Operation.ESTIMATE, deadline))
        except AgentError:
            pass

    async def start_stream(self, deadline: float) -> None:
        """Fetch what can be had while the function runs."""
        self._saving.release()
        await trio.lowlevel.checkpoint()

    async def hold_stream(self, deadline: float) -> None:
        """Let the chunk under way arrive."""
        await self._saving.hold(deadline)

    async def finish_stream(self, deadline: float) -> None:
        """Go on to the end of the state."""
        source = self._saving
        if source.final:
            await trio.lowlevel.checkpoint()
            return
        source.finish()
        if not source.was_estimated:
            self._host.background.begin(self._estimate, source, deadline)
        await trio.lowlevel.checkpoint()

    async def drop_stream(self, deadline: float) -> None:
        """Forget what was fetched."""
        self.drop_pipelines()
        await trio.lowlevel.checkpoint()

    async def abort(self, deadline: float) -> None:
        """Tell the agent to forget, unless the client has everything."""
        if not self._host.record.handed:
            await self._link.call(Operation.ABORT, deadline)

    async def end_cancelled(self, deadline: float) -> None:
        """Leave a migration that did not happen."""
        await self._link.leave(Outcome.CANCELLED, deadline, abort=False)

    async def end(self, deadline: float) -> None:
        """Leave the migration, if there was one."""
        outcome = Outcome.SUCCESS if self._host.record.committed else Outcome.CANCELLED
        await self._link.leave(outcome, deadline, abort=False)

    # Loading

    async def begin_destination(self, deadline: float) -> None:
        """Begin a migration to here."""
        await self._begin(Role.DESTINATION, deadline)

    async def load_begin(self, deadline: float) -> None:
        """Get the agent ready for a state."""
        assert self.device is not None
        await self._link.call(Operation.LOAD_BEGIN, deadline, None)
        self._ours = await self._described(deadline)
        # From here on it has what the client writes while it loads, which wins over what the stream brings.
        self.device.shadow.clear()
        self.destination = self._load_pipeline(begun=True)

    def _load_pipeline(self, *, begun: bool) -> DestinationPipeline:
        return DestinationPipeline(
            self._link,
            self._tracer,
            self._host.background,
            check=self.check,
            data_s=self._config.data_s,
            retry_s=self._config.retry_s,
            device_failed=self._broken,
            begun=begun,
        )

    async def reopen_load(self, deadline: float) -> bool:
        """Go on with a load that another daemon has begun, and of which nothing had come.

        Returns:
            Whether there is a load to go on with.
        """
        await trio.lowlevel.checkpoint()
        if not self._host.record.loads:
            return False
        self.destination = self._load_pipeline(begun=False)
        return True

    async def _described(self, deadline: float) -> Descriptor | None:
        """What the function is, asked before the source's function stands still; None: to be asked again."""
        try:
            return await self._link.call(Operation.DESCRIBE, deadline)
        except AgentError as error:  # traced
            if error.fatal:
                raise
            return None

    async def check(self, payload: bytes, deadline: float) -> None:
        """Judge a source's descriptor: what is plain at once, the rest by the agent."""
        theirs = decode_descriptor(payload)
        if self._ours is None:
            self._ours = await self._link.call(Operation.DESCRIBE, deadline)
        assert self._link.caps is not None
        require_similar(theirs, self._ours, self._link.caps)
        await self._link.call(Operation.CHECK, deadline, theirs)

    async def load_commit(self, deadline: float) -> None:
        """Apply what came; if nothing came, the load was cancelled and the function is left reset."""
        destination, failure = self.destination, self._host.record.load_failure
        if destination is None or failure is not None:
            raise CommandError(f"the load has failed ({failure or 'it was dropped'}); only a reset ends this")
        if not self.moved:
            await self.reset_agent(deadline)
            await self.reset_device(deadline)
            await self.stop(deadline)
            self.drop_pipelines()
            return
        with self._tracer.step("commit") as span:
            span.bytes = self.moved
            self._take_config(destination.pci)
            await destination.finish(deadline)
            await self.write_config(deadline)
        self.drop_pipelines()

    def _take_config(self, payload: bytes | None) -> None:
        """Take configuration space as the source's client wrote it; nothing is applied yet that it could spoil."""
        assert self.device is not None
        if payload is not None:
            try:
                self.device.shadow.decode_under(payload)
            except ValueError as error:
                raise CommandError(f"the state has {error}; the load has failed", errno.EILSEQ) from error

    async def write_config(self, deadline: float) -> None:
        """Write configuration space as both clients together want it; what this side's client wrote has won."""
        device = self.device
        if device is None:
            return
        for offset, data in device.shadow.writes():
            done = device.session.region_write(RegionIndex.CONFIG, offset, data, posted=False)
            if done is not None:
                await _within(done, deadline, "the device did not take its configuration in time")
                self._require_client(device)


async def _within(done: Awaitable[None], deadline: float, message: str) -> None:
    with trio.move_on_at(deadline) as scope:
        await done
    if scope.cancelled_caught:
        raise CommandError(message, errno.ETIMEDOUT)


async def _quiesce(session: Session) -> bool:
    if session.caps.p2p:
        await session.quiesce()
    return session.caps.p2p
