"""The rules that all sessions share: who may do what, in which state, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from vfiouser_agents.api import AgentState, Capabilities, Phase, Role
from vfiouser_agents.errors import (
    AgentError,
    Busy,
    DeviceFailed,
    Incompatible,
    InvalidArgument,
    InvalidState,
    NoResources,
    NotFound,
    Unsupported,
)
from vfiouser_agents.memory import ALL_CAPABILITIES, MemoryFunction, MemorySession
from vfiouser_agents.operations import Operation
from vfiouser_agents.rules import SessionRules, require_same

LITTLE = Capabilities(stop_copy=False, precopy=False, dirty=False, reset=False)


def function_in(state: AgentState, *, spoiled: bool = False, caps: Capabilities = ALL_CAPABILITIES) -> MemoryFunction:
    """A function that got into a state somehow."""
    function = MemoryFunction(caps=caps)
    function.state, function.spoiled = state, spoiled
    return function


def rules_of(function: MemoryFunction) -> SessionRules:
    """The rules of a new session for it."""
    return SessionRules(MemorySession(function), function)


def test_only_the_owner_may_change_a_migration() -> None:
    """Another session's calls are in nobody's way if they change nothing, and refused otherwise."""
    function = MemoryFunction()
    first, second = MemorySession(function), MemorySession(function)
    function.role, function.migration_id, function.owner = Role.SOURCE, "m1", first
    SessionRules(first, function).admit(Operation.SAVE, is_open=True)
    SessionRules(second, function).admit(Operation.DESCRIBE, is_open=True)
    with pytest.raises(Busy, match="function f0 is in migration 'm1' of another session"):
        SessionRules(second, function).admit(Operation.STOP, is_open=True)
    with pytest.raises(InvalidState, match="load needs a session that began as destination; this one is source"):
        SessionRules(first, function).admit(Operation.LOAD, is_open=True)
    function.owner = None
    with pytest.raises(InvalidState, match="save needs a session that began as source; this one is in no migration"):
        SessionRules(first, function).admit(Operation.SAVE, is_open=True)
    with pytest.raises(NotFound, match="is closed"):
        SessionRules(first, function).admit(Operation.STATUS, is_open=False)


@pytest.mark.parametrize(
    ("owned_by", "state", "error"),
    [
        ("me", AgentState.RUNNING, InvalidState),
        ("another", AgentState.RUNNING, Busy),
        ("nobody", AgentState.STOPPED, InvalidState),
        ("nobody", AgentState.RUNNING, None),
    ],
)
def test_who_makes_way_for_a_new_migration(owned_by: str, state: AgentState, error: type[AgentError] | None) -> None:
    """Only one whose session is gone and whose function runs as if nothing had been; the same one is taken over."""
    function = MemoryFunction()
    me, another = MemorySession(function), MemorySession(function)
    function.role, function.migration_id, function.state = Role.SOURCE, "old", state
    function.owner = {"me": me, "another": another, "nobody": None}[owned_by]
    rules = SessionRules(me, function)
    assert rules.make_way(Role.SOURCE, "old")
    if error is None:
        assert not rules.make_way(Role.SOURCE, "new")
        assert {"role": None, "migration_id": ""} == {
            name: getattr(function, name) for name in ("role", "migration_id")
        }
    else:
        with pytest.raises(error, match="function f0 is source of 'old'"):
            rules.make_way(Role.SOURCE, "new")
        assert "old" == function.migration_id


@pytest.mark.parametrize(
    ("state", "spoiled", "phase", "error"),
    [
        (AgentState.RUNNING, False, Phase.PRECOPY, None),
        (AgentState.QUIESCED, False, Phase.PRECOPY, None),
        (AgentState.STOPPED, False, Phase.PRECOPY, InvalidState),
        (AgentState.RUNNING, False, Phase.FINAL, InvalidState),
        (AgentState.STOPPED, False, Phase.FINAL, None),
        (AgentState.LOADED, False, Phase.FINAL, None),
        (AgentState.STOPPED, True, Phase.FINAL, InvalidState),
        (AgentState.ERROR, False, Phase.FINAL, DeviceFailed),
    ],
)
def test_where_a_state_can_be_saved(
    state: AgentState, spoiled: bool, phase: Phase, error: type[AgentError] | None
) -> None:
    """In pre-copy of what runs, at the end of what is still; never half a state, nor of a device that has failed."""
    rules = rules_of(function_in(state, spoiled=spoiled))
    if error is None:
        rules.saveable_now(phase)
    else:
        with pytest.raises(error):
            rules.saveable_now(phase)


def test_what_can_be_loaded() -> None:
    """A state that fits, in pieces that fit, into a function that is still."""
    caps = replace(ALL_CAPABILITIES, max_state=1000, max_chunk=10)
    stopped = rules_of(function_in(AgentState.STOPPED, caps=caps))
    for total in (None, 0, 1000):
        stopped.loadable(total)
    stopped.loadable_piece(bytes(10))
    with pytest.raises(NoResources):
        stopped.loadable(1001)
    with pytest.raises(InvalidArgument, match="load of 11 bytes; at most 10"):
        stopped.loadable_piece(bytes(11))
    with pytest.raises(InvalidState, match="not running"):
        rules_of(function_in(AgentState.RUNNING)).loadable(None)
    with pytest.raises(DeviceFailed):
        rules_of(function_in(AgentState.ERROR)).loadable(None)


def test_what_cannot_be_done_is_told() -> None:
    """Each ability that a function has not is refused by name, before anything is asked of it."""
    rules = rules_of(function_in(AgentState.RUNNING, caps=LITTLE))
    calls: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: rules.migratable("m"), "cannot be migrated"),
        (lambda: rules.saveable_piece(0, 1, Phase.PRECOPY), "no pre-copy"),
        (rules.can_log, "no dirty log"),
        (rules.resettable, "cannot be reset"),
    )
    for call, words in calls:
        with pytest.raises(Unsupported, match=words):
            call()


@pytest.mark.parametrize(
    ("can_reset", "words"),
    [(True, "reset it, or load another one$"), (False, "; reset its device, or load another one$")],
)
def test_the_way_out_of_half_a_state(can_reset: bool, words: str) -> None:
    """Only a way that there is gets named."""
    function = function_in(AgentState.STOPPED, spoiled=True, caps=replace(ALL_CAPABILITIES, reset=can_reset))
    with pytest.raises(InvalidState, match=words):
        rules_of(function).committed()


def test_differences_name_both_sides() -> None:
    """Fields and fingerprint alike, also what only one side has."""
    here = MemoryFunction().describe()
    require_same(here, here)
    there = replace(here, firmware="2.0", fingerprint={"paths": "2"})
    with pytest.raises(Incompatible) as caught:
        require_same(there, here, there.state_max - 1)
    assert [
        "firmware is '2.0' there and '1.0' here",
        "paths is '2' there and None here",
        "queues is None there and '8' here",
        f"state of {there.state_max} bytes there, room for {there.state_max - 1} here",
    ] == list(caught.value.reasons)
