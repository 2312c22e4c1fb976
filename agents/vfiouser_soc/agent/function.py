"""A simulated function as its agent sees it: what it does, and which migration it takes part in.

All of this belongs to the function and lives in the device process, so it outlives clients, daemons and agents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from vfiouser_agents.api import AgentState, Capabilities, Descriptor, Event, EventKind, FunctionInfo, Role, Status
from vfiouser_agents.dirtylog import PageLog
from vfiouser_agents.errors import CorruptState, InvalidState
from vfiouser_agents.events import EventFeed
from vfiouser_oob.devices.base import ResetKind
from vfiouser_protocol.pci import ConfigSnapshot
from vfiouser_soc.agent.payload import LoadedParts, SavedParts, StateReader, StateWriter
from vfiouser_soc.agent.state_memory import StateMemory, StateMemoryOptions
from vfiouser_soc.nvme import snapshot, snapshot_reader
from vfiouser_soc.nvme.function import NvmeFunction
from vfiouser_soc.nvme.spec import ControllerRegister
from vfiouser_soc.nvme.suspension import SuspensionEnded

#: Format of the state, and what `check` compares first.
FORMAT = "vfiouser-oob-nvme"
FORMAT_VERSION = 1
#: What pre-copy repeats counts too, so a stream has no bound of its own.
_MAX_STATE = 1 << 40
_PAGE_SIZES = (4096, 8192, 16384, 65536, 2 << 20)
#: Seconds that commands in execution get to finish; a VMM that waits for a state change may serve no DMA meanwhile.
DRAIN_S = 1.0

CAPABILITIES = Capabilities(
    p2p=True,
    precopy=True,
    dirty=True,
    formats=(FORMAT,),
    max_state=_MAX_STATE,
    max_chunk=4 << 20,
    page_sizes=_PAGE_SIZES,
    max_ranges=1024,
)


@dataclass(frozen=True, slots=True)
class MigrationOptions:
    """How a function takes part in migrations.

    Args:
        memory: its state memory.
        firmware: the version that it claims to run; None = that of its identity.
        drain_s: seconds that commands in execution get to finish when it is stopped.
    """

    memory: StateMemoryOptions = field(default_factory=StateMemoryOptions)
    firmware: str | None = None
    drain_s: float = DRAIN_S


class AgentFunction:
    """One function.

    Args:
        name: its name, by which sessions are opened.
        nvme: the device.
        options: how it takes part in migrations.
        reset_device: resets the device as a function-level reset does; None = without a framework around it.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        nvme: NvmeFunction,
        options: MigrationOptions = MigrationOptions(),
        *,
        reset_device: Callable[[], None] | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.name = name
        self.nvme = nvme
        self.memory = StateMemory(options.memory, nvme.controller.identity.subsystem_nqn, clock)
        self.state = AgentState.RUNNING
        self.role: Role | None = None
        self.migration_id = ""
        #: The session that takes part in the migration; None if it was closed since.
        self.owner: object | None = None
        self.log: PageLog | None = None
        self.outgoing: StateWriter | None = None
        self.incoming: StateReader | None = None
        #: A load was begun and not committed: only a reset or another load leads out.
        self.spoiled = False
        self.feed = EventFeed()
        self._options = options
        self._reset_device = reset_device or self._reset_alone
        self._stopped_config: ConfigSnapshot | None = None
        nvme.was_reset = self._device_was_reset

    # What it is

    @property
    def info(self) -> FunctionInfo:
        """How it is listed."""
        identity = self.nvme.controller.identity
        return FunctionInfo(self.name, "nvme", labels={"serial": identity.serial, "nqn": identity.subsystem_nqn})

    def describe(self) -> Descriptor:
        """What a destination compares."""
        identity = self.nvme.controller.identity
        return Descriptor(
            format_id=FORMAT,
            format_version=FORMAT_VERSION,
            vendor="vfiouser-oob",
            model=identity.model,
            kind="nvme",
            firmware=self._options.firmware or identity.firmware,
            state_max=_MAX_STATE,
            fingerprint=self._fingerprint(),
        )

    def _fingerprint(self) -> dict[str, str]:
        controller = self.nvme.controller
        limits, identity = controller.limits, controller.identity
        found = {
            "serial": identity.serial,
            "subsystem": identity.subsystem_nqn,
            "controller id": str(identity.controller_id),
            "pci id": f"{identity.vendor_id:04x}:{identity.device_id:04x}",
            "capabilities": f"{controller.registers[ControllerRegister.CAP]:#018x}",
            "queues": str(limits.io_queues),
            "queue entries": str(limits.max_entries),
            "vectors": str(limits.vectors),
            "largest transfer": str(limits.max_transfer),
            "event requests": str(limits.event_requests),
            "doorbells": "trapped" if self.nvme.polled_doorbells is None else "polled",
            "controller memory buffer": str(0 if self.nvme.cmb_memory is None else self.nvme.cmb_memory.size),
            "state memory": str(self.memory.size),
        }
        for nsid, namespace in sorted(self.nvme.namespaces.items()):
            found[f"namespace {nsid}"] = f"uuid {namespace.identity.uuid}"
            found[f"namespace {nsid} size"] = f"{namespace.blocks} blocks of {1 << namespace.lba_shift} bytes"
            found[f"namespace {nsid} store"] = namespace.store.identity
        return found

    def status(self) -> Status:
        """Where it is."""
        carried = sum(len(queue.fetched) for queue in self.nvme.controller.state.submission_queues.values())
        detail = f"{carried} commands carried over" if carried and self.state is not AgentState.RUNNING else ""
        return Status(self.state, self.role, self.migration_id, self.log is not None, detail=detail)

    # What it does

    async def hold(self, state: AgentState) -> None:
        """Go to QUIESCED or STOPPED; both drain everything.

        Raises:
            InvalidState: a reset or a resumption came first.
        """
        try:
            await self.nvme.controller.suspender.suspend(self._options.drain_s)
        except SuspensionEnded as error:
            raise InvalidState(f"function {self.name}: {error}; it is {self.state.value}") from error
        self._stopped_config = self.nvme.config.snapshot()
        self.memory.stop()
        self.move(state)

    def run(self) -> None:
        """Go to RUNNING."""
        self._set_outgoing(None)
        self.memory.start()
        self.nvme.controller.suspender.unsuspend()
        self.move(AgentState.RUNNING)

    def move(self, state: AgentState) -> None:
        """Note a new state and tell the watchers."""
        if state is not self.state:
            self.state = state
            self.feed.put(Event(EventKind.STATE_CHANGED, f"now {state.value}", self.status()))

    def reset(self) -> None:
        """Be as after a function-level reset, in no migration."""
        self.stop_logging()
        self.forget_migration()
        # Else the device takes its own reset for the end of a migration once more.
        self.move(AgentState.RUNNING)
        self._reset_device()

    def _reset_alone(self) -> None:
        self.nvme.config.reset()
        self.nvme.reset(ResetKind.FUNCTION_LEVEL)

    def _device_was_reset(self) -> None:
        """The device went to its power-on state: by us, by the VMM or by the guest."""
        self.memory.reset()
        self.spoiled = False
        if self.state is not AgentState.RUNNING:
            # The VMM began anew while the function was held; what was saved or loaded is of no use any more.
            self.stop_logging()
            self.forget_migration()
            self.move(AgentState.RUNNING)
        self.memory.start()

    # Migration

    def forget_migration(self) -> None:
        """Leave the migration; what the function does stays."""
        self.drop_buffers()
        self.role, self.migration_id, self.owner = None, "", None

    def drop_buffers(self) -> None:
        """Drop what was being saved or loaded."""
        self._set_outgoing(None)
        self.incoming = None
        if self.state is AgentState.LOADING:
            self.move(AgentState.STOPPED)

    def new_writer(self) -> StateWriter:
        """A stream of the state from its beginning."""
        buffer = None if self.nvme.cmb_memory is None else self.nvme.cmb_memory.view
        return StateWriter(self.memory, SavedParts(self._controller_bytes, buffer))

    def begin_saving(self) -> StateWriter:
        """Begin the stream that this migration carries."""
        writer = self.new_writer()
        self._set_outgoing(writer)
        return writer

    def _set_outgoing(self, writer: StateWriter | None) -> None:
        self.outgoing = writer
        self.memory.rewritten = (lambda index: None) if writer is None else writer.rewritten

    def _controller_bytes(self) -> bytes:
        # The end of a connection clears bus mastering, which is not the guest's doing.
        config = self._stopped_config if self.nvme.controller.suspender.client_lost else None
        return snapshot.pack(snapshot.capture(self.nvme, config))

    def begin_loading(self) -> None:
        """Get ready for a state."""
        size = 0 if self.nvme.cmb_memory is None else self.nvme.cmb_memory.size
        self.incoming = StateReader(self.memory, size, _MAX_STATE)
        self.spoiled = True
        self.move(AgentState.LOADING)

    def commit(self, parts: LoadedParts) -> None:
        """Apply a state that came in whole.

        Raises:
            CorruptState: the controller's part makes no sense; nothing was applied.
        """
        try:
            controller = snapshot_reader.parse(parts.controller, self.nvme)
        except snapshot_reader.BadSnapshot as error:
            raise CorruptState(f"{error}; nothing was applied") from error
        snapshot.apply(controller, self.nvme)
        if self.nvme.cmb_memory is not None:
            self.nvme.cmb_memory.view[:] = parts.buffer
        self.memory.take(parts.blocks)
        self.incoming = None
        self.spoiled = False
        self.move(AgentState.LOADED)

    # Dirty pages

    def start_logging(self, log: PageLog) -> None:
        """Note the guest pages that the device writes."""
        self.log = log
        self.nvme.controller.client_memory_written = log.mark

    def stop_logging(self) -> None:
        """Forget them."""
        self.log = None
        self.nvme.controller.client_memory_written = lambda address, count: None
