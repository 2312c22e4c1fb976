"""Carries a replay out: writes what QEMU keeps of a function, as the function's own DMA, and reads it back.

QEMU carries a function's messages out in their order, and all that it has before it starts the VM. So everything is
sent at once (writes, what is to be read back, and what comes last), and only then waited for: a carrier may be answered
in between, behind which QEMU's main loop stands still.

    prepare (QEMU waits for its VM) ─► send ─► (the carrier is answered) ─► finish ─► the function may run

A machine without ECAM has its configuration behind ports, which only the human monitor reaches. QEMU carries its lines
out when its main loop is free, and that may be only after the VM runs. So such a machine is refused at its source.

Rule: *never after the VM runs*. The guest may have changed what is written then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import trio

from vfiouser_oob.devices.base import BackendSession, ClientLink
from vfiouser_oob.memory.recorder import SentRead, SentWrite
from vfiouser_oob.vm.registers import FunctionRegisters, QemuMonitor, shape_of
from vfiouser_oob.vm.replay import (
    ConfigWrite,
    MemoryWrite,
    ReadBack,
    ReplayPlan,
    is_as_reset,
    plan_replay,
    through_ecam,
)
from vfiouser_oob.vm.topology import (
    DEPTH_MAX,
    SPARE_BUS,
    Bdf,
    Slot,
    TopologyError,
    bridge_of,
    early_master,
    parse_slot,
)
from vfiouser_protocol.errors import DmaFault
from vfiouser_protocol.pci_header import ConfigOffset

#: Seconds between two attempts: the machine's own state may not have been loaded when the first one was carried out.
_AGAIN_S = 0.005
_NAMES: Mapping[int, str] = MappingProxyType(
    {
        **{ConfigOffset.BAR0 + 4 * bar: f"BAR {bar}" for bar in range(6)},
        ConfigOffset.COMMAND: "the command register",
        ConfigOffset.INTERRUPT_LINE: "the interrupt line",
        ConfigOffset.ROM: "the ROM's BAR",
    }
)

Step: TypeAlias = "ConfigWrite | MemoryWrite"


class ReplayFailed(Exception):
    """QEMU does not have of a function what it had at the source; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class FunctionReplay:
    """All that is to be done for one function.

    Args:
        name: the function's.
        plan: what is written.
        place: where the function is.
        ecam: where ECAM begins; None if it is not known.
        needed: the function has been set up since its reset. Else it is enough to try.
    """

    name: str
    plan: ReplayPlan
    place: Bdf
    ecam: int | None
    needed: bool = True


def replay_of(name: str, registers: FunctionRegisters, session: BackendSession) -> FunctionReplay:
    """What is to be done for a function.

    Args:
        name: its name.
        registers: what came from the source.
        session: the device as its client has it here.

    Raises:
        ReplayFailed: it does not fit.
    """
    try:
        shape = shape_of(session, registers.head)
        plan = plan_replay(registers.view, shape)
    except ValueError as error:
        raise ReplayFailed(f"{name}: {error}") from error
    needed = not is_as_reset(registers.view.written, shape)
    if needed and registers.ecam is None:
        raise ReplayFailed(f"{name}: its machine has no ECAM, by which its registers could be written")
    return FunctionReplay(name, plan, registers.place, registers.ecam, needed)


async def prepare(monitor: QemuMonitor, names: Sequence[str]) -> None:
    """Let functions do DMA in a QEMU that waits for its VM.

    Args:
        monitor: that QEMU's.
        names: the functions'.

    Raises:
        TopologyError: QEMU has no such function.
        MonitorError: it does not answer.
    """
    spare = SPARE_BUS
    for name in names:
        path = await path_to(monitor, name)
        for line in early_master(path, spare):
            await monitor.hmp(line)
        spare += len(path) - 1


async def path_to(monitor: QemuMonitor, name: str) -> list[Slot]:
    """The bridges from the root bus down to a function, and itself.

    Args:
        monitor: its QEMU's.
        name: the function's.

    Raises:
        TopologyError: QEMU has no such function, or nobody can reach it.
        MonitorError: it does not answer.
    """
    path: list[Slot] = []
    above: str | None = name
    while above is not None:
        if len(path) >= DEPTH_MAX:
            raise TopologyError(f"{name} is behind more than {DEPTH_MAX} bridges")
        where = f"/machine/peripheral/{above}"
        path.insert(0, parse_slot(await monitor.execute("qom-get", {"path": where, "property": "addr"})))
        above = bridge_of(await monitor.execute("qom-get", {"path": where, "property": "parent_bus"}))
    return path


class ReplayUnderWay:
    """A replay that was sent as DMA, and may have been carried out.

    Args:
        replay: what is done.
        bus: the function's client.
        sent: it was sent before, and the VM may run, so it is only read back.

    Raises:
        ReplayFailed: it cannot be sent.
    """

    def __init__(self, replay: FunctionReplay, bus: ClientLink, *, sent: bool = False) -> None:
        self._replay = replay
        self._bus = bus
        self._sent = sent
        self._writes: list[tuple[str, SentWrite]] = []
        self._reads: list[tuple[ReadBack, SentRead]] = []
        self._send()

    def _send(self) -> None:
        replay, ecam = self._replay, self._replay.ecam
        self._writes, self._reads = [], []
        if ecam is None:
            return
        try:
            if not self._sent:
                self._write(replay.plan.steps, through_ecam(replay.plan.steps, replay.place, ecam))
            for check in _checks(replay, ecam):
                self._reads.append((check, self._bus.send_read(check.address, len(check.data))))
            if not self._sent:
                self._write(replay.plan.closing, through_ecam(replay.plan.closing, replay.place, ecam))
        except DmaFault as error:
            raise ReplayFailed(f"{replay.name}: its registers cannot be written: {error}") from error

    def _write(self, steps: Sequence[Step], writes: Sequence[MemoryWrite]) -> None:
        for step, write in zip(steps, writes, strict=True):
            what = f"writing {_shown(write.data)} to {_name(step)} at {write.address:#x}"
            self._writes.append((what, self._bus.bus_write(write.address, write.data)))

    async def finish(self, may_write: Callable[[], bool]) -> None:
        """Wait until it is carried out, and judge what was read back; if that is wrong, it is sent once more.

        Args:
            may_write: whether the VM does not run yet, so that it may be.

        Raises:
            ReplayFailed: it is wrong, and may not be sent any more.
        """
        while True:
            failure = await self._outcome()
            if not failure or not self._replay.needed:
                return
            if not may_write():
                raise ReplayFailed(f"{self._replay.name}: {failure}")
            await trio.sleep(_AGAIN_S)
            if may_write():
                self._send()

    async def _outcome(self) -> str:
        failure = ""
        for what, write in self._writes:
            try:
                await write.wait()
            except DmaFault as error:
                failure = failure or f"{what} failed: {error}"
        for check, read in self._reads:
            try:
                failure = failure or check.failure(await read.wait())
            except DmaFault as error:
                failure = failure or f"reading {check.what} back failed: {error}"
        return failure


def _checks(replay: FunctionReplay, ecam: int) -> list[ReadBack]:
    writes = through_ecam(replay.plan.steps, replay.place, ecam)
    return [
        ReadBack(write.address, write.data, write.mask, f"{_name(step)} at {write.address:#x}")
        for step, write in zip(replay.plan.steps, writes, strict=True)
        if any(write.mask)
    ]


def _name(step: Step) -> str:
    if isinstance(step, MemoryWrite):
        return "the MSI-X table"
    return _NAMES.get(step.offset, f"configuration register {step.offset:#x}")


def _shown(data: bytes) -> str:
    return f"0x{int.from_bytes(data, 'little'):0{2 * len(data)}x}" if len(data) <= 4 else f"{len(data)} bytes"
