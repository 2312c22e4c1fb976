"""The controller's life: enable, disable, shutdown, resets, and what ties its parts together.

Register writes only note what is wanted and cancel what must not go on; `run` does whatever takes time.
CSTS.RDY falls only when the last task of the epoch has ended, so a host that waits for it can give its
memory to someone else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import trio

from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_soc.nvme.admin import AdminCommands
from vfiouser_soc.nvme.cmb import ControllerMemoryBuffer
from vfiouser_soc.nvme.command import SubmissionEntry
from vfiouser_soc.nvme.config import ControllerIdentity, ControllerLimits
from vfiouser_soc.nvme.doorbells import PolledDoorbells, PollTimes, TrappedDoorbells
from vfiouser_soc.nvme.engine import QueueEngine
from vfiouser_soc.nvme.epoch import DmaPort, Epoch
from vfiouser_soc.nvme.events import AsyncEvents
from vfiouser_soc.nvme.features import Features
from vfiouser_soc.nvme.identify import Identify
from vfiouser_soc.nvme.interrupts import Interrupts
from vfiouser_soc.nvme.io import IoCommands
from vfiouser_soc.nvme.logs import Logs
from vfiouser_soc.nvme.namespace import Namespace
from vfiouser_soc.nvme.registers import CapabilitiesRegister, RegisterFile
from vfiouser_soc.nvme.spec import (
    CC_IOCQES_SHIFT,
    CC_IOSQES_SHIFT,
    CC_MPS_SHIFT,
    Cc,
    CmbMsc,
    ControllerRegister,
    Csts,
    ErrorEvent,
    EventType,
    FeatureId,
    LogPage,
    NoticeEvent,
    NvmeError,
    StatusCode,
    status_field,
)
from vfiouser_soc.nvme.state import CompletionQueue, ControllerState, SubmissionQueue
from vfiouser_soc.nvme.suspension import Clocks, Suspender, Suspension

if TYPE_CHECKING:
    from vfiouser_oob.devices.model import ModelHost

_log = logging.getLogger(__name__)

#: Bits of the asynchronous event configuration.
_NOTIFY_NAMESPACE = 8
_CMB_BASE_INVALID = 1
_MIN_PAGE_SHIFT = 12
_SQES_SHIFT, _CQES_SHIFT = 6, 4
#: Fields of CC that a host must not change while the controller is enabled; they keep their values then.
_FIXED_WHILE_ENABLED = Cc.CSS | Cc.MPS | Cc.AMS


class Controller:
    """One NVMe controller.

    Args:
        identity: names.
        limits: sizes.
        namespaces: active namespaces by id, at least one; owned from now on.
        interrupts: makes the interrupt side, given a function that returns the completion queues.
        doorbell_memory: shared memory with the doorbell page; None to have doorbells trapped.
        poll_times: how often shared doorbells are looked at.
        cmb: the controller memory buffer, if any.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        identity: ControllerIdentity,
        limits: ControllerLimits,
        namespaces: Mapping[int, Namespace],
        interrupts: Callable[[Callable[[], list[CompletionQueue]]], Interrupts],
        *,
        doorbell_memory: SharedMemory | None = None,
        poll_times: PollTimes | None = None,
        cmb: ControllerMemoryBuffer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = identity
        self.limits = limits
        self.namespaces = namespaces
        self.state = ControllerState()
        self.interrupts = interrupts(lambda: list(self.state.completion_queues.values()))
        self.doorbells = (
            TrappedDoorbells(self._doorbell, limits.doorbells)
            if doorbell_memory is None
            else PolledDoorbells(self._doorbell, limits.doorbells, doorbell_memory, poll_times or PollTimes())
        )
        self._cmb = cmb
        capabilities = CapabilitiesRegister(
            limits.max_entries, limits.timeout_s, limits.page_shift_max, cmb is not None
        )
        self.registers = RegisterFile(
            capabilities.value(),
            {
                ControllerRegister.CC: self._cc_written,
                ControllerRegister.INTMS: self._mask_set,
                ControllerRegister.INTMC: self._mask_cleared,
                ControllerRegister.CMBMSC: self._cmb_control_written,
            },
        )
        self.features = Features(
            self.state.features,
            limits,
            lambda: sorted(namespaces),
            lambda: any(self.state.completion_queues) or any(self.state.submission_queues),
            clock,
        )
        self.logs = Logs(self.state, identity, clock, self.features.temperature_exceeded)
        self._events = AsyncEvents(self.state, limits.event_requests, self._complete_event)
        self._identify = Identify(identity, limits, namespaces)
        self._host: ModelHost | None = None
        self._lane = FunctionQueue()
        #: The epoch that the registers speak of; None while disabled.
        self._engine: QueueEngine | None = None
        #: Carries out a write that was kept during a suspension: offset into BAR0, bytes.
        self.replay: Callable[[int, bytes], None] = lambda offset, data: None
        #: The one whose tasks `run` holds, possibly an older one that is being wound up.
        self._running: QueueEngine | None = None
        self._flush_wanted = False
        #: Shutdowns begun; a flush that ends when another has begun completes nothing.
        self._shutdowns = 0
        self._wakeup = trio.Event()
        self.suspender = Suspender(self, identity.serial)
        #: Told (address, bytes) of every write to the client's memory.
        self.client_memory_written: Callable[[int, int], None] = lambda address, count: None

    def attach(self, host: ModelHost) -> None:
        """Take the host, through which memory is reached and interrupts are raised."""
        self._host = host
        self.interrupts.attach(host)

    async def run(self) -> None:
        """Be the controller, until cancelled."""
        while True:
            engine = self._engine
            if self.suspender.suspended and self.live_engine is None:
                if self.suspender.every_task_has_ended():
                    await self._woken()
            elif self._flush_wanted:
                self._flush_wanted = False
                await self._finish_shutdown()
            elif engine is None or not engine.epoch.alive:
                await self._woken()
            else:
                await self._run_epoch(engine)

    async def _woken(self) -> None:
        self._wakeup = trio.Event()
        await self._wakeup.wait()

    async def _run_epoch(self, engine: QueueEngine) -> None:
        def opened() -> None:
            self._set_status(Csts.RDY)
            if isinstance(self.doorbells, PolledDoorbells):
                watch = self.doorbells.watch
                engine.epoch.start_soon(lambda: watch(lambda: engine.is_busy))
            engine.kick()

        self._running = engine
        try:
            await engine.epoch.run(opened)
        finally:
            self._running = None
        if engine is not self._engine:
            self._set_status(0, clear=Csts.RDY)

    # Registers

    def _status(self) -> int:
        return self.registers[ControllerRegister.CSTS]

    def _set_status(self, bits: int, *, clear: int = 0) -> None:
        self.registers[ControllerRegister.CSTS] = self._status() & ~clear | bits

    def _cc_written(self, old: int, new: int) -> None:
        """Take a write of CC, which may change several of its fields: EN first, and then SHN as a write of its own."""
        notified = bool(old & Cc.SHN)
        if old & new & Cc.EN:
            self.registers[ControllerRegister.CC] = new & ~_FIXED_WHILE_ENABLED | old & _FIXED_WHILE_ENABLED
        elif new & Cc.EN:
            self._enable(new)
        elif old & Cc.EN:
            self._disable()
            notified = False  # the reset has ended that shutdown: if SHN is still set, this is a new one
        if new & Cc.SHN and not notified:
            self._shut_down()

    def _mask_set(self, _: int, written: int) -> None:
        self._set_mask(self.interrupts.mask | written)

    def _mask_cleared(self, _: int, written: int) -> None:
        self._set_mask(self.interrupts.mask & ~written)

    def _set_mask(self, mask: int) -> None:
        self.interrupts.mask = mask
        self.registers[ControllerRegister.INTMS] = self.registers[ControllerRegister.INTMC] = mask
        self.interrupts.update_level()

    def _cmb_control_written(self, _: int, value: int) -> None:
        if self._cmb is None:
            self.registers[ControllerRegister.CMBMSC] = 0
            return
        enabled = value & CmbMsc.CRE
        self.registers[ControllerRegister.CMBLOC] = self._cmb.location if enabled else 0
        self.registers[ControllerRegister.CMBSZ] = self._cmb.size_register if enabled else 0
        valid = self._cmb.control(value if enabled else 0)
        self.registers[ControllerRegister.CMBSTS] = 0 if valid else _CMB_BASE_INVALID

    # Enable and disable

    def _enable(self, cc: int) -> None:
        self._set_status(0, clear=Csts.CFS | Csts.SHST)
        self.state.shut_down = self._flush_wanted = False
        page_shift = _page_shift(cc)
        aqa = self.registers[ControllerRegister.AQA]
        asq, acq = self.registers[ControllerRegister.ASQ], self.registers[ControllerRegister.ACQ]
        sq_size, cq_size = (aqa & 0xFFF) + 1, (aqa >> 16) + 1
        page_mask = (1 << page_shift) - 1
        problem = (
            (page_shift > self.limits.page_shift_max and f"memory pages of {1 << page_shift} bytes")
            or (cc & Cc.CSS and "a command set other than NVM")
            or (cc & Cc.AMS and "arbitration other than round robin")
            or (min(sq_size, cq_size) < 2 and "admin queues of less than two entries")
            or ((asq | acq) & page_mask and f"admin queues at {asq:#x}, {acq:#x}, which are not page aligned")
        )
        if self._host is None or problem:
            _log.info("cannot enable %s: %s", self.identity.serial, problem)
            self._set_status(Csts.CFS)
            return
        engine = self._engine = self._make_engine(self._host, 1 << page_shift)
        self.doorbells.clear()
        engine.add_completion_queue(CompletionQueue(0, acq, cq_size, vector=0, interrupt=True))
        engine.add_submission_queue(SubmissionQueue(0, asq, sq_size, cqid=0))
        self._wakeup.set()

    def _make_engine(self, host: ModelHost, page_size: int) -> QueueEngine:
        epoch = Epoch()
        dma = DmaPort(
            epoch, host.memory, page_size, self._cmb, lambda address, count: self.client_memory_written(address, count)
        )
        engine = QueueEngine(
            self.state,
            epoch,
            dma,
            self._lane,
            notify=self.interrupts.notify,
            fatal=lambda reason: self._fatal(engine, reason),
            failed=self._command_failed,
            clear_doorbell=self.doorbells.clear,
            entry_sizes_valid=self._entry_sizes_valid,
        )
        admin = AdminCommands(
            dma,
            self.state,
            engine,
            self.limits,
            features=self.features,
            identify=self._identify,
            logs=self.logs,
            events=self._events,
        )
        io = IoCommands(dma, self._lane, self.namespaces, self.limits, self.features, self.state.counters)
        engine.use(admin.handlers, io.handlers, self._events.abort)
        return engine

    def _entry_sizes_valid(self) -> bool:
        cc = self.registers[ControllerRegister.CC]
        sizes = (cc & Cc.IOSQES) >> CC_IOSQES_SHIFT, (cc & Cc.IOCQES) >> CC_IOCQES_SHIFT
        return sizes == (_SQES_SHIFT, _CQES_SHIFT)

    def _disable(self) -> None:
        """Do what a controller reset (CC.EN cleared) does."""
        self._drop_epoch()
        self.registers.controller_reset()
        if self._running is not None:
            self._set_status(Csts.RDY)

    def _drop_epoch(self) -> None:
        self.suspender.end()
        if self._engine is not None:
            self._engine.epoch.end()
            self._engine = None
        self._flush_wanted = False
        self.state.drop_queues()
        self.interrupts.reset()

    def reset(self) -> None:
        """Go to the power-on state at once: function-level reset, or a reset of the device by the VMM."""
        self._drop_epoch()
        self.registers.power_on()
        self.doorbells.clear()
        if self._cmb is not None:
            self._cmb.control(0)
            self._cmb.memory.clear()

    def forget(self) -> None:
        """After `reset`: forget what outlives every reset, such as saved features and what the logs have counted."""
        self.state.take(ControllerState())
        self.logs.power_on_s, self.features.timestamp_ms = 0.0, None

    def freeze(self) -> None:
        """The client has gone: touch no memory until the next client's guest has reset the controller.

        Registers and queues stay as they were, but for CSTS.CFS, which tells a driver that it has to reset. A suspended
        controller stays as it is until it goes on.
        """
        if self.suspender.suspended:
            self.suspender.note_client_lost()
            return
        if self._engine is not None:
            self._engine.epoch.end()
            self.state.frozen = True
            self._set_status(Csts.CFS)
            self._finish_shutdown_alone()
        self.interrupts.release()

    def _fatal(self, engine: QueueEngine, reason: str) -> None:
        """Stop for good; only a reset helps. What fails in a life that is over does not concern the next one."""
        if engine is not self.live_engine:
            return
        # Any guest can cause this, and any client that goes under I/O does, so it is no warning.
        _log.info("%s: fatal error: %s", self.identity.serial, reason)
        self._set_status(Csts.CFS)
        engine.epoch.end()
        self._finish_shutdown_alone()

    # Shutdown

    def _shut_down(self) -> None:
        self._shutdowns += 1
        self.state.shut_down = True
        self._set_status(Csts.SHST_OCCURRING, clear=Csts.SHST)
        engine = self._engine
        if engine is not None and engine.epoch.alive:
            engine.epoch.start_soon(lambda: self._quiesce(engine))
        else:
            self._flush_wanted = True
            self._wakeup.set()

    def _finish_shutdown_alone(self) -> None:
        """The epoch has ended, and with it the task that was to complete a shutdown: complete it without the queues."""
        if self._status() & Csts.SHST == Csts.SHST_OCCURRING:
            self._flush_wanted = True
            self._wakeup.set()

    async def _quiesce(self, engine: QueueEngine) -> None:
        await engine.quiesce()
        await self._finish_shutdown()

    async def _finish_shutdown(self) -> None:
        number = self._shutdowns
        for namespace in self.namespaces.values():
            try:
                await namespace.flush()
            except NvmeError as error:
                _log.error("%s: shutdown without a flush: %s", self.identity.serial, error)
                self.logs.add_error(error.field, nsid=namespace.nsid)
        if (
            self.state.shut_down and number == self._shutdowns
        ):  # else a reset, or another shutdown after one, came first
            self._set_status(Csts.SHST_COMPLETE, clear=Csts.SHST)

    # Suspension: what `Suspender` asks of its owner

    @property
    def live_engine(self) -> QueueEngine | None:
        """The queues, if anything may happen in them."""
        engine = self._engine
        return engine if engine is not None and engine.epoch.alive else None

    def wake(self) -> None:
        """Have `run` look at what there is to do."""
        self._wakeup.set()

    async def quiet(self) -> None:
        """Wait for accesses to the client's memory that outlive their tasks."""
        if self._host is not None:
            await self._host.memory.quiet()

    def hold_still(self) -> Clocks:
        """Every task has ended: prepare the state for being saved, and raise nothing any more."""
        self.state.carry_over()
        self.interrupts.hold()
        return Clocks(self.logs.power_on_s, self.features.timestamp_ms)

    def go_on(self, suspension: Suspension) -> None:
        """Go on after a suspension, with the queues that the state holds."""
        self.logs.power_on_s, self.features.timestamp_ms = suspension.clocks
        cc, csts = self.registers[ControllerRegister.CC], self._status()
        occurring = csts & Csts.SHST == Csts.SHST_OCCURRING
        if self._host is not None and cc & Cc.EN and not csts & Csts.CFS:
            engine = self._engine = self._make_engine(self._host, 1 << _page_shift(cc))
            engine.serve_existing()
            if occurring:
                engine.epoch.start_soon(lambda: self._quiesce(engine))
            elif self.state.shut_down:
                engine.halt()
        elif occurring:
            self._flush_wanted = True
        self.interrupts.release_hold()
        if suspension.replaced and not suspension.client_lost:
            for queue in self.state.completion_queues.values():
                if queue.head != queue.tail:
                    self.interrupts.notify(queue)

    @property
    def clocks(self) -> Clocks:
        """What counts time; it stands still during a suspension."""
        return self.suspender.clocks or Clocks(self.logs.power_on_s, self.features.timestamp_ms)

    def take(
        self,
        state: ControllerState,
        registers: bytes,
        interrupt_mask: int,
        kept_writes: list[tuple[int, bytes]],
        clocks: Clocks,
    ) -> None:
        """Replace the whole state of a suspended controller.

        Args:
            state: queues, features, events and logs.
            registers: the register page; what says how this controller was built stays.
            interrupt_mask: INTMS.
            kept_writes: writes to BAR0 to carry out first when the controller goes on: offset, data.
            clocks: what counts time.
        """
        self.suspender.replaced(kept_writes, clocks)
        self._engine = None
        self._flush_wanted = False
        self.state.take(state)
        self.registers.load(registers)
        self.interrupts.mask = interrupt_mask
        if self._cmb is not None:
            self._cmb_control_written(0, self.registers[ControllerRegister.CMBMSC])

    # Doorbells, events, errors

    def _doorbell(self, number: int, value: int) -> None:
        engine = self._engine
        if engine is None or not engine.epoch.alive or self.state.shut_down:
            return
        problem = engine.ring(number, value)
        if problem is None:
            if number & 1:
                self.interrupts.update_level()
            return
        _log.debug("%s: doorbell %d, value %#x: %s", self.identity.serial, number, value, problem.name)
        self._report_error(problem)

    def _report_error(self, event: ErrorEvent) -> None:
        self.logs.add_error(status_field(StatusCode.INVALID_FIELD))
        self._events.report(EventType.ERROR, event, LogPage.ERROR)

    def namespace_changed(self, nsid: int) -> None:
        """Tell the host that a namespace is not what it was."""
        self.state.changed_namespaces.add(nsid)
        if self.features.value(FeatureId.ASYNC_EVENT_CONFIG) >> _NOTIFY_NAMESPACE & 1:
            self._events.report(EventType.NOTICE, NoticeEvent.NAMESPACE_CHANGED, LogPage.CHANGED_NAMESPACES)

    def _complete_event(self, cid: int, result: int) -> None:
        if self._engine is not None:
            self._engine.complete(0, cid, 0, result)

    def _command_failed(
        self, status: int, queue: SubmissionQueue, command: SubmissionEntry, error: NvmeError | None
    ) -> None:
        location, lba = (0xFFFF, 0) if error is None else (error.location, error.lba)
        if error is not None and error.status in (StatusCode.WRITE_FAULT, StatusCode.UNRECOVERED_READ):
            self.state.counters.media_errors += 1
        self.logs.add_error(status, sqid=queue.qid, cid=command.cid, location=location, lba=lba, nsid=command.nsid)


def _page_shift(cc: int) -> int:
    return _MIN_PAGE_SHIFT + ((cc & Cc.MPS) >> CC_MPS_SHIFT)
