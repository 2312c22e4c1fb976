"""Agents for tests: the in-memory agent behind a server, on every transport, and the client that reaches it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio
import trustme

from vfiouser_agents.api import Agent, AgentInfo, AgentState, Capabilities, Status
from vfiouser_agents.registry import make_agent
from vfiouser_agents.rpc.core import Answer, NoRequests, RpcConnection
from vfiouser_agents.rpc.endpoint import Address, TlsOptions, open_listeners, parse_address
from vfiouser_agents.rpc.methods import HELLO, OPEN, PROTOCOL
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec
from vfiouser_agents.rpc.protocols import serve_at
from vfiouser_agents.rpc.wire import to_wire

#: Every way to reach an agent.
TRANSPORTS = ("unix", "tcp", "tls", "mtls")


@dataclass(frozen=True)
class Certificates:
    """Files with a CA, a server's and a client's certificate, and those of a CA that nobody trusts."""

    server: TlsOptions
    client: TlsOptions
    stranger: TlsOptions
    nobody: TlsOptions


def make_certificates(directory: Path) -> Certificates:
    """Make certificates on the fly.

    Args:
        directory: where the files go.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ours, other = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(str(directory / "ca.pem"))

    def issue(authority: trustme.CA, name: str) -> TlsOptions:
        path = str(directory / f"{name}.pem")
        authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
        return TlsOptions(ca=str(directory / "ca.pem"), cert=path)

    return Certificates(
        issue(ours, "server"),
        issue(ours, "client"),
        issue(other, "stranger"),
        TlsOptions(ca=str(directory / "ca.pem")),
    )


@dataclass
class Served:
    """A server that can be stopped and started again at the same address.

    Args:
        agent: what is served.
        transport: one of `TRANSPORTS`.
        directory: for sockets and certificates.
        nursery: where it runs.
        protocol: what it speaks; one of `rpc.protocols.PROTOCOLS`, and the kind of its adapter.
    """

    agent: Agent
    transport: str
    directory: Path
    nursery: trio.Nursery
    protocol: str = "msgpack-rpc"

    def __post_init__(self) -> None:
        scheme = "tls" if self.transport == "mtls" else self.transport
        place = str(self.directory / "agent.sock") if scheme == "unix" else "127.0.0.1:0"
        self.address = parse_address(f"{scheme}://{place}")
        self.certificates = make_certificates(self.directory / "tls") if scheme == "tls" else None
        self._scope, self._ended = trio.CancelScope(), trio.Event()

    async def start(self) -> None:
        """Serve."""
        tls = None
        if self.certificates is not None:
            tls = self.certificates.server
            if self.transport == "tls":
                tls = TlsOptions(cert=tls.cert)
        self._scope, self._ended = trio.CancelScope(), trio.Event()

        async def run(task_status: trio.TaskStatus[Address]) -> None:
            try:
                with self._scope:
                    await serve_at(self.protocol, self.agent, self.address, tls, task_status=task_status)
            finally:
                self._ended.set()

        self.address = await self.nursery.start(run)

    async def stop(self) -> None:
        """End every connection and all calls; the agent and its functions stay."""
        self._scope.cancel()
        await self._ended.wait()

    def options(self, **more: Any) -> dict[str, Any]:
        """Options of an adapter that reaches it."""
        options: dict[str, Any] = {"address": str(self.address), **more}
        if self.certificates is not None:
            tls = self.certificates.client if self.transport == "mtls" else self.certificates.nobody
            options["tls"] = {name: value for name, value in asdict(tls).items() if value is not None}
        return options

    def client(self, **more: Any) -> Agent:
        """An adapter that reaches it; not entered yet."""
        return make_agent(self.protocol, self.options(**more))


@asynccontextmanager
async def served(agent: Agent, transport: str, directory: Path, protocol: str = "msgpack-rpc") -> AsyncIterator[Served]:
    """An agent behind a server for the length of the block.

    Args:
        agent: the agent; entered and left here.
        transport: one of `TRANSPORTS`.
        directory: for sockets and certificates.
        protocol: what it speaks.
    """
    directory.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  a moment, in a test
    async with agent, trio.open_nursery() as nursery:
        server = Served(agent, transport, directory, nursery, protocol)
        await server.start()
        yield server
        nursery.cancel_scope.cancel()


class SilentAgent(NoRequests):
    """A peer made of the RPC core alone, which notes what it is asked and can go silent.

    Args:
        address: where it listens.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.methods: list[str] = []
        self.answers = True

    def request(self, method: str, params: dict[str, Any]) -> Answer:
        """Note it, and answer with what the client needs to go on."""
        self.methods.append(method)
        results = {
            HELLO: to_wire(AgentInfo("v", "p", protocol=PROTOCOL)),
            OPEN: {"session": 1, "capabilities": to_wire(Capabilities(formats=("x",)))},
            "migration.status": to_wire(Status(AgentState.RUNNING)),
        }

        async def answer() -> Any:
            if not self.answers:
                await trio.sleep_forever()
            return results.get(method)

        return answer

    async def serve(self, stream: trio.abc.Stream) -> None:
        """One connection."""
        await RpcConnection(stream, MsgpackCodec(), self).run()


@asynccontextmanager
async def silent_agent(directory: Path) -> AsyncIterator[SilentAgent]:
    """A `SilentAgent` on a UNIX socket for the length of the block.

    Args:
        directory: for the socket.
    """
    agent = SilentAgent(parse_address(f"unix://{directory}/silent.sock"))
    listeners = await open_listeners(agent.address)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, agent.serve, list(listeners))
        yield agent
        nursery.cancel_scope.cancel()
