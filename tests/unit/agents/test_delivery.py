"""Whether a call can have reached its agent: by its error's class, and better by what the adapter notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from agentbed import served
from vfiouser_agents.delivery import followed, preparing, sending
from vfiouser_agents.errors import ERRORS, AgentError, Busy, ConnectError, DeviceFailed, TransportLost
from vfiouser_agents.faults import FaultyAgent, NeverAnswers
from vfiouser_agents.memory import MemoryAgent, MemoryFunction


@pytest.mark.parametrize(
    ("error", "noted", "unsent", "unclear"),
    [
        (ConnectError("x"), None, True, False),
        (ConnectError("x"), False, True, False),
        # The way was lost behind the first of several messages.
        (ConnectError("x"), True, False, True),
        (TransportLost("x"), None, False, True),
        (TransportLost("x"), False, True, False),
        (TransportLost("x"), True, False, True),
        (Busy("x"), None, False, False),
        (Busy("x"), True, False, False),
        (DeviceFailed("x"), True, False, False),
    ],
)
def test_judging(error: AgentError, noted: bool | None, unsent: bool, unclear: bool) -> None:
    """What the adapter noted counts, and its error's class where it noted nothing."""
    with followed() as delivery:
        if noted is not None:
            (sending if noted else preparing)()
    delivery.judge(error)
    assert (unsent, unclear) == (error.unsent, error.unclear)


def test_classes() -> None:
    """Only what is raised before anything was sent says by itself that nothing was."""
    unsent = {code for code, kind in ERRORS.items() if kind.undelivered}
    assert {"connect", "auth"} == unsent
    assert {"connect", "auth", "transport-lost"} == {code for code, kind in ERRORS.items() if kind.away}


def test_nobody_follows() -> None:
    """An adapter may note what it likes without anybody who wants to know."""
    preparing()
    sending()


PROTOCOLS = ("msgpack-rpc", "jsonrpc", "grpc", "legacy-tcp")


def options(protocol: str) -> dict[str, Any]:
    """What an adapter needs beside the address."""
    return {"device": "f0"} if protocol == "legacy-tcp" else {}


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_call_that_is_not_sent(protocol: str, tmp_path: Path) -> None:
    """With the agent gone, a call on an open session was not sent; with an agent that does not answer, it was."""
    inner = FaultyAgent(MemoryAgent([MemoryFunction("f0", 4096, 1)]))
    async with served(inner, "unix", tmp_path, protocol) as server, server.client(**options(protocol)) as client:
        session = await client.open("f0")
        await session.stop()
        await session.resume()
        inner.inject("stop", NeverAnswers())
        with trio.move_on_after(0.3), followed() as delivery:
            await session.stop()
        assert not delivery.unsent
        inner.restart()
        await server.stop()
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(AgentError) as caught, followed() as delivery:
            await session.stop()
        delivery.judge(caught.value)
        assert delivery.unsent
        assert (True, False) == (caught.value.unsent, caught.value.unclear)
