"""The table of operations: it names every method of a session once, and says what holds for each."""

from __future__ import annotations

import inspect

from vfiouser_agents.api import Chunk, Phase, Range, Role, Session, Status
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_agents.operations import BY_NAME, BY_WIRE, OPERATIONS, Operation, invoke


def test_every_call_of_a_session_is_an_operation() -> None:
    """Whatever a session can be asked to do has a row, and no row is about anything else."""
    calls = {name for name, _ in inspect.getmembers(Session, inspect.iscoroutinefunction)} - {"aclose"}
    assert {op.name for op in OPERATIONS} == calls
    assert len(BY_NAME) == len(OPERATIONS)
    assert len(BY_WIRE) == len(OPERATIONS) - 1, "only was_reset is not sent"


def test_arguments_and_results_are_those_of_the_interface() -> None:
    """What is sent and what comes back is typed once, by the interface."""
    assert dict(Operation.SAVE.arguments) == {"offset": int, "limit": int, "phase": Phase}
    assert Operation.SAVE.result is Chunk
    assert dict(Operation.STATUS.arguments) == {}
    assert Operation.STATUS.result is Status
    assert dict(Operation.LOAD_BEGIN.arguments) == {"total": int | None}
    assert Operation.STOP.result is None
    assert list(Operation.DIRTY_START.arguments) == ["ranges", "page_size"]


def test_only_state_needs_a_side_of_a_migration() -> None:
    """What moves state needs its role; nothing else does."""
    assert {op.name: op.role for op in OPERATIONS if op.role} == {
        "save": Role.SOURCE,
        "load_begin": Role.DESTINATION,
        "load": Role.DESTINATION,
        "load_commit": Role.DESTINATION,
    }


async def test_an_operation_is_carried_out_by_whatever_session_it_is() -> None:
    """`invoke` calls the session's own method, with the arguments in any form."""
    async with MemoryAgent([MemoryFunction("vf0")]) as agent:
        session = await agent.open("vf0")
        await invoke(session, Operation.BEGIN, Role.SOURCE, migration_id="m")
        status = await invoke(session, Operation.STATUS)
        assert (status.role, status.migration_id) == (Role.SOURCE, "m")
        await invoke(session, Operation.DIRTY_START, [Range(0, 4096)], 4096)
