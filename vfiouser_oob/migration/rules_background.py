"""The rules of what happens by itself: the background's attempts, what the agent says, state that was moved."""

from __future__ import annotations

from vfiouser_agents.api import AgentState
from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration import plans
from vfiouser_oob.migration.fence import REACTIONS, VERDICTS, FenceVerdict, Reaction
from vfiouser_oob.migration.plans import Do, Step
from vfiouser_oob.migration.record import Certainty, Failure, Goal, PlanProgress, Stream
from vfiouser_oob.migration.turn import Turn
from vfiouser_protocol.constants import DeviceState

# The background


def attempt_due(turn: Turn, event: ev.AttemptDue) -> None:
    """Begin an attempt to reach the goal."""
    goal = turn.record.goal
    if goal is not None and turn.record.errand is None:
        turn.begin(PlanProgress(plans.SETTLING[goal, turn.record.reset_due], turn.record.state))


def then_brought_back(turn: Turn, errand: PlanProgress) -> None:
    """The background has started the function again."""
    turn.run_again("brought back")
    _let_go(turn)


def then_was_reset(turn: Turn, errand: PlanProgress) -> None:
    """The background has reset it; a VM that has paused it meanwhile finds it paused."""
    if turn.record.reset_due is not None and turn.record.over_link:
        turn.arrive(DeviceState.STOP, "reset", over_link=True)
    else:
        turn.run_again("reset")
    _let_go(turn)


def then_learned(turn: Turn, errand: PlanProgress) -> None:
    """The background was told where the function is, if the agent has made up its mind."""
    status = errand.status
    assert status is not None
    if status.state is AgentState.QUIESCED:
        if errand.plan != plans.SETTLE_STOP and not status.pending:
            turn.begin(PlanProgress(plans.SETTLE_STOP, errand.origin))
    elif not status.pending:
        turn.adopt(status)
        _let_go(turn)


def _let_go(turn: Turn) -> None:
    if not turn.record.attached and not turn.record.busy:
        turn.do(ev.LetGo())


def fall_try_again(turn: Turn, errand: PlanProgress, step: Step, failure: Failure) -> None:
    """An attempt has failed; the next one comes after a pause."""
    if failure.fatal:
        turn.broken(str(failure))
    elif failure.unclear and turn.record.certainty is Certainty.KNOWN:
        turn.doubt(str(failure))
    elif step.do in _BY_DEVICE:
        turn.do(ev.Note("the device did not reset", {"error": str(failure)}))


def keep_trying(turn: Turn, errand: PlanProgress) -> None:
    """Its goal stands."""


_BY_DEVICE = frozenset({Do.RESET_DEVICE, Do.RESET_DEVICE_AGAIN, Do.WRITE_CONFIG})


# What the agent says


def probed(turn: Turn, event: ev.Probed) -> None:
    """Take what the agent says about a function that no migration of ours is about."""
    turn.set(blocked=None)
    if turn.record.busy or turn.record.begun is not None:
        return
    turn.set(asked=True)
    found = VERDICTS[event.status.state][event.migrated]
    turn.set(fenced=found is FenceVerdict.FENCED, paused=found is FenceVerdict.PAUSED)
    if found is not FenceVerdict.FREE:
        told = event.status.state.value
        turn.do(ev.Note("the function does not run", {"agent_state": told, "verdict": found.value}))
        if turn.record.attached:
            # A client came before we knew: the function is of no use to it until this is done.
            turn.settle(Goal.RESET if found is FenceVerdict.FENCED else Goal.RESUME, f"the agent says {told}")
    turn.do(ev.LetGo())


def blocked(turn: Turn, event: ev.Blocked) -> None:
    """Note what keeps the function from being migrated until somebody changes it; that is told once."""
    if turn.record.blocked != event.reason:
        turn.set(blocked=event.reason)
        turn.do(ev.Note("the function cannot be migrated", {"reason": event.reason}))


def heard(turn: Turn, event: ev.Heard) -> None:
    """Take what the agent says about a function that nobody is changing."""
    if turn.record.certainty is not Certainty.KNOWN:
        return
    reaction = REACTIONS[turn.record.at_agent][event.status.state]
    if reaction is Reaction.NOTE:
        turn.do(ev.Note("somebody else changes the function", {"agent_state": event.status.state.value}))
    elif reaction is Reaction.ADOPT:
        turn.cease()
        turn.adopt(event.status)


def device_broke(turn: Turn, event: ev.DeviceBroke) -> None:
    """The agent says, beside any errand, that the function is broken."""
    turn.broken(event.reason)


def began_at_agent(turn: Turn, event: ev.BeganAtAgent) -> None:
    """Remember what the agent was told of, to take it over, or to end it."""
    turn.set(begun=event.begun)


# What is moved


def moved(turn: Turn, event: ev.Moved) -> None:
    """The stream has gone on."""
    stream = turn.record.stream
    if stream is not None:
        now = Stream(stream.role, stream.epoch, event.position, stream.whole or event.handed)
        turn.set(stream=now, handed=turn.record.handed or event.handed)


def load_failed(turn: Turn, event: ev.LoadFailed) -> None:
    """What was loaded is lost; only the client's reset leads out."""
    if turn.record.loads and turn.record.load_failure is None:
        turn.set(load_failure=event.reason, last_error=event.reason)


def logging(turn: Turn, event: ev.Logging) -> None:
    """Remember whether the agent logs dirty pages."""
    turn.set(logging=event.on)
