"""The rules of clients that come and go, and of the resets that they and their guests ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vfiouser_agents.api import Outcome
from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration import plans
from vfiouser_oob.migration.plans import Step
from vfiouser_oob.migration.record import Certainty, Failure, Goal, MigrationRecord, PlanProgress, ResetDue
from vfiouser_oob.migration.turn import Turn
from vfiouser_protocol.constants import DeviceState

# Clients that come and go


def client_came(turn: Turn, event: ev.ClientCame) -> None:
    """A client has the device; it goes first."""
    turn.set(attached=True, p2p=False, by_client=False)
    turn.do(ev.CeaseProbing())


def client_goes_on(turn: Turn, *, settling: bool) -> None:
    """A client of another daemon is there as before: go on with what is left of its migration.

    What the function does is known from the record, and is asked all the same: the agent may have been started anew as
    well. A load of which something was given is lost, since how far it came is known to nobody.

    Args:
        turn: the event's.
        settling: the background works for the record's goal as it did before.
    """
    turn.lose_load_begun("the daemon was started again")
    record = turn.record
    if record.goal is not None:
        if settling:
            turn.do(ev.Settle())
        turn.answer()
    elif record.certainty is Certainty.FAILED:
        turn.answer()
    elif not record.busy:
        turn.leave(Outcome.CANCELLED)
        fit_wanted(turn, ev.FitWanted())
    elif record.saves and not record.handed and record.stream is not None and not record.stream.whole:
        turn.begin(PlanProgress(plans.GO_ON_SAVING, record.state))
    elif record.loads and record.load_failure is None:
        turn.begin(PlanProgress(plans.GO_ON_LOADING, record.state))
    else:
        turn.begin(PlanProgress(plans.GO_ON, record.state))


def then_gone_on(turn: Turn, errand: PlanProgress) -> None:
    """All of it is as the client knows it."""
    turn.set(asked=True)
    turn.answer()


def fall_go_on(turn: Turn, errand: PlanProgress, step: Step, failure: Failure) -> None:
    """The function is as it was; what cannot be saved any more, its client finds out when it reads on."""
    turn.do(ev.HaltSource())
    turn.do(ev.Note("the state can no longer be saved: its stream could not start again", {"error": str(failure)}))
    if failure.fatal:
        turn.broken(str(failure))
    turn.answer()


def client_migrates(turn: Turn, event: ev.ClientMigrates) -> None:
    """It moves the function itself, so nobody else has to."""
    turn.set(by_client=True)


def fit_wanted(turn: Turn, event: ev.FitWanted) -> None:
    """Ask, if there is any doubt that the function runs, and reset it if it must not go on."""
    _next_need(turn, 0, told=False)


#: What a client needs before its first reply, in order; each is looked at once.
_NEEDS: tuple[tuple[str, Callable[[MigrationRecord], bool]], ...] = (
    (plans.ATTACH_ASK, lambda record: not record.busy and not record.asked),
    (plans.ATTACH_RESUME, lambda record: record.paused and not record.busy),
    (plans.ATTACH_RESET, lambda record: record.fenced or record.busy),
)


def _next_need(turn: Turn, first: int, *, told: bool) -> None:
    """Begin what the client needs next; without any such need, it is let in.

    Args:
        turn: the event's.
        first: the number of the need to look at first.
        told: the agent has just said that the function runs, so the background need not ask again.
    """
    for name, needed in _NEEDS[first:]:
        if needed(turn.record):
            if name == plans.ATTACH_RESET:
                turn.cease()
                turn.drop()
            turn.begin(PlanProgress(name, turn.record.state))
            return
    if not told:
        turn.do(ev.Probe())
    turn.answer()


def then_fit(turn: Turn, errand: PlanProgress) -> None:
    """One need is met; look at the next one."""
    told = errand.plan == plans.ATTACH_ASK and errand.status is not None
    _next_need(turn, 1 + [name for name, _ in _NEEDS].index(errand.plan), told=told)


def then_fresh(turn: Turn, errand: PlanProgress) -> None:
    """The function was reset, and is the client's."""
    turn.arrive(DeviceState.RUNNING, "reset for a new client")
    turn.do(ev.Probe())
    turn.answer()


def fall_attach(turn: Turn, errand: PlanProgress, step: Step, failure: Failure) -> None:
    """The client is turned away."""
    give_up_attach(turn, errand)
    turn.answer(str(failure), failure.errno)


def give_up_attach(turn: Turn, errand: PlanProgress) -> None:
    """It stays as it is until the next client comes."""
    turn.set(attached=False, fenced=turn.record.fenced or errand.plan == plans.ATTACH_RESET)


def client_went(turn: Turn, event: ev.ClientWent) -> None:
    """Bring a source back that the client did not take, fence what may live elsewhere."""
    lost = turn.record.elsewhere or turn.record.loads
    turn.set(attached=False, logging=False, p2p=False, by_client=False)
    turn.drop()
    if event.logged:
        turn.do(ev.StopLogging())
    if turn.record.over_link:
        turn.unpause("the client has gone")
    record = turn.record
    known = record.certainty is Certainty.KNOWN
    if record.state is DeviceState.RUNNING and known:
        # A function that runs and has no client needs no session.
        turn.do(ev.LetGo(force=True) if record.begun is None else ev.Leave(Outcome.CANCELLED))
    elif lost or record.certainty is Certainty.FAILED:
        # Whoever has the state may run it; only a reset gives this function back.
        turn.cease()
        turn.set(fenced=True)
        turn.do(ev.Note("the function stays stopped until it is reset for its next client"))
        turn.do(ev.LetGo(force=True))
    elif record.state is DeviceState.PRE_COPY and known:
        turn.arrive(DeviceState.RUNNING, "the client has gone")
    elif known:
        turn.settle(Goal.RESUME, "the client has gone")
    turn.set(owner=None)


# Resets


def reset_asked(turn: Turn, event: ev.ResetAsked) -> None:
    """DEVICE_RESET: always the device, and the agent if there is any doubt that the function runs."""
    turn.set(p2p=False)
    if turn.record.busy:
        _begin_reset(turn, plans.RESET)
        return
    clearing = turn.record.begun is not None
    if clearing:
        turn.do(ev.CeaseLeaving())
    turn.begin(PlanProgress(plans.RESET_CLEARING if clearing else plans.RESET_IDLE, turn.record.state))


def guest_reset(turn: Turn, event: ev.GuestReset) -> None:
    """The guest has reset the function through configuration space, which the device has done already."""
    turn.set(p2p=False)
    record = turn.record
    saved = record.state is DeviceState.PRE_COPY and record.saves and record.certainty is Certainty.KNOWN
    if not record.busy:
        turn.answer()
    elif event.restarts and saved and record.goal is None:
        turn.begin(PlanProgress(plans.RESTART, record.state))
    else:
        _begin_reset(turn, plans.GUEST_RESET)


def _begin_reset(turn: Turn, plan: str) -> None:
    """Reset by the agent and the device, or by what of the two there is."""
    stopped = not turn.record.runs
    turn.cease()
    turn.do(ev.CeaseLeaving())
    turn.drop()
    turn.begin(PlanProgress(plan, turn.record.state, touched=stopped))


def then_reset(turn: Turn, errand: PlanProgress) -> None:
    """What there is of agent and device has reset the function."""
    missing = errand.missing
    if missing is None:
        turn.arrive(DeviceState.RUNNING, "reset")
    elif missing.fatal:
        turn.settle(Goal.RESET, f"the reset failed: {missing}")
        turn.answer(f"the function could not be reset: {missing}", missing.errno)
        return
    elif not errand.touched and missing.unsent:
        turn.run_again(f"reset without its agent: {missing}")
    else:
        _owe_reset(turn, missing, ResetDue.DEVICE if errand.plan == plans.RESET else ResetDue.GUEST)
    turn.answer()


def _owe_reset(turn: Turn, missing: Failure, due: ResetDue) -> None:
    """The client's reset is answered; the agent does its part when it can, and no guest's access goes on before."""
    turn.do(ev.Note("the function is reset as soon as its agent answers; until then no client may use it"))
    old = turn.record.shown
    turn.set(
        state=DeviceState.RUNNING,
        over_link=False,
        fenced=False,
        owner=None,
        handed=False,
        committed=False,
        reset_due=due,
        asked=True,
    )
    turn.settle(Goal.RESET, f"reset without its agent: {missing}")
    turn.do(ev.Tell(old, turn.record.shown, "reset"))


def fall_reset(turn: Turn, errand: PlanProgress, step: Step, failure: Failure) -> None:
    """The device could not be reset; the background goes on with it."""
    turn.settle(Goal.RESET, "the device did not reset")
    turn.answer(str(failure), failure.errno)


def give_up_reset(turn: Turn, errand: PlanProgress) -> None:
    """The reset may have been done or not, so it is done in any case."""
    turn.settle(Goal.RESET, "the reset was given up")


def fall_told(turn: Turn, errand: PlanProgress, step: Step, failure: Failure) -> None:
    """Nobody but who asked has to know."""
    turn.answer(str(failure), failure.errno)


def fall_restart(turn: Turn, errand: PlanProgress, step: Step, failure: Failure) -> None:
    """Without the agent there is no stream any more; the guest's reset is done all the same."""
    turn.do(ev.HaltSource())
    if failure.away:
        turn.do(
            ev.Note("the state cannot be saved any more: its stream could not start again", {"error": str(failure)})
        )
        turn.begin(replace(errand, at=errand.at + 1))
        return
    if failure.fatal:
        turn.broken(str(failure))
    turn.answer(f"the stream could not start again: {failure}", failure.errno)


def give_up_restart(turn: Turn, errand: PlanProgress) -> None:
    """Half of a stream is none."""
    turn.do(ev.HaltSource())
