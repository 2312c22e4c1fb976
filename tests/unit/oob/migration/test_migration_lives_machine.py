"""Random lives of a source and a destination: the machine's promises hold whatever fails, at any step.

Never do two copies run; what is read is the truth; what is not known has a way back. The client is sane: it starts one
of the two that have the state, and not the other one.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from machinekit import Fate, Script, Side
from vfiouser_agents.api import Status
from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration.fence import REACTIONS
from vfiouser_oob.migration.plans import arc_name
from vfiouser_oob.migration.record import RUNS, Certainty, Goal, MigrationRecord, Owner
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.migration_v2 import require_path

S = DeviceState
#: What a client does seldom, so that it gets far.
seldom = st.integers(0, 5).map(lambda number: not number)
fates = st.one_of(
    st.just(()),
    st.lists(st.sampled_from(Fate), max_size=6),
    st.lists(st.one_of(st.just(Fate.DONE), st.sampled_from(Fate)), max_size=12),
)


def scripted(plan: list[Fate] | tuple[()]) -> Script:
    """Steps end as planned, those behind the plan well."""
    left = list(plan)
    return lambda do: left.pop(0) if left else Fate.DONE


class Lives(RuleBasedStateMachine):
    """A source that has the guest's state, and a destination that may get it."""

    @initialize(asked=st.booleans())
    def begin(self, asked: bool) -> None:
        """A source that runs, and a destination that has nobody's state."""
        self.source = Side(MigrationRecord(asked=asked))
        self.destination = Side(MigrationRecord(asked=asked), live=False)
        #: The stream up to its trailer was read, and by whom it may be run then.
        self.read = False
        self.decided: Side | None = None
        for side in (self.source, self.destination):
            side.come()

    def sides(self) -> tuple[Side, Side]:
        """Both."""
        return self.source, self.destination

    # Both together

    @rule(stages=st.integers(1, 11), trouble=st.integers(0, 10), plan=fates)
    def voyage(self, stages: int, trouble: int, plan: list[Fate]) -> None:
        """The client moves the guest's state, or some of the way; steps of one stage may fail, and it goes on."""
        travel: tuple[Callable[[list[Fate]], object], ...] = (
            lambda plan: self.move_source(S.PRE_COPY, plan),
            lambda plan: self.move_source(S.STOP_COPY, plan),
            lambda plan: self.read_source(end=True) if self.gives_state() else None,
            lambda plan: self.move_source(S.STOP, plan) if self.source.record.handed else None,
            lambda plan: self.move_destination(S.RESUMING, plan),
            lambda plan: self.write_destination(fails=False) if self.destination.record.loads else None,
            lambda plan: self.move_destination(S.STOP, plan),
            lambda plan: self.move_destination(S.RUNNING, plan),
            lambda plan: self.attempt(False, plan),
            lambda plan: self.client_changes(False, plan, stays_away=True),
            lambda plan: self.attempt(False, plan),
        )
        for number, stage in enumerate(travel[:stages]):
            stage(plan if number == trouble else [])
            self.never_two_running()

    # The source

    @rule(wanted=st.sampled_from([S.STOP, S.STOP_COPY, S.PRE_COPY, S.RUNNING]), plan=fates)
    def move_source(self, wanted: DeviceState, plan: list[Fate]) -> None:
        """The client asks for a state of the source."""
        record = self.source.record
        if not record.attached or record.certainty is not Certainty.KNOWN:
            return
        if wanted in RUNS:
            # Also when it has been told to save once more, what it had handed over is another's.
            if self.source.live and self.decided is self.destination:
                return
            self.decided = self.source if record.handed else self.decided
        if (record.state, wanted) == (S.STOP_COPY, S.PRE_COPY):
            return
        answer = self.source.request(wanted, scripted(plan))
        assert answer is None or answer.text is None or answer.errno

    def gives_state(self) -> bool:
        """Whether the source answers reads: the runner drops what is left as soon as the function is to run again."""
        record = self.source.record
        return record.saves and record.goal is not Goal.RESUME

    @precondition(lambda self: self.gives_state() and self.source.record.state in (S.PRE_COPY, S.STOP_COPY))
    @rule(end=st.booleans())
    def read_source(self, end: bool) -> None:
        """The client reads some of the state, or the rest."""
        end = end and self.source.record.state is S.STOP_COPY
        self.source.feed(ev.Moved(self.source.position + 10, handed=end))
        if end and self.decided is None:
            self.read = True

    # The destination

    @rule(wanted=st.sampled_from([S.STOP, S.RESUMING, S.RUNNING]), plan=fates)
    def move_destination(self, wanted: DeviceState, plan: list[Fate]) -> None:
        """The client asks for a state of the destination."""
        record = self.destination.record
        if not record.attached or record.certainty is not Certainty.KNOWN or self.decided is self.source:
            return
        if wanted is S.RUNNING and (record.committed or self.destination.whole):
            self.decided = self.destination
        if wanted is S.RESUMING and self.destination.live:
            return  # a VM that runs here is not loaded over
        self.destination.request(wanted, scripted(plan))

    @precondition(lambda self: self.destination.record.loads and self.destination.record.load_failure is None)
    @rule(fails=st.booleans())
    def write_destination(self, fails: bool) -> None:
        """The client writes some of the state, or the rest if it has it."""
        self.destination.feed(ev.Moved(self.destination.position + 10))
        if fails:
            self.destination.feed(ev.LoadFailed("refused"))
        elif self.read and self.decided is None:
            self.destination.whole = True

    # Both

    @rule(seldom=seldom, first=st.booleans(), plan=fates)
    def reset(self, seldom: bool, first: bool, plan: list[Fate]) -> None:
        """DEVICE_RESET."""
        side = self.sides()[first]
        if seldom and side.record.attached:
            side.play(ev.ResetAsked(), scripted(plan))

    @rule(seldom=seldom, first=st.booleans(), plan=fates, restarts=st.booleans())
    def guest_resets(self, seldom: bool, first: bool, plan: list[Fate], restarts: bool) -> None:
        """The guest resets the function."""
        side = self.sides()[first]
        if seldom and side.record.attached:
            side.play(ev.GuestReset(restarts), scripted(plan))

    @rule(first=st.booleans(), plan=fates, stays_away=st.booleans())
    def client_changes(self, first: bool, plan: list[Fate], stays_away: bool) -> None:
        """The client goes, and another one comes, or none."""
        side = self.sides()[first]
        if side.record.attached:
            side.feed(ev.ClientWent(logged=False))
        if not stays_away:
            side.come(scripted(plan))

    @rule(first=st.booleans(), plan=fates)
    def attempt(self, first: bool, plan: list[Fate]) -> None:
        """The background has its turn."""
        side = self.sides()[first]
        if side.record.goal is not None:
            side.play(ev.AttemptDue(), scripted(plan))

    @rule(first=st.booleans())
    def agent_speaks(self, first: bool) -> None:
        """The agent says where the function is."""
        side = self.sides()[first]
        if side.record.certainty is Certainty.KNOWN and side.record.at_agent in REACTIONS:
            side.feed(ev.Heard(Status(side.agent)))

    @rule(first=st.booleans())
    def probe(self, first: bool) -> None:
        """The agent is asked where the function is."""
        side = self.sides()[first]
        side.feed(ev.Probed(Status(side.agent), migrated=True))

    @rule(first=st.booleans())
    def daemon_restarts(self, first: bool) -> None:
        """A daemon goes on with the record of another."""
        side = self.sides()[first]
        side.record = MigrationRecord.from_json(side.record.to_json())
        side.feed(ev.Started())
        side.settle(1)

    @rule(first=st.booleans(), plan=fates)
    def daemon_restarts_under_its_client(self, first: bool, plan: list[Fate]) -> None:
        """A daemon goes on with the client of another."""
        side = self.sides()[first]
        if side.record.attached:
            side.go_on(scripted(plan))

    @rule(
        first=st.booleans(),
        wanted=st.sampled_from([S.STOP, S.STOP_COPY, S.PRE_COPY, S.RESUMING, S.RUNNING]),
        steps=st.integers(0, 5),
        done=st.booleans(),
        plan=fates,
    )
    def daemon_is_killed(self, first: bool, wanted: DeviceState, steps: int, done: bool, plan: list[Fate]) -> None:
        """In the middle of a step, which has its effect or not; another one goes on with its client."""
        side = self.sides()[first]
        record = side.record
        if not record.attached or record.certainty is not Certainty.KNOWN or not self.may_want(side, wanted):
            return
        try:
            arcs = require_path(record.state_shown, wanted)
        except CommandError:
            return
        if not arcs:
            return
        side.feed(ev.TakenOver(under_way=False))
        names = tuple(arc_name(arc.source, arc.target) for arc in arcs)
        if side.die(ev.Requested(names, Owner.V2), steps, done=done):
            side.go_on(scripted(plan))

    def may_want(self, side: Side, wanted: DeviceState) -> bool:
        """Whether a sane client asks for that."""
        if side is self.source:
            if wanted is S.RESUMING or (side.record.state, wanted) == (S.STOP_COPY, S.PRE_COPY):
                return False
            if wanted in RUNS and side.live and self.decided is self.destination:
                return False
            if wanted in RUNS and side.record.handed:
                self.decided = self.source
            return True
        if wanted in (S.PRE_COPY, S.STOP_COPY) or self.decided is self.source:
            return False
        if wanted is S.RESUMING and side.live:
            return False
        if wanted is S.RUNNING and (side.record.committed or side.whole):
            self.decided = self.destination
        return True

    # What holds

    @invariant()
    def never_two_running(self) -> None:
        """Only one of those that have the guest's state runs."""
        assert not all(side.live and side.runs for side in self.sides())

    @invariant()
    def what_is_read_is_the_truth(self) -> None:
        """What is known is so."""
        for side in self.sides():
            record = side.record
            if record.certainty is Certainty.KNOWN and record.asked and not (record.fenced or record.paused):
                assert record.runs == side.runs, record

    @invariant()
    def nothing_is_under_way_between_messages(self) -> None:
        """An errand ends with its message."""
        assert [None, None] == [side.record.errand for side in self.sides()]

    @invariant()
    def what_is_not_known_has_a_way_back(self) -> None:
        """Somebody works for it."""
        for side in self.sides():
            record = side.record
            if record.certainty is Certainty.UNKNOWN:
                assert record.goal is not None or record.fenced, record
            assert (record.unknown_since is not None) == (record.certainty is Certainty.UNKNOWN)

    @invariant()
    def a_record_can_be_written_down(self) -> None:
        """And read."""
        for side in self.sides():
            assert side.record == MigrationRecord.from_json(side.record.to_json())

    def teardown(self) -> None:
        """With an agent that answers, all is known in the end; and a reset leads out of everything."""
        for side in self.sides():
            if not side.record.attached:
                side.come()
            side.settle()
            self.never_two_running()
            assert side.record.certainty is not Certainty.UNKNOWN or side.record.fenced
            # Nobody waits for an agent that has never answered: what it would say of the function is not known.
            asked = side.record.asked
            side.play(ev.ResetAsked())
            side.settle()
            assert (S.RUNNING, Certainty.KNOWN) == (side.record.state, side.record.certainty)
            assert side.runs or not asked


TestLives = Lives.TestCase
# Without shrinking, which takes minutes: a failure names its steps as they are.
TestLives.settings = settings(
    max_examples=300, stateful_step_count=25, deadline=None, phases=[Phase.explicit, Phase.generate]
)
