"""The v2 generation: every pair of states against the published table, and what DEVICE_FEATURE requests mean."""

from __future__ import annotations

import errno
import struct
from itertools import pairwise

import pytest

from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.messages import FeatureDeviceState, FeatureLoggingReport, FeatureLoggingStart, LoggingRange
from vfiouser_protocol.migration_v2 import (
    ARCS,
    FORBIDDEN,
    SAVING,
    WITHOUT_P2P,
    Arc,
    FeatureAction,
    _search,
    interpret_feature,
    path_arcs,
    require_path,
    wish_of,
)

STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY = (
    DeviceState.STOP,
    DeviceState.RUNNING,
    DeviceState.STOP_COPY,
    DeviceState.RESUMING,
    DeviceState.PRE_COPY,
)
COLUMNS = (STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY)
#: The states entered, as published for libvfio-user and the kernel; None is EINVAL.
GOLDEN = {
    STOP: ([], [RUNNING], [STOP_COPY], [RESUMING], [RUNNING, PRE_COPY]),
    RUNNING: ([STOP], [], [STOP, STOP_COPY], [STOP, RESUMING], [PRE_COPY]),
    STOP_COPY: ([STOP], [STOP, RUNNING], [], [STOP, RESUMING], None),
    RESUMING: ([STOP], [STOP, RUNNING], [STOP, STOP_COPY], [], [STOP, RUNNING, PRE_COPY]),
    PRE_COPY: ([RUNNING, STOP], [RUNNING], [STOP_COPY], [RUNNING, STOP, RESUMING], []),
}
GET, SET, PROBE = 0x1_0000, 0x2_0000, 0x4_0000
BIT_19 = 1 << 19


def feature(flags: int, data: bytes = b"", argsz: int = 4096) -> bytes:
    """A DEVICE_FEATURE payload."""
    return struct.pack("<II", argsz, flags) + data


def expected_path(current: int, target: int) -> list[DeviceState] | None:
    """The golden path between any two numbers."""
    if current not in GOLDEN or target not in COLUMNS:
        return None
    return GOLDEN[DeviceState(current)][COLUMNS.index(DeviceState(target))]


def shortest_path(current: DeviceState, target: int, *, precopy: bool = True) -> list[DeviceState] | None:
    """The states that a request enters."""
    arcs = path_arcs(current, target, precopy=precopy)
    return None if arcs is None else [arc.target for arc in arcs]


@pytest.mark.parametrize("current", list(DeviceState))
@pytest.mark.parametrize("target", [*range(10), 255, (1 << 32) - 1])
def test_every_pair_of_states(current: DeviceState, target: int) -> None:
    """Nine arcs and two rules give the whole matrix, and EINVAL for error, P2P and unknown states."""
    assert expected_path(current, target) == shortest_path(current, target)


@pytest.mark.parametrize("current", list(DeviceState))
@pytest.mark.parametrize("target", range(9))
def test_without_precopy_row_and_column_are_gone(current: DeviceState, target: int) -> None:
    """A device without PRE_COPY has the same matrix without it."""
    expected = None if PRE_COPY in (current, target) else expected_path(current, target)
    assert expected == shortest_path(current, target, precopy=False)


def test_paths_are_the_only_shortest_ones() -> None:
    """No request has two paths of the same length, so the search need not choose."""
    for current in COLUMNS:
        for target in COLUMNS:
            path = shortest_path(current, target)
            if path:
                assert 1 == sum(1 for walk in walks(current, len(path)) if walk[-1] is target), (current, target)


def test_the_order_of_arcs_means_nothing() -> None:
    """The rules alone decide, not which arc is looked at first."""
    for current in COLUMNS:
        for target in COLUMNS:
            if current is not target:
                assert _search(current, target, ARCS) == _search(current, target, ARCS[::-1])


def walks(start: DeviceState, length: int) -> list[list[DeviceState]]:
    """All walks of a length with no saving state inside."""
    found = [[start]]
    for _ in range(length):
        found = [
            [*walk, arc.target]
            for walk in found
            for arc in ARCS
            if arc.source is walk[-1] and (len(walk) == 1 or walk[-1] not in SAVING)
        ]
    return found


def test_a_path_is_made_of_arcs() -> None:
    """Nine arcs, none of them twice."""
    assert 9 == len(ARCS) == len(set(ARCS))
    assert (Arc(RUNNING, STOP), Arc(STOP, RESUMING)) == path_arcs(RUNNING, RESUMING)


@pytest.mark.parametrize(
    ("current", "target", "words"),
    [
        (STOP_COPY, 6, "PRE_COPY was asked for in STOP_COPY"),
        (RUNNING, 77, "state 77"),
        (DeviceState.ERROR, 2, "only a reset ends this"),
    ],
)
def test_refused_paths_say_what_is_allowed(current: DeviceState, target: int, words: str) -> None:
    """EINVAL with a sentence."""
    with pytest.raises(CommandError, match=words) as info:
        require_path(current, target)
    assert errno.EINVAL == info.value.errno


#: What linux/vfio.h's table enters first on the way from a row to a column, with P2P; None is an error.
_P, _C, _Q = DeviceState.RUNNING_P2P, PRE_COPY, DeviceState.PRE_COPY_P2P
KERNEL: dict[DeviceState, dict[DeviceState, DeviceState | None]] = {
    STOP: {STOP: STOP, RUNNING: _P, _C: _P, _Q: _P, STOP_COPY: STOP_COPY, RESUMING: RESUMING, _P: _P},
    RUNNING: {STOP: _P, RUNNING: RUNNING, _C: _C, _Q: _P, STOP_COPY: _P, RESUMING: _P, _P: _P},
    _C: {STOP: RUNNING, RUNNING: RUNNING, _C: _C, _Q: _Q, STOP_COPY: _Q, RESUMING: RUNNING, _P: RUNNING},
    _Q: {STOP: _P, RUNNING: _P, _C: _C, _Q: _Q, STOP_COPY: STOP_COPY, RESUMING: _P, _P: _P},
    STOP_COPY: {STOP: STOP, RUNNING: STOP, _C: None, _Q: None, STOP_COPY: STOP_COPY, RESUMING: STOP, _P: STOP},
    RESUMING: {STOP: STOP, RUNNING: STOP, _C: STOP, _Q: STOP, STOP_COPY: STOP, RESUMING: RESUMING, _P: STOP},
    _P: {STOP: STOP, RUNNING: RUNNING, _C: RUNNING, _Q: _Q, STOP_COPY: STOP, RESUMING: STOP, _P: _P},
}


@pytest.mark.parametrize("current", KERNEL)
@pytest.mark.parametrize("target", KERNEL)
def test_with_p2p_the_function_goes_the_kernels_way(current: DeviceState, target: DeviceState) -> None:
    """Each of the 49 requests is as legal as in the kernel, and leaves out of its way only what P2P adds."""
    entered: list[DeviceState] | None = []
    here: DeviceState | None = current
    while here is not target and here is not None:
        here = KERNEL[here][target]
        entered = None if here is None else [*(entered or []), here]
    plain = WITHOUT_P2P.get(current, current)
    steps = None
    if entered is not None:
        states = [plain, *(WITHOUT_P2P.get(state, state) for state in entered)]
        steps = [after for before, after in pairwise(states) if before is not after]
    assert steps == shortest_path(plain, wish_of(target, p2p=True).state)


@pytest.mark.parametrize("p2p", [False, True])
def test_p2p_names_are_known_where_they_are_offered(p2p: bool) -> None:
    """A P2P state is the one beside it under another name; without P2P it is a number that nobody knows."""
    assert (2, True) == wish_of(5, p2p=True)
    assert (6, True) == wish_of(7, p2p=True)
    for number in (5, 7):
        assert (number, False) == wish_of(number, p2p=False)
        assert path_arcs(RUNNING, wish_of(number, p2p=False).state) is None
    for number in (0, 1, 2, 3, 4, 6, 8, 255):
        assert (number, False) == wish_of(number, p2p=p2p)


def test_the_forbidden_pair_is_needed() -> None:
    """Without the second rule a path would lead from STOP_COPY to PRE_COPY, through STOP and RUNNING."""
    assert {(STOP_COPY, PRE_COPY)} == FORBIDDEN
    assert [STOP, RUNNING, PRE_COPY] in [walk[1:] for walk in walks(STOP_COPY, 3)]


LOGGING_ONE_RANGE = struct.pack("<QIIQQ", 4096, 1, 0, 0x10000, 0x20000)
REPORT = struct.pack("<QQQ", 0, 1 << 20, 4096)
ALLOWED = [
    (feature(GET | 1, argsz=16), FeatureAction.GET_MIGRATION, None),
    (feature(GET | 1, argsz=64), FeatureAction.GET_MIGRATION, None),
    (feature(GET | 1, b"ignored", argsz=16), FeatureAction.GET_MIGRATION, None),
    (feature(GET | 2, argsz=16), FeatureAction.GET_STATE, None),
    (feature(GET | 9, argsz=16), FeatureAction.GET_DATA_SIZE, None),
    (feature(SET | 2, bytes([3, 0, 0, 0, 0, 0, 0, 0]), argsz=16), FeatureAction.SET_STATE, FeatureDeviceState(3)),
    (feature(SET | 2, bytes([99, 0, 0, 0, 0, 0, 0, 0])), FeatureAction.SET_STATE, FeatureDeviceState(99)),
    (feature(SET | 6, bytes([0, 16]) + bytes(14)), FeatureAction.START_LOGGING, FeatureLoggingStart(4096)),
    (
        feature(SET | 6, LOGGING_ONE_RANGE, argsz=40),
        FeatureAction.START_LOGGING,
        FeatureLoggingStart(4096, (LoggingRange(0x10000, 0x20000),)),
    ),
    (feature(SET | 7, argsz=8), FeatureAction.STOP_LOGGING, None),
    (feature(GET | 8, REPORT, argsz=64), FeatureAction.REPORT, FeatureLoggingReport(0, 1 << 20, 4096)),
    (feature(PROBE | GET | 1, argsz=8), FeatureAction.PROBED, None),
    (feature(PROBE | 6, argsz=8), FeatureAction.PROBED, None),
    (feature(PROBE | GET | SET | 2, argsz=8), FeatureAction.PROBED, None),
    (feature(PROBE | GET | 8, argsz=8), FeatureAction.PROBED, None),
]


@pytest.mark.parametrize(("payload", "action", "data"), ALLOWED)
def test_legal_requests(payload: bytes, action: FeatureAction, data: object) -> None:
    """Each method of each feature is recognized, with its data."""
    call = interpret_feature(payload)
    assert (action, data) == (call.action, call.data)
    assert payload == call.echo()


REFUSED = {
    "payload of 7": bytes(7),
    "GET 1 argsz 8": feature(GET | 1, argsz=8),
    "GET 2 argsz 15": feature(GET | 2, argsz=15),
    "SET 1": feature(SET | 1),
    "PROBE SET 1": feature(PROBE | SET | 1),
    "PROBE GET 6": feature(PROBE | GET | 6),
    "PROBE SET 8": feature(PROBE | SET | 8),
    "PROBE 77": feature(PROBE | 77),
    "PROBE argsz 0": feature(PROBE | 1, argsz=0),
    "GET SET 2": feature(GET | SET | 2, bytes(8)),
    "no method": feature(2),
    "bit 19": feature(GET | BIT_19 | 1),
    "bit 31": feature(GET | 1 << 31 | 1),
    "SET argsz below payload": feature(SET | 2, bytes(8), argsz=15),
    "SET 2 without data": feature(SET | 2),
    "SET 2 short": feature(SET | 2, bytes(7)),
    "SET 6 short": feature(SET | 6, bytes(15)),
    "SET 6 ranges missing": feature(SET | 6, struct.pack("<QII", 4096, 2, 0) + bytes(16)),
    "SET 6 1025 ranges": feature(SET | 6, struct.pack("<QII", 4096, 1025, 0) + bytes(1025 * 16)),
    "SET 6 four billion ranges": feature(SET | 6, struct.pack("<QII", 4096, 0xFFFF_FFFF, 0)),
    "SET 9": feature(SET | 9, bytes(8)),
    "GET 9 argsz": feature(GET | 9, argsz=15),
    "GET 8 short": feature(GET | 8, REPORT[:23]),
    "GET 8 argsz": feature(GET | 8, REPORT, argsz=63),
    "GET 8 page size 0": feature(GET | 8, struct.pack("<QQQ", 0, 4096, 0)),
    "GET 8 page size 3000": feature(GET | 8, struct.pack("<QQQ", 0, 1 << 20, 3000)),
    "GET 8 page over length": feature(GET | 8, struct.pack("<QQQ", 0, 4096, 8192)),
    "GET 8 wraps": feature(GET | 8, struct.pack("<QQQ", (1 << 64) - 4096, 8192, 4096)),
    "GET 8 gigantic": feature(GET | 8, struct.pack("<QQQ", 0, 1 << 63, 1), argsz=0xFFFF_FFFF),
    **{f"feature {index}": feature(GET | index) for index in (0, 3, 4, 5, 10, 0xFFFF)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_illegal_requests(name: str) -> None:
    """Each is EINVAL before anything is done."""
    with pytest.raises(CommandError) as info:
        interpret_feature(REFUSED[name])
    assert errno.EINVAL == info.value.errno


@pytest.mark.parametrize("payload", [payload for payload, _, _ in ALLOWED])
def test_a_function_that_cannot_be_migrated_has_no_feature(payload: bytes) -> None:
    """Every feature is EINVAL there, probing and logging included."""
    with pytest.raises(CommandError) as info:
        interpret_feature(payload, supported=())
    assert errno.EINVAL == info.value.errno


def test_replies_have_the_observed_bytes() -> None:
    """What libvfio-user was seen to answer."""
    call = interpret_feature(bytes.fromhex("10000000 01000100"))
    assert bytes.fromhex("10000000 01000100 0500000000000000") == call.flags(precopy=True)
    assert bytes.fromhex("10000000 01000100 0100000000000000") == call.flags(precopy=False)
    call = interpret_feature(bytes.fromhex("40000000 02000100"))
    assert bytes.fromhex("10000000 02000100 02000000 00000000") == call.state(RUNNING)
    call = interpret_feature(bytes.fromhex("10000000 09000100"))
    assert bytes.fromhex("10000000 09000100 0000100000000000") == call.data_size(1 << 20)
    call = interpret_feature(bytes.fromhex("08000000 01000500"))
    assert bytes.fromhex("08000000 01000500") == call.echo()


def test_start_tells_the_page_size_that_is_used() -> None:
    """The rest of the request is repeated."""
    call = interpret_feature(feature(SET | 6, struct.pack("<QIIQQ", 1, 1, 0, 0x1000, 0x1000)))
    assert feature(SET | 6, struct.pack("<QIIQQ", 4096, 1, 0, 0x1000, 0x1000)) == call.started(4096)


def test_report_has_its_bitmap_at_32() -> None:
    """The range is repeated, argsz is exact."""
    bitmap = bytes([8]) + bytes(31)
    call = interpret_feature(feature(GET | 8, REPORT))
    assert feature(GET | 8, REPORT + bitmap, argsz=64) == call.report(bitmap)
