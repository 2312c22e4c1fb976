"""Large messages over one connection of the reference protocol, many at once and in both directions."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
import trio.testing
from xxhash import xxh3_128

from agentbed import TRANSPORTS, served
from vfiouser_agents.api import Outcome, Phase, Role, Session
from vfiouser_agents.errors import AgentError
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_agents.rpc.core import Answer, NoRequests, RpcConnection
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec


class Mirror:
    """Answers a call with the value that came, and holds nothing back."""

    def request(self, method: str, params: dict[str, object]) -> Answer:
        """Take a value."""

        async def answer() -> object:
            await trio.lowlevel.checkpoint()
            return {"before": method, "data": params["data"], "behind": 1}

        return answer

    def notification(self, method: str, params: dict[str, object]) -> None:
        """Nothing is expected."""
        raise AssertionError(method)


async def test_many_large_messages_at_once_keep_apart() -> None:
    """Messages that do not fit into the socket do not get into each other, whoever sends them when."""
    ours, theirs = socket.socketpair()
    streams = [trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in (ours, theirs)]
    caller = RpcConnection(streams[0], MsgpackCodec(), NoRequests())
    mirror = RpcConnection(streams[1], MsgpackCodec(), Mirror())
    answered = 0

    async def call(number: int) -> None:
        nonlocal answered
        for turn in range(5):
            data = bytes([number, turn]) * (100_000 + 7919 * number)
            result = await caller.call(f"m{number}", {"data": data, "small": number})
            assert {"before": f"m{number}", "data": data, "behind": 1} == result
            answered += 1

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller.run)
            nursery.start_soon(mirror.run)
            async with trio.open_nursery() as calls:
                for number in range(24):
                    calls.start_soon(call, number)
            nursery.cancel_scope.cancel()
    assert 24 * 5 == answered


async def carry(source: Session, target: Session) -> bytes:
    """Move a state in chunks of a megabyte; returns its digest."""
    await source.begin(Role.SOURCE, "m")
    await target.begin(Role.DESTINATION, "m")
    await source.stop()
    await target.stop()
    await target.load_begin(None)
    digest, offset, last = xxh3_128(), 0, False
    while not last:
        chunk = await source.save(offset, 1 << 20, Phase.FINAL)
        await target.load(offset, chunk.data)
        digest.update(chunk.data)
        offset, last = offset + len(chunk.data), chunk.eof
    await target.load_commit(offset, digest.digest())
    for session in (source, target):
        await session.end(Outcome.SUCCESS)
    return digest.digest()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_functions_side_by_side_over_one_connection(transport: str, tmp_path: Path) -> None:
    """Several states of some megabytes go over one connection at the same time, and each arrives whole."""
    functions = [MemoryFunction(f"f{number}", state_size=4 << 20, seed=number) for number in range(8)]
    digests: list[bytes] = []

    async def move(number: int) -> None:
        digests.append(await carry(await agent.open(f"f{number}"), await agent.open(f"f{number + 4}")))

    with trio.fail_after(60):
        async with (
            served(MemoryAgent(functions), transport, tmp_path / "a") as place,
            place.client() as agent,
            trio.open_nursery() as nursery,
        ):
            for number in range(4):
                nursery.start_soon(move, number)
    # Four states, all different: the commit of each compared its own digest.
    assert 4 == len(set(digests))


async def test_a_call_given_up_halfway_disturbs_nobody() -> None:
    """A large request whose caller is cancelled while it is being sent is sent to its end."""
    ours, theirs = socket.socketpair()
    streams = [trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in (ours, theirs)]
    caller = RpcConnection(streams[0], MsgpackCodec(), NoRequests())
    mirror = RpcConnection(streams[1], MsgpackCodec(), Mirror())
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller.run)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0) as scope:
                await caller.call("none", {"data": b"n" * 1000})
            assert scope.cancelled_caught
            async with trio.open_nursery() as calls:
                calls.start_soon(caller.call, "given up", {"data": b"x" * (4 << 20)})
                await trio.testing.wait_all_tasks_blocked()
                calls.cancel_scope.cancel()
            nursery.start_soon(mirror.run)
            result = await caller.call("next", {"data": b"y" * (1 << 20)})
            assert b"y" * (1 << 20) == result["data"]
            nursery.cancel_scope.cancel()


async def test_the_end_in_a_large_message_is_a_loss() -> None:
    """A connection that ends within a large value fails the call, and nothing waits for the rest."""
    ours, theirs = socket.socketpair()
    streams = [trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in (ours, theirs)]
    caller = RpcConnection(streams[0], MsgpackCodec(), NoRequests())
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller.run)

            async def answer_half() -> None:
                await streams[1].receive_some(1000)
                await streams[1].send_all(
                    b"\x94\x01\x00\xc0\x81\xa4data\xc6" + (1 << 20).to_bytes(4, "big") + bytes(99)
                )
                await streams[1].aclose()

            nursery.start_soon(answer_half)
            with pytest.raises(AgentError, match="closed the connection"):
                await caller.call("m", {})
            nursery.cancel_scope.cancel()
