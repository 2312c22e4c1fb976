"""Both generations' state machines against naive models of a device and of a client."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vfiouser_protocol import migration_v1 as v1
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.migration_v1 import Iteration, RegionLayout
from vfiouser_protocol.migration_v2 import (
    ALL_FEATURES,
    FEATURES,
    RUNS,
    Arc,
    FeatureAction,
    interpret_feature,
    require_path,
)

LAYOUT = RegionLayout(4096, 4096)
S = DeviceState


class NaiveDevice:
    """What a device does for each arc, in its own words; impossible steps are assertion errors."""

    def __init__(self) -> None:
        self.runs = True
        self.session: str | None = None

    def apply(self, arc: Arc) -> None:
        """Do what an arc means."""
        match arc:
            case (S.RUNNING, S.STOP):
                assert (True, None) == (self.runs, self.session)
                self.runs = False
            case (S.STOP, S.RUNNING):
                assert (False, None) == (self.runs, self.session)
                self.runs = True
            case (S.RUNNING, S.PRE_COPY):
                assert (True, None) == (self.runs, self.session)
                self.session = "save"
            case (S.PRE_COPY, S.RUNNING):
                assert (True, "save") == (self.runs, self.session)
                self.session = None
            case (S.PRE_COPY, S.STOP_COPY):
                assert (True, "save") == (self.runs, self.session)
                self.runs = False
            case (S.STOP, S.STOP_COPY):
                assert (False, None) == (self.runs, self.session)
                self.session = "save"
            case (S.STOP_COPY, S.STOP):
                assert (False, "save") == (self.runs, self.session)
                self.session = None
            case (S.STOP, S.RESUMING):
                assert (False, None) == (self.runs, self.session)
                self.session = "load"
            case (S.RESUMING, S.STOP):
                assert (False, "load") == (self.runs, self.session)
                self.session = None


class TwoViewsMachine(RuleBasedStateMachine):
    """Requests of both generations, in any order, on one device."""

    def __init__(self) -> None:
        super().__init__()
        self.state = DeviceState.RUNNING
        self.device = NaiveDevice()

    @rule(wanted=st.integers(0, 9), precopy=st.booleans())
    def v2_request(self, wanted: int, precopy: bool) -> None:
        """A v2 client asks for any state."""
        try:
            arcs = require_path(self.state, wanted, precopy=precopy or self.state is DeviceState.PRE_COPY)
        except CommandError:
            return
        for arc in arcs:
            assert self.state is arc.source
            self.device.apply(arc)
            self.state = arc.target
        assert wanted == self.state

    @rule(written=st.integers(0, 15))
    def v1_write(self, written: int) -> None:
        """A v1 client writes any value."""
        try:
            arcs = v1.require_transition(self.state, written)
        except CommandError:
            return
        for arc in arcs:
            assert self.state is arc.source
            self.device.apply(arc)
            self.state = arc.target
        assert written & 7 == v1.FROM_V2[self.state]

    @rule(stop_after=st.integers(0, 2), wanted=st.sampled_from(DeviceState))
    def v2_request_that_fails(self, stop_after: int, wanted: DeviceState) -> None:
        """A step fails: the device stays in the last state that it reached, from where requests go on."""
        try:
            arcs = require_path(self.state, wanted)
        except CommandError:
            return
        for arc in arcs[:stop_after]:
            self.device.apply(arc)
            self.state = arc.target

    @invariant()
    def state_is_the_truth(self) -> None:
        """The device runs and has data in hand exactly as its state says."""
        assert self.device.runs == (self.state in RUNS)
        sessions = {DeviceState.PRE_COPY: "save", DeviceState.STOP_COPY: "save", DeviceState.RESUMING: "load"}
        assert sessions.get(self.state) == self.device.session


TwoViewsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestTwoViewsOfOneDevice = TwoViewsMachine.TestCase


class SavingMachine(RuleBasedStateMachine):
    """A client that reads registers in any order takes every chunk exactly once, as far as it plays by the rules.

    Chunks are numbers; the source hands out the next one when the machine asks for it. The client keeps a chunk when
    it has read data_size, and a chunk that is shown again replaces the one that it has in hand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.iteration = Iteration(LAYOUT)
        self.iteration.enter(DeviceState.PRE_COPY)
        self.produced = 0
        self.shown: int | None = None
        self.acknowledged: list[int] = []
        self.in_hand: int | None = None
        self.offset_read = False
        self.finished = False
        self.left = 12

    @rule()
    def read_pending(self) -> None:
        """The client asks for how much there is."""
        if self.iteration.begin_pending():
            # Only what the client knows completely may be forgotten by the source.
            assert self.shown is not None
            assert self.in_hand == self.shown
            self.acknowledged.append(self.shown)
            self.shown = None
        amount = self.left + (self.shown is not None)
        value = self.iteration.pending(amount)
        assert (0 if self.finished else amount) == value
        if not value and self.iteration.state is DeviceState.STOP_COPY:
            self.finished = True
            assert list(range(self.produced)) == self.acknowledged
        self.in_hand = None
        self.offset_read = False

    @rule(works=st.sampled_from([True, True, False]))
    def read_offset(self, works: bool) -> None:
        """The client asks for where; the source may fail to get a chunk."""
        try:
            prepare = self.iteration.offset()
        except CommandError:
            assert not self.offset_read
            return
        if not prepare:
            assert self.shown is not None
        elif works:
            assert self.shown is None
            self.shown = self.produced
            self.produced += 1
            self.left -= 1
            self.iteration.prepared(1)
        else:
            return
        self.offset_read = True

    @rule()
    def read_size(self) -> None:
        """The client asks for how much it is, and takes it."""
        try:
            size = self.iteration.size()
        except CommandError:
            assert not self.offset_read
            return
        assert self.offset_read
        assert 1 == size
        self.in_hand = self.shown

    @precondition(lambda self: self.iteration.state is DeviceState.PRE_COPY)
    @rule()
    def stop(self) -> None:
        """The client stops the device; what it has in hand it keeps."""
        assert not self.iteration.enter(DeviceState.STOP_COPY)
        self.offset_read = False

    @rule()
    def again(self) -> None:
        """The client writes the state that there is."""
        assert not self.iteration.enter(self.iteration.state)

    @rule(back=st.sampled_from([DeviceState.RUNNING, DeviceState.STOP]))
    def cancel(self, back: DeviceState) -> None:
        """The client gives up and begins anew."""
        assert (self.shown is not None) == self.iteration.enter(back)
        assert 0 == self.iteration.pending(5)
        self.__init__()  # type: ignore[misc]


SavingMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSavingAgainstNaiveClient = SavingMachine.TestCase


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_every_access_of_the_region(offset: int, count: int) -> None:
    """Proves that an access is one whole register, or data, or refused."""
    registers = {(0, 4), (4, 4), (8, 8), (16, 8), (24, 8)}
    layout = RegionLayout(4096, 4096)
    try:
        found = layout.locate(offset, count)
    except CommandError:
        assert (offset, count) not in registers
        assert offset < 4096 or offset + count > 8192
        return
    if isinstance(found, v1.MigrationRegister):
        assert (offset, count) in registers
    else:
        assert (offset - 4096, offset - 4096 + count) == found
        assert 0 <= found.start < found.end <= 4096


@settings(max_examples=300)
@given(
    index=st.sampled_from([0, 1, 2, 3, 6, 7, 8, 9]),
    methods=st.integers(0, 15),
    argsz=st.integers(0, 80),
    data=st.binary(max_size=48),
    supported=st.sets(st.sampled_from(sorted(ALL_FEATURES))),
)
def test_any_feature_request(index: int, methods: int, argsz: int, data: bytes, supported: set[int]) -> None:
    """Proves that a request is refused, or its action is one of the feature's own and its reply fits argsz."""
    payload = argsz.to_bytes(4, "little") + (methods << 16 | index).to_bytes(4, "little") + data
    try:
        call = interpret_feature(payload, supported)
    except CommandError:
        return
    assert index in supported
    assert methods < 8
    if call.action is FeatureAction.PROBED:
        assert methods & 4
        assert len(payload) <= argsz
    else:
        assert methods in (1, 2)
        method = FEATURES[index][methods << 16]
        assert method.action is call.action
        assert (len(payload) if method.reply is None else method.reply) <= argsz
