"""A session that relays: every operation goes through one method, with the arguments that it was given."""

from __future__ import annotations

from typing import Any

import pytest

from vfiouser_agents.api import Capabilities, Session
from vfiouser_agents.operations import BY_WIRE, Op, Operation, invoke
from vfiouser_agents.relay import RelaySession


class Noting(RelaySession):
    """Notes what it is to carry out, and answers with a word."""

    function_id = "f0"
    caps = Capabilities()

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    async def operate(self, op: Op[Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Note it."""
        self.asked.append((op.name, args))
        return f"answer to {op}" if op.result else None


def test_nothing_else_is_left_to_do() -> None:
    """What a derived class must have is `operate`, and what names the session."""
    assert {"operate", "function_id", "caps"} == RelaySession.__abstractmethods__
    assert Session.__abstractmethods__ - {"function_id", "caps"} == {op.name for op in BY_WIRE.values()}


@pytest.mark.parametrize("op", BY_WIRE.values(), ids=str)
async def test_an_operation_is_relayed(op: Op[..., Any]) -> None:
    """Arguments and answer pass through as they are."""
    session, args = Noting(), tuple(object() for _ in op.arguments)
    assert (f"answer to {op}" if op.result else None) == await invoke(session, op, *args)
    assert [(op.name, args)] == session.asked


async def test_the_devices_own_reset_is_not_relayed() -> None:
    """Whoever has the device has seen it."""
    session = Noting()
    await invoke(session, Operation.WAS_RESET)
    assert [] == session.asked
