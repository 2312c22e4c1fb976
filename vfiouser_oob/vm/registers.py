"""What QEMU keeps of a function, read at the source: configuration as written, the MSI-X table, and where it is.

The guest's writes to configuration space are forwarded to us. The table never is, so it is read by the function itself,
by DMA to its own BAR, which QEMU answers only while its main loop goes on. That may not be so any more when the guest's
processors stand. So the table is read while the VM runs, again when the client sets up vectors (that is how QEMU shows
that the guest has changed it), and once more at the end if there is an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from vfiouser_oob.devices.base import BackendSession, ClientLink
from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_oob.vm.monitor import MonitorError, RefusedError
from vfiouser_oob.vm.replay import FunctionShape, SourceView, is_as_reset, table_at, written_bytes
from vfiouser_oob.vm.topology import ECAM_QUERY, Bdf, TopologyError, ecam_base, find_device
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.errors import DmaFault
from vfiouser_protocol.pci_header import CommandBits, ConfigOffset

_VERSION = 1
_HEAD = 256
#: Where a function is that nobody has to find.
_NOWHERE = Bdf(0, 0)
_CONFIG_MAX = 4096
_TABLE_MAX = 2048 * 16
_BARS = 6
_REACH = CommandBits.MEMORY | CommandBits.BUS_MASTER
#: Seconds between two looks whether the table was changed.
_LOOK_S = 0.05
#: Looks after which it is read all the same: a guest may change an entry without masking it, which nobody shows.
_LOOKS_AT_MOST = 10


class RegistersUnknown(Exception):
    """What QEMU keeps of a function cannot be known; the text says why."""


class QemuMonitor(Protocol):
    """A QEMU's monitor, as far as it is needed here (`vm.monitor.Monitor`)."""

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Have a command carried out."""
        ...

    async def hmp(self, line: str) -> str:
        """Have a line of the human monitor carried out."""
        ...


@dataclass(frozen=True, slots=True)
class FunctionRegisters:
    """What travels of a function beside its own state.

    Args:
        place: where it is in the guest's hierarchy.
        ecam: where the machine's ECAM begins; None if it has none.
        view: configuration as written, and the table.
        head: the first 256 bytes of configuration space as read.
        missing: what is not known, for people.
    """

    place: Bdf
    ecam: int | None
    view: SourceView
    head: bytes
    missing: tuple[str, ...] = field(default=())

    def to_bytes(self) -> bytes:
        """Write it down."""
        return json.dumps(
            {
                "version": _VERSION,
                "place": [self.place.bus, self.place.device, self.place.function],
                "ecam": self.ecam,
                "written": {str(offset): byte for offset, byte in sorted(self.view.written.items())},
                "table": self.view.table.hex(),
                "head": self.head.hex(),
                "missing": list(self.missing),
            }
        ).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> FunctionRegisters:
        """Read what `to_bytes` wrote.

        Args:
            payload: what came.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        try:
            values = json.loads(payload)
            if values["version"] != _VERSION:
                raise ValueError(f"registers of version {values['version']!a}; this daemon reads {_VERSION}")
            bus, device, function = (_number(value, 256) for value in values["place"])
            written = {_number(int(at), _CONFIG_MAX): _number(byte, 256) for at, byte in values["written"].items()}
            table, head = bytes.fromhex(values["table"]), bytes.fromhex(values["head"])
            ecam = None if values["ecam"] is None else _number(values["ecam"], 1 << 64)
            missing = tuple(str(each)[:200] for each in values["missing"])
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"damaged registers of a function: {error}") from error
        if len(table) > _TABLE_MAX or len(head) != _HEAD:
            raise ValueError(f"damaged registers: a table of {len(table)} bytes, a head of {len(head)}")
        return cls(Bdf(bus, device & 31, function & 7), ecam, SourceView(written, table), head, missing)


def _number(value: Any, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise ValueError(f"{value!a} is not a number below {limit}")
    return value


def shape_of(session: BackendSession, head: bytes) -> FunctionShape:
    """What a function looks like, from its device here.

    Args:
        session: the device as its client has it.
        head: the first 256 bytes of its configuration space.
    """
    regions = session.description.regions
    sizes = {bar: regions[bar].size for bar in range(_BARS) if regions[bar].size}
    return FunctionShape(head, sizes, regions[RegionIndex.ROM].size)


class RegisterReader:
    """Knows what QEMU keeps of one function; made when its client has attached.

    Args:
        name: the function's.
        session: the device as its client has it.
        shadow: configuration space as the client wrote it.
        bus: the client.
    """

    def __init__(self, name: str, session: BackendSession, shadow: ConfigShadow, bus: ClientLink) -> None:
        self.name = name
        self._session = session
        self._shadow = shadow
        self._bus = bus
        self._monitor: QemuMonitor | None = None
        self._place: Bdf | None = None
        self._ecam: int | None = None
        self._table = b""
        #: What `vector_changes` was when the table was read; it is not known while that is another number.
        self._read_at = -1

    async def locate(self, monitor: QemuMonitor) -> None:
        """Find out where the function is; at the beginning of a migration, when QEMU still answers.

        Before firmware has begun it is nowhere yet, and nobody has set it up; then it is looked for again.

        Args:
            monitor: QEMU's.

        Raises:
            RegistersUnknown: the destination could not write its registers.
            MonitorError: QEMU does not answer.
        """
        self._monitor = monitor
        try:
            self._ecam = ecam_base(await monitor.execute("qom-get", ECAM_QUERY))
        except RefusedError:
            raise RegistersUnknown(
                f"the destination could not write the registers of {self.name}: the machine has no ECAM (use q35)"
            ) from None
        try:
            self._place = find_device(await monitor.execute("query-pci"), self.name)
        except TopologyError:  # behind a bridge that has no bus yet
            self._place = None
        await self._require_found(await self._head())

    async def _require_found(self, head: bytes) -> None:
        """Refuse a function that somebody has set up and that the destination would not find."""
        if self._place is not None and self._ecam is not None:
            return
        if not is_as_reset(written_bytes(self._shadow.writes()), shape_of(self._session, head)):
            why = "firmware has not turned ECAM on" if self._ecam is None else "it is on no bus"
            raise RegistersUnknown(f"the destination could not write the registers of {self.name}: {why}")

    async def watch(self) -> None:
        """Know the table and the function's place at any time, until cancelled; as long as a migration is under way."""
        looks = 0
        while True:
            if looks % _LOOKS_AT_MOST == 0 or not self._current:
                await self.look()
            if looks % _LOOKS_AT_MOST == 0 or self._place is None or self._ecam is None:
                await self._look_where()
            looks += 1
            await trio.sleep(_LOOK_S)

    async def _look_where(self) -> None:
        """Find it again: firmware that has begun anew may have put it somewhere else."""
        if self._monitor is not None:
            with suppress(RegistersUnknown, MonitorError):  # whether what is known will do is found out in the end
                await self.locate(self._monitor)

    @property
    def _current(self) -> bool:
        return self._read_at == self._shadow.vector_changes

    async def look(self) -> None:
        """Read the table, if it can be reached and QEMU answers."""
        written = written_bytes(self._shadow.writes())
        if _command(written) & _REACH != _REACH:
            return
        head = await self._head()
        where = table_at(written, shape_of(self._session, head))
        changes = self._shadow.vector_changes
        if where is None:
            self._table, self._read_at = b"", changes
            return
        try:
            table = await self._bus.send_read(*where).wait()
        except DmaFault:  # the guest has just moved it, or turned it off
            return
        self._table, self._read_at = table, changes

    async def _head(self) -> bytes:
        head = self._session.region_read(RegionIndex.CONFIG, 0, _HEAD)
        return head if isinstance(head, bytes) else await head

    async def collect(self, seconds: float) -> FunctionRegisters:
        """What travels; the guest's processors stand.

        Args:
            seconds: for which QEMU's answer is waited for; it may be unable to give one.

        Raises:
            RegistersUnknown: the table may have changed since it was read, or nobody knows where the function is.
            VfioUserError: the device does not answer.
        """
        if self._monitor is None:
            raise RegistersUnknown(f"it was not found out where {self.name} is in its VM")
        head = await self._head()
        await self._require_found(head)
        with trio.move_on_after(seconds):
            await self._look_for_the_last_time(head)
        missing: tuple[str, ...] = ()
        written = written_bytes(self._shadow.writes())
        shape = shape_of(self._session, head)
        has_table = table_at(written, shape) is not None
        if has_table and not self._current:
            if _command(written) & _REACH == _REACH:
                raise RegistersUnknown(
                    f"QEMU did not answer what is in the MSI-X table of {self.name}, since it saves already; try again"
                )
            missing = (f"the MSI-X table of {self.name}, which the guest has switched off",)
        view = SourceView(written, self._table if has_table and not missing else b"")
        return FunctionRegisters(self._place or _NOWHERE, self._ecam, view, head, missing)

    async def _look_for_the_last_time(self, head: bytes) -> None:
        written = written_bytes(self._shadow.writes())
        command = _command(written)
        if command & _REACH == _REACH:
            await self.look()
        elif command & CommandBits.BUS_MASTER and self._ecam is not None and self._place is not None:
            where = table_at(written, shape_of(self._session, head))
            if where is None:
                return
            # The guest's processors stand, so nobody sees that its memory is on for a moment.
            register = self._place.ecam(self._ecam, ConfigOffset.COMMAND)
            changes = self._shadow.vector_changes
            try:
                self._bus.bus_write(register, (command | _REACH).to_bytes(2, "little"))
                table = self._bus.send_read(*where)
                self._bus.bus_write(register, command.to_bytes(2, "little"))
                self._table, self._read_at = await table.wait(), changes
            except DmaFault:
                return


def _command(written: Mapping[int, int]) -> int:
    return written.get(ConfigOffset.COMMAND, 0) | written.get(ConfigOffset.COMMAND + 1, 0) << 8
