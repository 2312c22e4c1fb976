"""Features: what Set Features and Get Features keep, as a table.

Spec: NVMe 1.4, 5.15 and 5.21.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vfiouser_soc.nvme.command import SubmissionEntry
from vfiouser_soc.nvme.config import TEMPERATURE_K, WARNING_TEMPERATURE_K, ControllerLimits
from vfiouser_soc.nvme.spec import BROADCAST_NSID, FeatureId, NvmeError, StatusCode
from vfiouser_soc.nvme.state import FeatureValues

TIMESTAMP_SIZE = 8
_SAVE = 1 << 31
_ALL_SENSORS = 0xF
#: Composite temperature and temperature sensor 1.
_SENSORS = (0, 1)
_TIMESTAMP_BY_HOST = 1 << 1
#: Bit of the asynchronous event configuration, as in the critical warning of the SMART log.
_NOTIFY_TEMPERATURE = 1 << 1


class FeatureSpec(NamedTuple):
    """One feature with a 32-bit value.

    Args:
        writable: bits of the value that are kept.
        default: value that was never set.
        saveable: whether Save is allowed.
        per_namespace: whether each namespace has its own value.
    """

    writable: int
    default: int = 0
    saveable: bool = False
    per_namespace: bool = False


FEATURES: dict[int, FeatureSpec] = {
    FeatureId.ARBITRATION: FeatureSpec(0xFFFF_FF07, saveable=True),
    FeatureId.POWER_MANAGEMENT: FeatureSpec(0xFF),
    FeatureId.TEMPERATURE_THRESHOLD: FeatureSpec(0xFFFF, saveable=True),
    FeatureId.ERROR_RECOVERY: FeatureSpec(0xFFFF, saveable=True, per_namespace=True),
    FeatureId.VOLATILE_WRITE_CACHE: FeatureSpec(1, default=1, saveable=True),
    FeatureId.NUMBER_OF_QUEUES: FeatureSpec(0xFFFF_FFFF),
    FeatureId.INTERRUPT_COALESCING: FeatureSpec(0xFFFF, saveable=True),
    FeatureId.INTERRUPT_VECTOR: FeatureSpec(1 << 16),
    FeatureId.WRITE_ATOMICITY: FeatureSpec(1, saveable=True),
    FeatureId.ASYNC_EVENT_CONFIG: FeatureSpec(0x1FF, saveable=True),
    FeatureId.TIMESTAMP: FeatureSpec(0),
}

_CHANGEABLE = 1 << 2
_PER_NAMESPACE = 1 << 1
_SAVEABLE = 1 << 0
_CURRENT, _DEFAULT, _SAVED, _SUPPORTED = range(4)


class Features:
    """The features of one controller.

    Args:
        values: the state.
        limits: for the number of queues and vectors.
        namespaces: returns the ids of the active namespaces.
        has_io_queues: whether any I/O queue exists, after which their number is fixed.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        values: FeatureValues,
        limits: ControllerLimits,
        namespaces: Callable[[], list[int]],
        has_io_queues: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._values = values
        self._limits = limits
        self._namespaces = namespaces
        self._has_io_queues = has_io_queues
        self._clock = clock
        self._prepare: dict[int, Callable[[int], int]] = {
            FeatureId.POWER_MANAGEMENT: self._check_power_state,
            FeatureId.ERROR_RECOVERY: self._check_error_recovery,
            FeatureId.NUMBER_OF_QUEUES: self._grant_queues,
        }

    def value(self, feature: FeatureId, selector: int = 0, nsid: int = 0) -> int:
        """Return the value in force.

        Args:
            feature: which one.
            selector: sensor and threshold, or interrupt vector, where the feature has several values.
            nsid: the namespace, where each has its own.
        """
        key = (int(feature), selector, nsid)
        current = self._values.current.get(key)
        return current if current is not None else self._values.saved.get(key, self._default(feature, selector))

    @property
    def io_queue_limits(self) -> tuple[int, int]:
        """Highest submission and completion queue id that the host may create."""
        value = self.value(FeatureId.NUMBER_OF_QUEUES)
        return (value & 0xFFFF) + 1, (value >> 16) + 1

    def check(self, key: tuple[int, int, int], value: int, *, saved: bool) -> None:
        """Refuse a value that no host can have set.

        Args:
            key: feature, selector, namespace.
            value: its value.
            saved: whether it was set to be saved.

        Raises:
            ValueError: there is no such feature, selector or namespace, or the value is impossible.
        """
        feature, selector, nsid = key
        spec = FEATURES.get(feature)
        if spec is None or (saved and not spec.saveable) or feature == FeatureId.TIMESTAMP:
            raise ValueError(f"feature {feature:#04x} cannot have a value")
        selectors = {
            FeatureId.INTERRUPT_VECTOR: range(self._limits.vectors),
            FeatureId.TEMPERATURE_THRESHOLD: [sensor | kind << 4 for sensor in _SENSORS for kind in (0, 1)],
        }.get(FeatureId(feature), [0])
        if selector not in selectors or nsid not in (self._namespaces() if spec.per_namespace else [0]):
            raise ValueError(f"feature {feature:#04x} has no value {selector} of namespace {nsid}")
        possible = not value & ~spec.writable
        if feature == FeatureId.NUMBER_OF_QUEUES:
            possible = max(value & 0xFFFF, value >> 16) < self._limits.io_queues
        elif feature == FeatureId.POWER_MANAGEMENT:
            possible = possible and not value & 0x1F
        if not possible:
            raise ValueError(f"feature {feature:#04x} is {value:#x}")

    # Get Features

    def get(self, command: SubmissionEntry) -> int:
        """Answer Get Features.

        Returns:
            Dword 0 of the completion.

        Raises:
            NvmeError: there is no such feature, value or namespace.
        """
        feature, spec = self._lookup(command)
        select = command.cdw10 >> 8 & 7
        if select == _SUPPORTED:
            return _CHANGEABLE | _PER_NAMESPACE * spec.per_namespace | _SAVEABLE * spec.saveable
        if select > _SUPPORTED:
            raise NvmeError(StatusCode.INVALID_FIELD, f"select {select} of Get Features", location=41)
        selector = self._selector(feature, command.cdw11)
        nsid = self._one_namespace(command.nsid) if spec.per_namespace else 0
        default = self._default(feature, selector)
        if select == _DEFAULT:
            value = default
        elif select == _SAVED:
            value = self._values.saved.get((feature, selector, nsid), default)
        else:
            value = self.value(feature, selector, nsid)
        # The vector is part of the value that Get Features returns.
        return value | selector if feature is FeatureId.INTERRUPT_VECTOR else value

    def timestamp(self) -> bytes:
        """Make the timestamp data structure: 48 bits of milliseconds and where they come from."""
        now = self.timestamp_ms
        if now is None:
            return bytes(TIMESTAMP_SIZE)
        return now.to_bytes(6, "little") + bytes((_TIMESTAMP_BY_HOST, 0))

    @property
    def timestamp_ms(self) -> int | None:
        """The timestamp now; None unless the host has set one since the last reset."""
        if self._values.timestamp is None:
            return None
        base, at = self._values.timestamp
        return base + round((self._clock() - at) * 1000) & (1 << 48) - 1

    @timestamp_ms.setter
    def timestamp_ms(self, now: int | None) -> None:
        self._values.timestamp = None if now is None else (now, self._clock())

    # Set Features

    def set(self, command: SubmissionEntry) -> int:
        """Carry out Set Features (but for the timestamp's data).

        Returns:
            Dword 0 of the completion.

        Raises:
            NvmeError: there is no such feature, or it cannot be set so.
        """
        feature, spec = self._lookup(command)
        save = bool(command.cdw10 & _SAVE)
        if save and not spec.saveable:
            raise NvmeError(StatusCode.FEATURE_NOT_SAVEABLE, f"feature {feature.name}", location=43)
        if not spec.per_namespace and command.nsid not in (0, BROADCAST_NSID):
            self._one_namespace(command.nsid)
            raise NvmeError(StatusCode.FEATURE_NOT_NAMESPACE_SPECIFIC, f"feature {feature.name}", location=4)
        if feature is FeatureId.TIMESTAMP:  # all of it is in its data
            return 0
        prepare = self._prepare.get(feature)
        value = command.cdw11 if prepare is None else prepare(command.cdw11)
        for selector in self._selectors(feature, command.cdw11):
            for nsid in self._set_namespaces(spec, command.nsid):
                key = (int(feature), selector, nsid)
                self._values.current[key] = value & spec.writable
                if save:
                    self._values.saved[key] = value & spec.writable
        return value if feature is FeatureId.NUMBER_OF_QUEUES else 0

    def set_timestamp(self, data: bytes) -> None:
        """Take the timestamp data structure of the host."""
        self.timestamp_ms = int.from_bytes(data[:6], "little")

    def temperature_exceeded(self) -> bool:
        """Whether the measured temperature is beyond a threshold that the host has set."""
        over = [self.value(FeatureId.TEMPERATURE_THRESHOLD, sensor) for sensor in _SENSORS]
        under = [self.value(FeatureId.TEMPERATURE_THRESHOLD, sensor | 1 << 4) for sensor in _SENSORS]
        return not max(under) < TEMPERATURE_K < min(over)

    def temperature_event_due(self) -> bool:
        """Whether the host wants to hear of a temperature beyond its thresholds, and there is one."""
        return self.temperature_exceeded() and bool(self.value(FeatureId.ASYNC_EVENT_CONFIG) & _NOTIFY_TEMPERATURE)

    def _default(self, feature: FeatureId, selector: int) -> int:
        if feature is FeatureId.NUMBER_OF_QUEUES:
            return (self._limits.io_queues - 1) * 0x1_0001
        if feature is FeatureId.TEMPERATURE_THRESHOLD:
            return (WARNING_TEMPERATURE_K if selector == 0 else 0xFFFF) if selector < 1 << 4 else 0
        return FEATURES[feature].default

    def _lookup(self, command: SubmissionEntry) -> tuple[FeatureId, FeatureSpec]:
        number = command.cdw10 & 0xFF
        spec = FEATURES.get(number)
        if spec is None:
            raise NvmeError(StatusCode.INVALID_FIELD, f"feature {number:#04x} is not supported", location=40)
        return FeatureId(number), spec

    def _selector(self, feature: FeatureId, cdw11: int) -> int:
        """Find which of a feature's values is meant."""
        if feature is FeatureId.INTERRUPT_VECTOR:
            vector = cdw11 & 0xFFFF
            if vector >= self._limits.vectors:
                raise NvmeError(StatusCode.INVALID_FIELD, f"vector {vector} of {self._limits.vectors}", location=44)
            return vector
        if feature is FeatureId.TEMPERATURE_THRESHOLD:
            sensor, kind = cdw11 >> 16 & 0xF, cdw11 >> 20 & 3
            if sensor not in _SENSORS or kind > 1:
                raise NvmeError(StatusCode.INVALID_FIELD, f"temperature sensor {sensor}", location=46)
            return sensor | kind << 4
        return 0

    def _selectors(self, feature: FeatureId, cdw11: int) -> list[int]:
        if feature is FeatureId.TEMPERATURE_THRESHOLD and cdw11 >> 16 & 0xF == _ALL_SENSORS:
            return [self._selector(feature, cdw11 & ~0xF_0000 | sensor << 16) for sensor in _SENSORS]
        return [self._selector(feature, cdw11)]

    def _one_namespace(self, nsid: int) -> int:
        if nsid not in self._namespaces():
            raise NvmeError(StatusCode.INVALID_NAMESPACE, f"namespace {nsid:#x}", location=4)
        return nsid

    def _set_namespaces(self, spec: FeatureSpec, nsid: int) -> list[int]:
        if not spec.per_namespace:
            return [0]
        return self._namespaces() if nsid == BROADCAST_NSID else [self._one_namespace(nsid)]

    def _check_power_state(self, value: int) -> int:
        if value & 0x1F:
            raise NvmeError(StatusCode.INVALID_FIELD, f"power state {value & 0x1F}; there is only 0", location=44)
        return value

    def _check_error_recovery(self, value: int) -> int:
        if value & 1 << 16:
            raise NvmeError(StatusCode.INVALID_FIELD, "deallocated blocks cannot be reported as errors", location=46)
        return value

    def _grant_queues(self, value: int) -> int:
        if self._has_io_queues():
            raise NvmeError(StatusCode.COMMAND_SEQUENCE_ERROR, "the number of queues is fixed once one exists")
        asked = value & 0xFFFF, value >> 16
        if 0xFFFF in asked:
            raise NvmeError(StatusCode.INVALID_FIELD, "65 536 queues were asked for", location=44)
        submission, completion = (min(number, self._limits.io_queues - 1) for number in asked)
        return submission | completion << 16
