"""The `legacy-tcp` adapter against a server of the 2022 plug-in example's protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from xxhash import xxh3_128_digest

from agentbed import served
from agentbed.whole_state import load_all, save_all
from vendors.legacy import RESUMING, RUNNING, SAVING, LegacyServer
from vfiouser_agents.api import AgentState, Outcome, Phase, Role
from vfiouser_agents.errors import (
    AgentError,
    ConnectError,
    DeadlineExceeded,
    DeviceFailed,
    InvalidState,
    NotFound,
    ProtocolError,
    TransportLost,
    Unsupported,
)
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_agents.options import OptionError
from vfiouser_agents.registry import make_agent
from vfiouser_agents.testing import CheckOutcome, CheckResult, check_agent

UPDATE_PENDING, SET_STATE, GET_STATE, SAVE, LOAD, FINISH = 1, 2, 3, 4, 5, 7


@asynccontextmanager
async def vendor(server: LegacyServer) -> AsyncIterator[dict[str, Any]]:
    """A vendor's server for the length of the block; gives the options that reach it."""
    async with trio.open_nursery() as nursery:
        port = await nursery.start(server.serve)
        yield {"address": f"tcp://127.0.0.1:{port}"}
        nursery.cancel_scope.cancel()


def assert_kept(results: list[CheckResult]) -> None:
    """No check failed, and enough of them applied for that to mean something."""
    assert [] == [(result.name, result.detail) for result in results if result.outcome is CheckOutcome.FAILED]
    assert sum(result.outcome is CheckOutcome.PASSED for result in results) >= 35


@pytest.mark.parametrize("order", ["little", "big"])
async def test_contract(order: str) -> None:
    """The contract is kept as far as the capabilities go, in both byte orders."""
    async with vendor(LegacyServer(order="<" if order == "little" else ">")) as options:
        assert_kept(await check_agent(partial(make_agent, "legacy-tcp", {**options, "byte_order": order})))


@pytest.mark.parametrize("transport", ["unix", "tcp", "mtls"])
async def test_contract_of_our_own_server(transport: str, tmp_path: Path) -> None:
    """Our server of this protocol and our client keep the contract together."""
    agent = MemoryAgent([MemoryFunction(state_size=100_000)])
    async with served(agent, transport, tmp_path, "legacy-tcp") as server:
        assert_kept(await check_agent(server.client))


async def test_migration() -> None:
    """States go the ways that VFIO's first protocol has, and the bytes arrive."""
    here, there = LegacyServer(b"guest" * 1000, faithful=True), LegacyServer(b"other" * 1000, faithful=True)
    async with (
        vendor(here) as first,
        vendor(there) as second,
        make_agent("legacy-tcp", {**first, "chunk_size": 4096}) as source,
        make_agent("legacy-tcp", {**second, "chunk_size": 4096}) as target,
    ):
        sender, receiver = await source.open("device"), await target.open("device")
        await receiver.check(await sender.describe())
        await load_all(receiver, await save_all(sender))
        await receiver.resume()
        for session in (sender, receiver):
            await session.end(Outcome.SUCCESS)
    assert b"guest" * 1000 == there.content
    assert [SAVING | RUNNING, SAVING, 0] == here.states
    assert [RESUMING, RUNNING] == there.states
    assert (FINISH, FINISH) == (here.requests[-1], there.requests[-1])


async def test_a_descriptor_without_format_has_the_protocols_own() -> None:
    """What is saved can be loaded, whatever else the configuration says of the function."""
    async with (
        vendor(LegacyServer()) as options,
        make_agent("legacy-tcp", {**options, "descriptor": {"vendor": "acme", "model": "nic 9"}}) as agent,
    ):
        session = await agent.open("device")
        assert (("legacy-tcp",), "legacy-tcp") == (session.caps.formats, (await session.describe()).format_id)


async def test_each_piece_is_confirmed() -> None:
    """SET_STATE and LOAD_BUFFER, which have no answers, are followed by GET_STATE."""
    server = LegacyServer()
    async with vendor(server) as options, make_agent("legacy-tcp", {**options, "chunk_size": 4096}) as agent:
        session = await agent.open("device")
        await load_all(session, bytes(10000))
        await session.resume()
    blind = [code for code, after in zip(server.requests, server.requests[1:], strict=False) if after != GET_STATE]
    assert SET_STATE not in blind
    assert LOAD not in blind
    assert 3 == server.requests.count(LOAD)


async def test_the_connection_is_free_for_others_outside_of_a_migration() -> None:
    """The server takes one client at a time, so the connection is kept only from begin to end."""
    server = LegacyServer()
    async with vendor(server) as options, make_agent("legacy-tcp", options) as agent:
        session = await agent.open("device")
        await session.stop()
        await session.resume()
        assert 2 == server.clients
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        await session.status()
        assert 3 == server.clients
        await session.end(Outcome.CANCELLED)
        with trio.fail_after(5):
            async with make_agent("legacy-tcp", options) as other:
                assert AgentState.STOPPED is (await (await other.open("device")).status()).state
        await session.resume()


FAULTS: list[tuple[str, int, Callable[[trio.SocketStream], object], type[AgentError], str]] = [
    ("the server closes", GET_STATE, lambda _: "close", TransportLost, "after 0 of 16 bytes"),
    ("a short answer", GET_STATE, lambda _: b"\x06\0\0\0", DeadlineExceeded, "0.2 s"),
    ("no answer", GET_STATE, lambda _: "hang", DeadlineExceeded, "0.2 s"),
    ("a wrong code", GET_STATE, lambda _: bytes([5, 0, 0, 0, 8]) + bytes(11), ProtocolError, "code 5"),
    ("a wrong size", GET_STATE, lambda _: bytes([6, 0, 0, 0, 4]) + bytes(11), ProtocolError, "size 4"),
    (
        "another byte order",
        GET_STATE,
        lambda _: bytes([0, 0, 0, 6, 0, 0, 0, 8]) + bytes(8),
        ProtocolError,
        "byte_order",
    ),
    ("a state that is none", GET_STATE, lambda _: bytes([6, 0, 0, 0, 8, 0, 0, 0, 9]) + bytes(7), AgentError, "9"),
    ("two answers", GET_STATE, lambda _: (bytes([6, 0, 0, 0, 8]) + bytes(11)) * 2, ProtocolError, "32 bytes"),
    ("a state that is not taken", SET_STATE, lambda _: "ignored", InvalidState, "in state 1 after"),
]


@pytest.mark.parametrize(("what", "code", "does", "kind", "says"), FAULTS, ids=[row[0] for row in FAULTS])
async def test_faults(
    what: str, code: int, does: Callable[[trio.SocketStream], object], kind: type[AgentError], says: str
) -> None:
    """Each fault is an error that says what came, and the next call works, on a new connection."""
    server = LegacyServer()
    async with vendor(server) as options, make_agent("legacy-tcp", {**options, "call_timeout_s": 0.2}) as agent:
        session = await agent.open("device")
        server.instead[code] = does
        with pytest.raises(kind, match=says):
            await session.stop()
        await session.stop()
        assert AgentState.STOPPED is (await session.status()).state


async def test_save_cut_short() -> None:
    """A server that closes in the middle of SAVE_BUFFER gives no state, not even a part; saving can begin anew."""
    server = LegacyServer()
    async with vendor(server) as options, make_agent("legacy-tcp", options) as agent:
        session = await agent.open("device")
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        first = await session.save(0, 100, Phase.FINAL)
        server.instead[SAVE] = lambda _: "close"
        with pytest.raises(TransportLost):
            await session.save(100, 100, Phase.FINAL)
        with pytest.raises(AgentError, match="and 0"):
            await session.save(100, 100, Phase.FINAL)
        assert first == await session.save(0, 100, Phase.FINAL)
        assert server.content == await save_all(session)
        assert [SAVING | RUNNING, SAVING, 0, SAVING, 0] == server.states


async def test_state_larger_than_allowed() -> None:
    """A server that gives more than `max_state` is stopped there."""
    async with vendor(LegacyServer()) as options, make_agent("legacy-tcp", {**options, "max_state": 5000}) as agent:
        with pytest.raises(ProtocolError, match="at most 5000"):
            await save_all(await agent.open("device"))


async def test_no_state_at_all() -> None:
    """A device in stop-and-copy with nothing to save is an error, not an empty state."""
    async with vendor(LegacyServer(b"")) as options, make_agent("legacy-tcp", options) as agent:
        with pytest.raises(ProtocolError, match="0 bytes"):
            await save_all(await agent.open("device"))


async def test_device_fails_while_loading() -> None:
    """A state ERROR after a piece is DeviceFailed, and the function does not run."""
    server = LegacyServer()
    async with vendor(server) as options, make_agent("legacy-tcp", {**options, "call_timeout_s": 0.5}) as agent:
        session = await agent.open("device")

        def break_it(_: trio.SocketStream) -> object:
            server.state = 6
            return None

        server.instead[LOAD] = break_it
        with pytest.raises(AgentError):
            await load_all(session, bytes(100))
        with pytest.raises(DeviceFailed):
            await session.resume()


async def test_a_load_of_nothing() -> None:
    """A load that was begun and got no byte changes nothing: once the migration has ended, it may run again."""
    server = LegacyServer(b"as before")
    async with vendor(server) as options, make_agent("legacy-tcp", options) as agent:
        session = await agent.open("device")
        await session.begin(Role.DESTINATION, "m")
        await session.stop()
        await session.load_begin(None)
        with pytest.raises(InvalidState):
            await session.resume()
        await session.end(Outcome.FAILED)
        await session.resume()
        assert AgentState.RUNNING is (await session.status()).state
    assert [RESUMING, 0, RUNNING] == server.states
    assert b"as before" == server.content


async def test_half_a_load_does_not_run_before_a_reset() -> None:
    """Bytes go to the device as they come; without the rest they are not run, until the device itself was reset."""
    server = LegacyServer()
    async with vendor(server) as options, make_agent("legacy-tcp", options) as agent:
        session = await agent.open("device")
        await session.begin(Role.DESTINATION, "m")
        await session.stop()
        await session.load_begin(None)
        await session.load(0, b"half a state")
        assert LOAD in server.requests
        await session.end(Outcome.FAILED)
        with pytest.raises(InvalidState, match="not committed"):
            await session.resume()
        await session.was_reset()
        await session.resume()
    assert [RESUMING, 0, RUNNING] == server.states


async def test_the_commit_does_not_take_the_time_of_the_whole_state() -> None:
    """A slow device loads while the state comes in, so that the commit has only the last piece to wait for."""
    server, state = LegacyServer(slow_s=0.05), bytes(20 << 12)
    async with vendor(server) as options, make_agent("legacy-tcp", {**options, "chunk_size": 4096}) as agent:
        session = await agent.open("device")
        await session.begin(Role.DESTINATION, "m")
        await session.stop()
        await session.load_begin(None)
        for offset in range(0, len(state), 4096):
            await session.load(offset, state[offset : offset + 4096])
        with trio.fail_after(0.5):
            await session.load_commit(len(state), xxh3_128_digest(state))
        await session.resume()
    assert state == server.content


async def test_a_load_whose_connection_broke_begins_anew() -> None:
    """A piece that was lost on its way is no reason to lose the state: the device gets everything once more."""
    server, state = LegacyServer(), bytes(range(250)) * 100
    async with vendor(server) as options, make_agent("legacy-tcp", {**options, "chunk_size": 4096}) as agent:
        session = await agent.open("device")
        await session.begin(Role.DESTINATION, "m")
        await session.stop()
        await session.load_begin(None)
        await session.load(0, state[:4096])
        server.instead[LOAD] = lambda _: "close"
        with pytest.raises(TransportLost):
            await session.load(4096, state[4096:8192])
        for offset in range(4096, len(state), 4096):
            await session.load(offset, state[offset : offset + 4096])
        await session.load_commit(len(state), xxh3_128_digest(state))
        await session.resume()
    assert state == server.content


@pytest.mark.parametrize("code", [SAVE, UPDATE_PENDING, GET_STATE])
async def test_a_cancelled_call_comes_to_its_end(code: int) -> None:
    """A source that is cancelled in stop-copy runs again, and the server, which survives no cut, is told the end."""
    server = LegacyServer(faithful=True)
    async with vendor(server) as options, make_agent("legacy-tcp", options) as agent:
        session = await agent.open("device")
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        reached, go_on = trio.Event(), trio.Event()
        server.before[code] = lambda: hold(reached, go_on)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.save, 0, 100, Phase.FINAL)
            await reached.wait()
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.abort)
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        await session.resume()
        await session.end(Outcome.CANCELLED)
        assert AgentState.RUNNING is (await session.status()).state
    assert [SAVING | RUNNING, SAVING, RUNNING] == [state for state in server.states if state]
    assert FINISH == server.requests[-1]
    assert not server.spins


async def hold(reached: trio.Event, go_on: trio.Event) -> None:
    """Wait in the middle of a request."""
    reached.set()
    await go_on.wait()


async def test_the_end_of_an_agent_cuts_nothing_off() -> None:
    """An agent that is left, or cancelled, in the middle of a request lets it finish and says FINISH."""
    server = LegacyServer(faithful=True)
    async with vendor(server) as options:
        reached, go_on = trio.Event(), trio.Event()

        async def stop() -> None:
            async with make_agent("legacy-tcp", options) as agent:
                session = await agent.open("device")
                await session.begin(Role.SOURCE, "m")
                server.before[SET_STATE] = lambda: hold(reached, go_on)
                await session.stop()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            await reached.wait()
            nursery.cancel_scope.cancel()
            go_on.set()
        async with make_agent("legacy-tcp", options) as agent:
            with trio.fail_after(5):
                status = await (await agent.open("device")).status()
        assert (AgentState.STOPPED, Role.SOURCE) == (status.state, status.role)


async def test_the_only_place_at_the_server_is_given_back_with_the_state() -> None:
    """A source that gave everything needs its server no more, although its migration is not over: others may come."""
    server = LegacyServer(faithful=True)
    async with vendor(server) as options, make_agent("legacy-tcp", options) as agent:
        session = await agent.open("device")
        content = await save_all(session)
        assert (0, FINISH) == (server.state, server.requests[-1])
        with trio.fail_after(5):
            async with make_agent("legacy-tcp", options) as other:
                assert AgentState.STOPPED is (await (await other.open("device")).status()).state
        again = await session.save(0, len(content), Phase.FINAL)
        assert (content, True) == (again.data, again.eof)
        await session.resume()
        assert RUNNING == server.state


async def test_what_the_protocol_lacks_is_refused() -> None:
    """There is no name but the configured one, no reset, no pre-copy and no dirty log."""
    async with vendor(LegacyServer()) as options, make_agent("legacy-tcp", {**options, "device": "nvme0"}) as agent:
        session = await agent.open("nvme0")
        for call in (session.reset, partial(session.dirty_start, [], 4096)):
            with pytest.raises(Unsupported):
                await call()
        await session.begin(Role.SOURCE, "m")
        with pytest.raises(Unsupported):
            await session.save(0, 100, Phase.PRECOPY)
        with pytest.raises(NotFound, match="'nvme0'"):
            await agent.open("nvme1")


async def test_nobody_is_there() -> None:
    """An address where nobody listens is a ConnectError."""
    async with make_agent("legacy-tcp", {"address": "tcp://127.0.0.1:1"}) as agent:
        with pytest.raises(ConnectError):
            await agent.connect()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "'address' is missing"),
        ({"address": "tcp://192.0.2.1"}, "192.0.2.1:3333"),
        ({"address": "tcp://[::1]", "byte_order": "native"}, "little or big"),
        ({"address": "tcp://[::1]", "chunk_size": "2M"}, "chunk_size"),
        ({"address": "tcp://[::1]", "descriptor": {"modle": "x"}}, "did you mean 'model'"),
        ({"address": "tcp://[::1]", "descriptor": {"fingerprint": {"x": 1}}}, "table of text"),
        ({"address": "tcp://[::1]", "tls": {}}, "tls does not apply"),
    ],
)
def test_options(options: dict[str, Any], says: str) -> None:
    """Options that cannot be used say why."""
    with pytest.raises(OptionError, match=says):
        make_agent("legacy-tcp", options)


async def test_our_server_refuses_several_functions(tmp_path: Path) -> None:
    """The protocol carries one function, so an agent with two cannot be served with it."""
    agent = MemoryAgent([MemoryFunction("a"), MemoryFunction("b")])
    with pytest.RaisesGroup(OptionError, flatten_subgroups=True):
        async with served(agent, "unix", tmp_path, "legacy-tcp"):
            pass
