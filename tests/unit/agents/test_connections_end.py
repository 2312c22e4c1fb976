"""What is left of a connection that ended: nothing that waits for the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import msgpack
import pytest
import trio
import trio.testing

from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import AgentInfo
from vfiouser_agents.errors import AgentError
from vfiouser_agents.memory import MemoryAgent
from vfiouser_agents.rpc.core import AgentConnection, Handler, RpcConnection
from vfiouser_agents.rpc.endpoint import parse_address
from vfiouser_agents.rpc.messages import Codec
from vfiouser_agents.rpc.methods import PROTOCOL
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec
from vfiouser_agents.rpc.server import ServedAgent
from vfiouser_agents.rpc.wire import to_wire

_LARGE = msgpack.packb([0, 1, "migration.load", [{"offset": 0, "data": bytes(1 << 20)}]])
_ENDS = {
    "an undecodable message": b"\xc1",
    "a message that is none": msgpack.packb({}),
    "an undecodable message behind a large one": _LARGE + b"\xc1",
    "half of a large message": _LARGE[: 1 << 19],
    "half of a message": msgpack.packb([0, 1, "agent.hello", [{"client": "x" * 1000}]])[:500],
    "nothing": b"",
}


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Only counted references free anything here."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("end", _ENDS)
async def test_buffers_go_with_the_connection(end: str) -> None:
    """However a connection ends, what it had read is freed at once."""
    codecs: list[weakref.ref[MsgpackCodec]] = []

    def codec(size: int) -> Codec:
        made = MsgpackCodec(size)
        codecs.append(weakref.ref(made))
        return made

    async with MemoryAgent() as agent, trio.open_nursery() as nursery:
        server = ServedAgent(agent, await agent.connect(), nursery, 16 << 20, codec)
        ours, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(server.serve, theirs)
        if _ENDS[end]:
            await ours.send_all(_ENDS[end])
        await ours.send_eof()
        with trio.fail_after(5):
            while await ours.receive_some():
                pass
        del theirs
        await trio.testing.wait_all_tasks_blocked()
        assert [None] == [ref() for ref in codecs]


class OverStream(MsgpackRpcAgent):
    """A client whose only connection is a stream in memory."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(parse_address("unix:///nowhere"))
        self._streams = [stream]
        self.codecs: list[weakref.ref[MsgpackCodec]] = []

    async def reach(self) -> Callable[[Handler], AgentConnection]:
        """The stream."""
        stream, codec = self._streams.pop(), MsgpackCodec()
        self.codecs.append(weakref.ref(codec))
        await trio.lowlevel.checkpoint()
        return lambda handler: RpcConnection(stream, codec, handler)


@pytest.mark.parametrize("greeted", [False, True])
@pytest.mark.parametrize("end", _ENDS)
async def test_buffers_of_a_client_go_with_its_connection(end: str, greeted: bool) -> None:
    """Also while nobody asks for the next connection."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with OverStream(ours) as client, trio.open_nursery() as nursery:
        del ours

        @nursery.start_soon
        async def behave() -> None:
            await theirs.receive_some()
            if greeted:
                info = to_wire(AgentInfo("v", "p", protocol=PROTOCOL))
                await theirs.send_all(msgpack.packb([1, 0, None, info]))
                await theirs.receive_some()
            if _ENDS[end]:
                await theirs.send_all(_ENDS[end])
            await theirs.aclose()

        with pytest.raises(AgentError):
            await client.functions()
        await trio.testing.wait_all_tasks_blocked()
        assert [None] == [ref() for ref in client.codecs]
