"""Log pages.

Spec: NVMe 1.4, 5.14.1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable

from vfiouser_soc.nvme.config import TEMPERATURE_K, ControllerIdentity
from vfiouser_soc.nvme.layout import ascii_field, pack_fields
from vfiouser_soc.nvme.spec import AdminOpcode, IoOpcode, LogPage, NvmeError, StatusCode
from vfiouser_soc.nvme.state import ERROR_LOG_ENTRIES, ControllerState, ErrorEntry

_ERROR_ENTRY = struct.Struct("<QHHHHQI")
_ERROR_ENTRY_SIZE = 64
_SMART_SIZE = 512
_FIRMWARE_SIZE = 512
_LIST_SIZE = 4096
_COMMANDS_SIZE = 4096
_UNKNOWN_SQ = 0xFFFF
_TEMPERATURE_WARNING = 1 << 1

_SUPPORTED = 1 << 0
_CHANGES_CONTENT = 1 << 1
_CONTENT_CHANGING = frozenset({IoOpcode.WRITE, IoOpcode.WRITE_ZEROES, IoOpcode.DATASET_MANAGEMENT})


class Logs:
    """Keeps the error log and makes log pages.

    Args:
        state: what there is to report.
        identity: for the firmware revision.
        clock: seconds, monotonic.
        temperature_exceeded: whether a temperature threshold is exceeded.
    """

    def __init__(
        self,
        state: ControllerState,
        identity: ControllerIdentity,
        clock: Callable[[], float],
        temperature_exceeded: Callable[[], bool],
    ) -> None:
        self._state = state
        self._identity = identity
        self._clock = clock
        self._started = clock()
        self._temperature_exceeded = temperature_exceeded
        self._builders: dict[int, Callable[[], bytes]] = {
            LogPage.ERROR: self._errors,
            LogPage.SMART: self._smart,
            LogPage.FIRMWARE_SLOT: self._firmware,
            LogPage.CHANGED_NAMESPACES: self._changed_namespaces,
            LogPage.COMMANDS_SUPPORTED: self._commands,
        }

    @property
    def power_on_s(self) -> float:
        """Seconds for which the controller has been powered, wherever it was."""
        return self._clock() - self._started

    @power_on_s.setter
    def power_on_s(self, seconds: float) -> None:
        self._started = self._clock() - seconds

    def page(self, number: int) -> bytes:
        """Make a whole log page.

        Raises:
            NvmeError: there is no such page.
        """
        builder = self._builders.get(number)
        if builder is None:
            raise NvmeError(StatusCode.INVALID_LOG_PAGE, f"log page {number:#04x}", location=40)
        return builder()

    def was_read(self, number: int) -> None:
        """Forget what reading a page acknowledges."""
        if number == LogPage.CHANGED_NAMESPACES:
            self._state.changed_namespaces.clear()

    def add_error(
        self,
        status: int,
        *,
        sqid: int = _UNKNOWN_SQ,
        cid: int = 0xFFFF,
        location: int = 0xFFFF,
        lba: int = 0,
        nsid: int = 0,
    ) -> None:
        """Enter an error.

        Args:
            status: 15-bit status field.
            sqid: the submission queue, 0xFFFF if it concerns none.
            cid: the command id.
            location: byte and bit at fault.
            lba: first block concerned.
            nsid: the namespace concerned.
        """
        self._state.counters.error_entries += 1
        count = self._state.counters.error_entries
        self._state.errors.appendleft(ErrorEntry(count, sqid, cid, status, location, lba, nsid))

    def _errors(self) -> bytes:
        entries = b"".join(
            _ERROR_ENTRY.pack(
                entry.number, entry.sqid, entry.cid, entry.status << 1, entry.location, entry.lba, entry.nsid
            ).ljust(_ERROR_ENTRY_SIZE, b"\0")
            for entry in self._state.errors
        )
        return entries.ljust(ERROR_LOG_ENTRIES * _ERROR_ENTRY_SIZE, b"\0")

    def _smart(self) -> bytes:
        counters = self._state.counters
        return pack_fields(
            _SMART_SIZE,
            (
                (0, "B", _TEMPERATURE_WARNING if self._temperature_exceeded() else 0),
                (1, "H", TEMPERATURE_K),
                (3, "B", 100),  # available spare, per cent
                (4, "B", 10),  # spare threshold
                (32, "O", _data_units(counters.bytes_read)),
                (48, "O", _data_units(counters.bytes_written)),
                (64, "O", counters.read_commands),
                (80, "O", counters.write_commands),
                (112, "O", counters.power_cycles),
                (128, "O", int(self.power_on_s) // 3600),
                (144, "O", counters.unsafe_shutdowns),
                (160, "O", counters.media_errors),
                (176, "O", counters.error_entries),
                (200, "H", TEMPERATURE_K),
            ),
        )

    def _firmware(self) -> bytes:
        return pack_fields(_FIRMWARE_SIZE, ((0, "B", 1), (8, "s", ascii_field(self._identity.firmware, 8))))

    def _changed_namespaces(self) -> bytes:
        ids = sorted(self._state.changed_namespaces)[: _LIST_SIZE // 4]
        return struct.pack(f"<{len(ids)}I", *ids).ljust(_LIST_SIZE, b"\0")

    def _commands(self) -> bytes:
        return pack_fields(
            _COMMANDS_SIZE, (*_effects(0, AdminOpcode, ()), *_effects(1024, IoOpcode, _CONTENT_CHANGING))
        )


def _effects(start: int, opcodes: Iterable[int], changing: Collection[int]) -> list[tuple[int, str, int]]:
    return [
        (start + 4 * opcode, "I", _SUPPORTED | (_CHANGES_CONTENT if opcode in changing else 0)) for opcode in opcodes
    ]


def _data_units(count: int) -> int:
    """Thousands of 512-byte units, rounded up."""
    return -(-count // 512_000)
