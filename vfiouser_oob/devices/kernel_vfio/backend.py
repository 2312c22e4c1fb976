"""The backend of a real function: who may have the device, and when.

The device is held only while a client uses it. A client that maps BARs holds a device descriptor of its own and could
go on driving the device after its connection ended. So all descriptors of ours are closed then, and opened anew for the
next client: while the old one has anything left, the kernel answers EBUSY, and the next client is refused.
"""

from __future__ import annotations

import time
from functools import partial

import trio

from vfiouser_agents.api import Agent
from vfiouser_oob.config.schema import RegionPolicy, VfioInterface
from vfiouser_oob.devices.base import BackendSession, BackendUnavailable, ClientLink, DeviceBackend
from vfiouser_oob.devices.kernel_vfio.kernel import Kernel
from vfiouser_oob.devices.kernel_vfio.migration_agent import KernelAgent
from vfiouser_oob.devices.kernel_vfio.migration_device import MigrationDevice
from vfiouser_oob.devices.kernel_vfio.migration_function import KernelFunction
from vfiouser_oob.devices.kernel_vfio.openers import DeviceBusy, OpenDevice, Opener, choose_opener, opener_of
from vfiouser_oob.devices.kernel_vfio.session import KernelVfioSession
from vfiouser_oob.devices.kernel_vfio.worker import Job, OrderedWorker
from vfiouser_oob.observability import log
from vfiouser_oob.persist.successor.notes import Inheritance
from vfiouser_protocol.constants import Command

#: How long a client that attaches waits for a predecessor whose process is just ending.
HANDOVER_S = 1.0
_HANDOVER_STEP_S = 0.05
#: How often a device that could not be had is looked at again: at first, and at most.
RETRY_S = 1.0
_MAX_RETRY_S = 30.0


#: What the process after this one may begin once more: a write to a register is not among it, but for config space.
REPEATABLE = frozenset(
    {
        Command.DMA_MAP,
        Command.DMA_UNMAP,
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_IRQ_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
        Command.DEVICE_SET_IRQS,
        Command.REGION_READ,
        Command.REGION_WRITE,
        Command.DEVICE_RESET,
    }
)


class KernelVfioBackend(DeviceBackend):
    """A PCI function that is bound to vfio-pci, or a mediated device.

    Args:
        kernel: the operating system.
        name: the function's address, such as ``0000:3b:00.2``, or the mediated device's UUID.
        policy: how a client may map its regions.
        interface: the kernel's interface that opens it.
        handover_s: seconds that a client waits for a device that is in use.
        retry_s: seconds after which a device that could not be had is looked at again.
    """

    def __init__(
        self,
        kernel: Kernel,
        name: str,
        policy: RegionPolicy = RegionPolicy.AUTO,
        *,
        interface: VfioInterface = VfioInterface.AUTO,
        handover_s: float = HANDOVER_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self.summary = f"kernel-vfio:{name}"
        # The driver of a mediated device asks for memory by the addresses of the process that has mapped it.
        self.survives = ":" in name
        self._kernel = kernel
        self._name = name
        self._policy = policy
        self._interface = interface
        self._handover_s = handover_s
        self._retry_s = retry_s
        self._log = log.get("devices.kernel_vfio").bind(device=name)
        self._worker = OrderedWorker()
        self._running = trio.Event()
        self._goes_on = False
        self._unavailable: str | None = None
        self._unavailable_since: float | None = None
        self._trouble = trio.Event()
        self._function = KernelFunction(name)

    repeatable = REPEATABLE

    @property
    def unavailable(self) -> str | None:
        """Why no client can be served now."""
        return self._unavailable

    @property
    def unavailable_since(self) -> float | None:
        """Since when that is so."""
        return self._unavailable_since

    def agent(self) -> Agent:
        """The migration that the function's kernel driver has of its own."""
        return KernelAgent(self._function, self._worker, self._learn)

    def _learn(self) -> None:
        if self._function.caps is None:
            opened = self._opener().open()
            try:
                self._function.learn(MigrationDevice(self._kernel, opened.device), opened.space)
            finally:
                opened.close()

    async def run(self) -> None:
        """Do the device's thread work, and watch a device that could not be had."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._worker.run)
            self._running.set()
            try:
                await self._worker.submit(Job(self._probe))
            except BackendUnavailable as error:
                if not self._goes_on:  # the device is in use by our own client
                    self._note(str(error))
            nursery.start_soon(self._watch)

    async def open(self, link: ClientLink) -> BackendSession:
        """Open the device for a client."""
        await self._running.wait()
        try:
            opened = await self._open_patiently()
        except BackendUnavailable as error:
            self._note(str(error))
            raise
        self._note(None)
        session = self._session(opened, link)
        session.begin_notes()
        return session

    async def resume(self, link: ClientLink, inheritance: Inheritance) -> BackendSession:
        """Go on with a device that was never closed."""
        self._goes_on = True
        await self._running.wait()
        opened = await self._worker.submit(Job(partial(self._adopt, inheritance), OpenDevice.close))
        self._note(None)
        session = self._session(opened, link, known=len(inheritance.ranges))
        try:
            session.restore(inheritance)
        except BaseException:
            await session.close()
            raise
        return session

    def _adopt(self, left: Inheritance, job: Job[OpenDevice]) -> OpenDevice:
        handles = {thing.number: fd for thing, fd in left.kernel}
        spaces = {thing.space for thing, _ in left.kernel}
        return opener_of(self._kernel, self._name, handles).adopt(handles, max(spaces, default=0))

    def _session(self, opened: OpenDevice, link: ClientLink, known: int = 0) -> KernelVfioSession:
        try:
            if opened.space.max_maps is not None:
                opened.space.max_maps += known
            self._function.attach(MigrationDevice(self._kernel, opened.device), opened.space)
            return KernelVfioSession(
                self._kernel, opened, self._policy, self._worker, link, self._log, self._function.detach
            )
        except BaseException as error:
            self._function.detach()
            opened.close()
            if isinstance(error, OSError):
                raise BackendUnavailable(f"{self._name} cannot be described: {error.strerror}") from error
            raise

    async def _open_patiently(self) -> OpenDevice:
        until = trio.current_time() + self._handover_s
        while True:
            try:
                return await self._worker.submit(Job(self._open, OpenDevice.close))
            except DeviceBusy:
                if trio.current_time() >= until:
                    raise
            await trio.sleep(_HANDOVER_STEP_S)

    def _opener(self) -> Opener:
        return choose_opener(self._kernel, self._name, self._interface)

    def _open(self, job: Job[OpenDevice]) -> OpenDevice:
        opener = self._opener()
        opened = opener.open()
        self._log.debug("device opened", interface=opener.interface.value)
        try:
            if MigrationDevice(self._kernel, opened.device).settle():
                self._log.warning("the function was still in a migration that nobody is in any more; it was reset")
        except OSError as error:
            opened.close()
            raise BackendUnavailable(
                f"{self._name} is left in a migration that is over, and its reset failed: {error.strerror}"
            ) from error
        return opened

    def _probe(self, job: Job[None]) -> None:
        self._opener().probe()

    def _note(self, reason: str | None) -> None:
        if reason == self._unavailable:
            return
        if reason is not None:
            self._log.warning("the device cannot be used now; it is looked at again", reason=reason)
            self._trouble.set()
        else:
            self._log.info("the device is usable again")
        if reason is None or self._unavailable is None:
            self._unavailable_since = None if reason is None else time.time()
        self._unavailable = reason

    async def _watch(self) -> None:
        """Look again, ever less often, until the device can be had; no wake-up while all is well."""
        while True:
            await self._trouble.wait()
            self._trouble = trio.Event()
            pause = self._retry_s
            while self._unavailable is not None:
                await trio.sleep(pause)
                pause = min(2 * pause, _MAX_RETRY_S)
                await self._look_again()

    async def _look_again(self) -> None:
        if self._unavailable is None:  # a client got it meanwhile
            return
        try:
            await self._worker.submit(Job(self._probe))
        except BackendUnavailable as error:
            if self._unavailable is not None:
                self._note(str(error))
        else:
            self._note(None)
