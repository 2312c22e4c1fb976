"""Migration of the v2 generation: states, the arcs between them, and what a DEVICE_FEATURE request means.

Nine arcs and two rules say everything about states: a request goes along the shortest path of arcs, no state in
which data is saved lies in the middle of one, and no path leads from STOP_COPY to PRE_COPY. A search finds the
states in between, so nothing is written down twice.

The P2P states are on the wire only where a function offers them, and then each of them is the state beside it with
another name: a function that reaches no peer's BAR has nothing to hold back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import DeviceState, Feature, FeatureFlags, MigrationFlags
from vfiouser_protocol.dirty import bitmap_size, check_report_pages
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.limits import MAX_LOGGING_RANGES
from vfiouser_protocol.messages import (
    DeviceFeature,
    FeatureDeviceState,
    FeatureLoggingReport,
    FeatureLoggingStart,
    FeatureMigration,
)
from vfiouser_protocol.rules import require_argsz

# --- States ---


class Arc(NamedTuple):
    """One step that a device can make.

    Args:
        source: where it begins.
        target: where it ends.
    """

    source: DeviceState
    target: DeviceState


_S = DeviceState
#: Spec: linux/vfio.h, enum vfio_device_mig_state, without the P2P states.
ARCS: tuple[Arc, ...] = (
    Arc(_S.RUNNING, _S.STOP),
    Arc(_S.STOP, _S.RUNNING),
    Arc(_S.RUNNING, _S.PRE_COPY),
    Arc(_S.PRE_COPY, _S.RUNNING),
    Arc(_S.PRE_COPY, _S.STOP_COPY),
    Arc(_S.STOP, _S.STOP_COPY),
    Arc(_S.STOP_COPY, _S.STOP),
    Arc(_S.STOP, _S.RESUMING),
    Arc(_S.RESUMING, _S.STOP),
)
#: The arcs that P2P adds, as what they come to: each P2P state is that state under another name, so that what leads to
#: one leads to the other, and nothing is done between the two.
WITHOUT_P2P: Mapping[DeviceState, DeviceState] = MappingProxyType(
    {_S.RUNNING_P2P: _S.RUNNING, _S.PRE_COPY_P2P: _S.PRE_COPY}
)
WITH_P2P: Mapping[DeviceState, DeviceState] = MappingProxyType({plain: p2p for p2p, plain in WITHOUT_P2P.items()})
#: States in which data is saved: only where a path begins or ends.
SAVING = frozenset({_S.PRE_COPY, _S.STOP_COPY})
#: States in which MIG_DATA_READ and MIG_DATA_WRITE are legal.
READABLE = SAVING
WRITABLE = frozenset({_S.RESUMING})
#: States in which the guest may use the device.
RUNS = frozenset({_S.RUNNING, _S.PRE_COPY})
#: Requests that no path serves, though arcs would lead there: data that was saved after the stop would be worthless.
FORBIDDEN = frozenset({(_S.STOP_COPY, _S.PRE_COPY)})


def _search(current: DeviceState, target: DeviceState, arcs: Collection[Arc]) -> tuple[Arc, ...] | None:
    """The shortest path; the arcs leave no two of the same length, which a test proves."""
    paths: list[tuple[Arc, ...]] = [(arc,) for arc in arcs if arc.source is current]
    seen = {current}
    while paths:
        for path in paths:
            if path[-1].target is target:
                return path
        open_ends = [path for path in paths if path[-1].target not in SAVING | seen]
        seen |= {path[-1].target for path in open_ends}
        paths = [(*path, arc) for path in open_ends for arc in arcs if arc.source is path[-1].target]
    return None


def _paths(precopy: bool) -> Mapping[tuple[int, int], tuple[Arc, ...]]:
    arcs = [arc for arc in ARCS if precopy or _S.PRE_COPY not in arc]
    states = {arc.source for arc in arcs}
    found: dict[tuple[int, int], tuple[Arc, ...]] = {}
    for current in states:
        for target in states:
            path = () if current is target else _search(current, target, arcs)
            if path is not None and (current, target) not in FORBIDDEN:
                found[current, target] = path
    return MappingProxyType(found)


_PATHS = {precopy: _paths(precopy) for precopy in (False, True)}


def path_arcs(current: DeviceState, target: int, *, precopy: bool = True) -> tuple[Arc, ...] | None:
    """Return the arcs that lead from one state to another.

    Args:
        current: where the device is.
        target: what was asked for, any number.
        precopy: whether the device has PRE_COPY.

    Returns:
        The arcs in order, none if the device is there already; None if the request is illegal (EINVAL).

    Spec: linux/vfio.h, combination transitions; vfio-user, VFIO_USER_DEVICE_FEATURE, MIG_DEVICE_STATE.
    """
    return _PATHS[precopy].get((current, target))


def require_path(current: DeviceState, target: int, *, precopy: bool = True) -> tuple[Arc, ...]:
    """Return the arcs of a legal request, refuse any other; see `path_arcs`.

    Args:
        current: where the device is.
        target: what was asked for, any number.
        precopy: whether the device has PRE_COPY.

    Returns:
        The arcs in order.

    Raises:
        CommandError: EINVAL; the device stays where it is.
    """
    arcs = path_arcs(current, target, precopy=precopy)
    if arcs is None:
        legal = [state.name for state in DeviceState if path_arcs(current, state, precopy=precopy) is not None]
        wanted = next((state.name for state in DeviceState if state == target), str(target))
        allowed = f"from there the device can go to {', '.join(legal)}" if legal else "only a reset ends this"
        raise CommandError(f"state {wanted} was asked for in {current.name}; {allowed}; nothing changes")
    return arcs


class StateWish(NamedTuple):
    """What a SET of MIG_DEVICE_STATE asks for.

    Args:
        state: where the function is to go.
        p2p: whether the client calls that by its P2P name.
    """

    state: int
    p2p: bool


def wish_of(wanted: int, *, p2p: bool) -> StateWish:
    """Return what a state on the wire asks of the function.

    Args:
        wanted: what was asked for, any number.
        p2p: whether the function offers P2P; without it the P2P states are unknown like any other number.
    """
    plain = WITHOUT_P2P.get(wanted) if p2p else None  # type: ignore[call-overload]
    return StateWish(wanted, p2p=False) if plain is None else StateWish(plain, p2p=True)


# --- Features ---


class FeatureAction(Enum):
    """What a legal DEVICE_FEATURE request asks to be done."""

    PROBED = "probed"
    GET_MIGRATION = "get_migration"
    GET_STATE = "get_state"
    SET_STATE = "set_state"
    START_LOGGING = "start_logging"
    STOP_LOGGING = "stop_logging"
    REPORT = "report"
    GET_DATA_SIZE = "get_data_size"


class FeatureMethod(NamedTuple):
    """One method of a feature.

    Args:
        action: what it does.
        data: what the request's data has to begin with; None if any is ignored. Bytes behind it are ignored too.
        reply: bytes of reply payload that are known without the device; a report's bitmap comes on top.
            None: the reply repeats the request.
    """

    action: FeatureAction
    data: type[FeatureDeviceState | FeatureLoggingStart | FeatureLoggingReport] | None
    reply: int | None


_GET = int(FeatureFlags.GET)
_SET = int(FeatureFlags.SET)
_PROBE = int(FeatureFlags.PROBE)
_KNOWN_FLAGS = int(FeatureFlags.INDEX_MASK) | _GET | _SET | _PROBE
_FIXED = 8
#: Where a DEVICE_FEATURE of MIG_DEVICE_STATE has data_fd, and what says that there is none.
_DATA_FD = 12
_NO_FD = b"\xff\xff\xff\xff"

#: Spec: vfio-user, VFIO_USER_DEVICE_FEATURE. The kernel's other features have no meaning on the wire.
FEATURES: Mapping[int, Mapping[int, FeatureMethod]] = MappingProxyType(
    {
        Feature.MIGRATION: {_GET: FeatureMethod(FeatureAction.GET_MIGRATION, None, 16)},
        Feature.MIG_DEVICE_STATE: {
            _GET: FeatureMethod(FeatureAction.GET_STATE, None, 16),
            _SET: FeatureMethod(FeatureAction.SET_STATE, FeatureDeviceState, None),
        },
        Feature.DMA_LOGGING_START: {_SET: FeatureMethod(FeatureAction.START_LOGGING, FeatureLoggingStart, None)},
        Feature.DMA_LOGGING_STOP: {_SET: FeatureMethod(FeatureAction.STOP_LOGGING, None, None)},
        Feature.DMA_LOGGING_REPORT: {_GET: FeatureMethod(FeatureAction.REPORT, FeatureLoggingReport, 32)},
        # Not in the specification; QEMU's client assumes 100 GiB without it, and never finishes.
        Feature.MIG_DATA_SIZE: {_GET: FeatureMethod(FeatureAction.GET_DATA_SIZE, None, 16)},
    }
)
ALL_FEATURES = frozenset(Feature)


class FeatureCall(NamedTuple):
    """A DEVICE_FEATURE request that is in order.

    Args:
        action: what the server must do.
        request: the request.
        payload: the request's payload as it came.
        data: the decoded data that the action needs, None if it needs none.
    """

    action: FeatureAction
    request: DeviceFeature
    payload: bytes
    data: FeatureDeviceState | FeatureLoggingStart | FeatureLoggingReport | None

    def echo(self) -> bytes:
        """Return the reply to a PROBE, or to a SET that was done: the request's own payload."""
        return self.payload

    def state_set(self) -> bytes:
        """Return the reply to a SET of MIG_DEVICE_STATE: the request's payload, without a descriptor.

        Spec: struct vfio_device_feature_mig_state: data_fd is -1 where there is none. QEMU's client asks with 0, and
        takes whatever else comes back for a descriptor.
        """
        return self.payload[:_DATA_FD] + _NO_FD + self.payload[_DATA_FD + len(_NO_FD) :]

    def started(self, page_size: int) -> bytes:
        """Return the reply to DMA_LOGGING_START: the request with the page size that is used.

        Args:
            page_size: bytes per logged page.
        """
        return self.payload[:_FIXED] + page_size.to_bytes(8, "little") + self.payload[_FIXED + 8 :]

    def flags(self, *, precopy: bool, p2p: bool = False) -> bytes:
        """Return the reply to a GET of MIGRATION.

        Args:
            precopy: whether the device has PRE_COPY.
            p2p: whether it offers the P2P states.
        """
        flags = MigrationFlags.STOP_COPY
        flags |= MigrationFlags.PRE_COPY if precopy else 0
        flags |= MigrationFlags.P2P if p2p else 0
        return self._got(encode(FeatureMigration(int(flags))))

    def state(self, state: DeviceState) -> bytes:
        """Return the reply to a GET of MIG_DEVICE_STATE.

        Args:
            state: where the device is.
        """
        return self._got(encode(FeatureDeviceState(int(state))))

    def data_size(self, size: int) -> bytes:
        """Return the reply to a GET of MIG_DATA_SIZE.

        Args:
            size: estimated bytes of the stream that are still to be read.
        """
        return self._got(size.to_bytes(8, "little"))

    def report(self, bitmap: bytes) -> bytes:
        """Return the reply to a GET of DMA_LOGGING_REPORT.

        Args:
            bitmap: the dirty pages of the range that was asked about.
        """
        return self.report_head(len(bitmap)) + bitmap

    def report_head(self, size: int) -> bytes:
        """Return what comes before the bitmap in the reply to a GET of DMA_LOGGING_REPORT.

        Args:
            size: bytes of the bitmap.
        """
        return encode(DeviceFeature(32 + size, self.request.flags, self.payload[_FIXED:32]))

    def _got(self, data: bytes) -> bytes:
        return encode(DeviceFeature(_FIXED + len(data), self.request.flags, data))


def interpret_feature(payload: bytes, supported: Collection[int] = ALL_FEATURES) -> FeatureCall:
    """Check a DEVICE_FEATURE request and say what it asks for.

    Args:
        payload: the bytes behind the request's header.
        supported: the features that this function has; none if it cannot be migrated.

    Returns:
        The call; its methods make the reply.

    Raises:
        CommandError: EINVAL: too short for what it says, unknown flags, a feature or method that is not supported,
            methods that exclude each other, an argsz that the reply does not fit in, or a report of impossible pages.

    Spec: vfio-user, VFIO_USER_DEVICE_FEATURE. libvfio-user does not check whether the data is all there.
    """
    request = decode(DeviceFeature, payload)
    what = f"DEVICE_FEATURE {request.index} with flags {request.flags:#x}"
    if request.flags & ~_KNOWN_FLAGS:
        raise CommandError(f"{what}: known flags are {_KNOWN_FLAGS:#x}; refused")
    methods = FEATURES.get(request.index) if request.index in supported else None
    if methods is None:
        raise CommandError(f"{what}: this function has features {sorted(map(int, supported))}; refused")
    wanted = [bit for bit in (_GET, _SET) if request.flags & bit]
    if not all(bit in methods for bit in wanted):
        raise CommandError(f"{what}: methods of the feature are {_names(methods)}; refused")
    if request.probe:
        require_argsz(request.argsz, len(payload))
        return FeatureCall(FeatureAction.PROBED, request, payload, None)
    if len(wanted) != 1:
        raise CommandError(f"{what}: without PROBE exactly one of GET and SET is allowed; refused")
    method = methods[wanted[0]]
    require_argsz(request.argsz, len(payload) if method.reply is None else method.reply)
    if method.data is FeatureLoggingStart:
        _check_range_count(request.data)
    data = None if method.data is None else decode(method.data, request.data)
    if isinstance(data, FeatureLoggingReport):
        check_report_pages(data.iova, data.length, data.page_size)
        require_argsz(request.argsz, 32 + bitmap_size(data.length, data.page_size))
    return FeatureCall(method.action, request, payload, data)


def _check_range_count(data: bytes) -> None:
    """Refuse more ranges than we take, before they are decoded."""
    count = int.from_bytes(data[8:12], "little")
    if count > MAX_LOGGING_RANGES:
        raise CommandError(f"logging of {count} ranges; at most {MAX_LOGGING_RANGES} are taken; not started")


def _names(methods: Collection[int]) -> str:
    return " and ".join(name for name, bit in (("GET", _GET), ("SET", _SET)) if bit in methods)
