"""The `grpc` adapter: the contract, deadlines and cancellation, statuses, mTLS, and what it shares with the others."""

from __future__ import annotations

import queue
import runpy
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio
import trustme
from hypothesis import given
from hypothesis import strategies as st

from agentbed import TRANSPORTS, make_certificates, served
from vendors.grpcbare import BareServer, Call
from vfiouser_agents.adapters.grpc_agent import key_and_chain
from vfiouser_agents.adapters.grpc_messages import MESSAGES, METHODS, SERVICE, pack, unpack
from vfiouser_agents.api import (
    AgentInfo,
    AgentState,
    Capabilities,
    Chunk,
    Descriptor,
    DirtyReport,
    Estimate,
    Event,
    EventKind,
    FunctionInfo,
    Outcome,
    Phase,
    Range,
    Role,
    Status,
)
from vfiouser_agents.errors import (
    ERRORS,
    AgentError,
    AuthError,
    Busy,
    ConnectError,
    CorruptState,
    DeadlineExceeded,
    Incompatible,
    InvalidArgument,
    InvalidState,
    NoResources,
    NotFound,
    ProtocolError,
    TransportLost,
    Unsupported,
)
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_agents.options import OptionError
from vfiouser_agents.registry import make_agent
from vfiouser_agents.rpc.endpoint import TlsOptions
from vfiouser_agents.rpc.wire import from_wire, to_wire
from vfiouser_agents.testing import CheckOutcome, check_agent

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_contract(transport: str, tmp_path: Path) -> None:
    """An agent served with gRPC keeps the whole contract, over every transport."""
    agent = MemoryAgent([MemoryFunction(state_size=300_000, churn=5000)])
    async with served(agent, transport, tmp_path, "grpc") as server:
        results = await check_agent(server.client)
    assert [] == [(result.name, result.detail) for result in results if result.outcome is CheckOutcome.FAILED]
    assert sum(result.outcome is CheckOutcome.PASSED for result in results) >= 45


async def test_reflection(tmp_path: Path) -> None:
    """A client that knows nothing can ask what is served; and no call is named as what its own stub has."""
    async with served(MemoryAgent(), "tcp", tmp_path, "grpc") as server:
        target = str(server.options()["address"]).removeprefix("tcp://")

        def ask() -> Any:
            from google.protobuf.descriptor_pb2 import FileDescriptorProto
            from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

            with grpc.insecure_channel(target) as channel:
                found = ProtoReflectionDescriptorDatabase(channel)
                services = list(found.get_services())
                file: FileDescriptorProto = found.FindFileContainingSymbol(SERVICE)
                return services, {method.name for method in file.service[0].method}

        services, methods = await trio.to_thread.run_sync(ask)
    assert SERVICE in services
    assert {row.path.rpartition("/")[2] for row in METHODS.values()} == methods
    assert not {"Close", "Dispose", "ToString"} & methods


async def test_migration_goes_on_after_the_agent_was_restarted(tmp_path: Path) -> None:
    """A lost connection ends its session; another one takes the migration over."""
    async with served(MemoryAgent(), "tcp", tmp_path, "grpc") as server, server.client() as agent:
        session = await agent.open("f0")
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        first = await session.save(0, 1000, Phase.FINAL)
        await server.stop()
        with pytest.raises((TransportLost, ConnectError)):
            await session.save(0, 1000, Phase.FINAL)
        await server.start()
        session = await agent.open("f0")
        await session.begin(Role.SOURCE, "m")
        assert first == await session.save(0, 1000, Phase.FINAL)


async def test_many_calls_in_few_threads(tmp_path: Path) -> None:
    """More calls than threads are all answered."""
    agent = MemoryAgent([MemoryFunction(f"f{index}") for index in range(8)])
    async with served(agent, "unix", tmp_path, "grpc") as server, server.client(threads=2) as client:
        sessions = [await client.open(f"f{index}") for index in range(8)]
        async with trio.open_nursery() as nursery:
            for session in sessions * 8:
                nursery.start_soon(session.status)


async def test_mtls_refuses_strangers(tmp_path: Path) -> None:
    """Without a certificate that the server trusts there is no connection, nor to a server that we do not trust."""
    async with served(MemoryAgent(), "mtls", tmp_path, "grpc") as server:
        assert server.certificates is not None
        for tls in (server.certificates.nobody, server.certificates.stranger):
            options = {key: value for key, value in asdict(tls).items() if value is not None}
            async with make_agent("grpc", {**server.options(), "tls": options}) as agent:
                with pytest.raises((AuthError, ConnectError)):
                    await agent.connect()
        other = make_certificates(tmp_path / "other")
        async with make_agent("grpc", {**server.options(), "tls": {"ca": other.server.ca}}) as agent:
            with pytest.raises(AuthError, match="TLS failed: the peer's certificate is not accepted"):
                await agent.connect()


async def test_a_server_whose_certificate_has_expired(tmp_path: Path) -> None:
    """It is called expired, in as many words as by the other adapters."""
    authority = trustme.CA()
    past = datetime.now(UTC) - timedelta(days=1)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("localhost", not_after=past).private_key_and_cert_chain_pem.write_to_path(
        str(tmp_path / "server.pem")
    )
    key, chain = key_and_chain(TlsOptions(cert=str(tmp_path / "server.pem")))
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, chain)]))
    server.start()
    try:
        options = {"address": f"tls://localhost:{port}", "tls": {"ca": str(tmp_path / "ca.pem")}}
        async with make_agent("grpc", options) as agent:
            with pytest.raises(AuthError, match="TLS failed: the peer's certificate has expired"):
                await agent.connect()
    finally:
        server.stop(None).wait()


async def test_server_name(tmp_path: Path) -> None:
    """The certificate must be for the name that was asked for."""
    async with served(MemoryAgent(), "tls", tmp_path, "grpc") as server:
        options = server.options()
        tls = options["tls"]
        async with make_agent("grpc", {**options, "tls": {**tls, "server_name": "localhost"}}) as agent:
            await agent.connect()
        async with make_agent("grpc", {**options, "tls": {**tls, "server_name": "elsewhere"}}) as agent:
            with pytest.raises((AuthError, ConnectError)):
                await agent.connect()


@contextmanager
def bare(calls: dict[str, Call]) -> Iterator[BareServer]:
    """A bare server for the length of the block."""
    server = BareServer(calls)
    try:
        yield server
    finally:
        server.stop()


async def test_deadlines_and_cancellation_arrive() -> None:
    """The caller's deadline is the call's, and a caller that is cancelled ends the call at the agent."""
    remaining: queue.Queue[float | None] = queue.Queue()
    cancelled = threading.Event()

    def stop(request: Any, context: grpc.ServicerContext) -> None:
        remaining.put(context.time_remaining())
        context.add_callback(cancelled.set)
        cancelled.wait()

    with bare({"Stop": stop}) as server:
        async with make_agent("grpc", {"address": server.start()}) as agent:
            session = await agent.open("f0")
            with trio.move_on_after(30) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(session.stop)
                    left = await trio.to_thread.run_sync(remaining.get)
                    scope.cancel()
            assert left is not None
            assert 20 < left <= 35
            assert await trio.to_thread.run_sync(cancelled.wait, 10)
            assert "v" == (await agent.connect()).vendor


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, AuthError),
        (grpc.StatusCode.PERMISSION_DENIED, AuthError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.ABORTED, Busy),
        (grpc.StatusCode.UNIMPLEMENTED, Unsupported),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgument),
        (grpc.StatusCode.FAILED_PRECONDITION, InvalidState),
        (grpc.StatusCode.DATA_LOSS, CorruptState),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, NoResources),
        (grpc.StatusCode.UNAVAILABLE, TransportLost),
        (grpc.StatusCode.INTERNAL, AgentError),
        (grpc.StatusCode.UNKNOWN, AgentError),
    ],
)
async def test_statuses_of_others(code: grpc.StatusCode, kind: type[AgentError]) -> None:
    """A status of an agent that knows nothing of our errors is the error that says what to do about it."""

    def stop(request: Any, context: grpc.ServicerContext) -> None:
        context.abort(code, "because")

    with bare({"Stop": stop}) as server:
        async with make_agent("grpc", {"address": server.start()}) as agent:
            session = await agent.open("f0")
            with pytest.raises(kind, match="because") as caught:
                await session.stop()
            assert kind is type(caught.value)


async def test_an_agent_that_is_something_else() -> None:
    """A greeting that is none, a protocol that is another, and a port where nobody listens are told apart."""

    def other(request: Any, context: grpc.ServicerContext) -> Any:
        info = MESSAGES["AgentInfo"](vendor="v", product="p", protocol="other", protocol_version=1)
        return MESSAGES["ConnectResponse"](greeting=MESSAGES["Greeting"](connection=b"c", info=info))

    def nothing(request: Any, context: grpc.ServicerContext) -> Any:
        return MESSAGES["ConnectResponse"]()

    for call, says in [(other, "'other'"), (nothing, "not a greeting")]:
        with bare({"Connect": call}) as server:
            async with make_agent("grpc", {"address": server.start()}) as agent:
                with pytest.raises(ProtocolError, match=says):
                    await agent.connect()
    async with make_agent("grpc", {"address": "tcp://127.0.0.1:1"}) as agent:
        with pytest.raises(ConnectError):
            await agent.connect()


def status_of(state: int, request: Any, context: grpc.ServicerContext) -> Any:
    """An answer to Status, whose state the test chooses."""
    return MESSAGES["StatusResponse"](state=state)


async def test_answers_that_make_no_sense() -> None:
    """A state that nobody knows, or more bytes than were asked for, are ProtocolErrors."""
    calls: dict[str, Call] = {
        "Begin": lambda request, context: None,
        "Save": lambda request, context: MESSAGES["Chunk"](data=bytes(request.limit + 1)),
    }
    with bare(calls) as server:
        async with make_agent("grpc", {"address": server.start()}) as agent:
            session = await agent.open("f0")
            with pytest.raises(ProtocolError, match="101 bytes"):
                await session.save(0, 100, Phase.FINAL)
            for state, says in [(99, "number 99"), (0, "None")]:
                calls["Status"] = partial(status_of, state)
                with pytest.raises(ProtocolError, match=says):
                    await session.status()


def test_the_compiled_proto_is_that_of_the_proto() -> None:
    """`make proto` would change nothing, whichever version of protoc it has."""
    tool = runpy.run_path(str(ROOT / "tools" / "protoc.py"))
    assert tool["TARGET"].read_text() == tool["generate"]()


SAMPLES: list[tuple[str, Any]] = [
    ("AgentInfo", AgentInfo("v", "p", "1", "proto", 2, 3, 4, "i")),
    ("FunctionInfo", FunctionInfo("f", "nvme", "0000:3b:00.2", 0, 5, {"a": "b"})),
    ("FunctionInfo", FunctionInfo("f")),
    ("Capabilities", Capabilities(True, True, True, True, False, False, True, False, False, ("a",), 5, 6, (7, 8), 9)),
    ("Capabilities", Capabilities()),
    ("Descriptor", Descriptor("f", 3, "v", "m", "k", "1", 99, {"q": "8"})),
    ("StatusResponse", Status(AgentState.LOADED, Role.SOURCE, "m", True, "stop", "d")),
    ("StatusResponse", Status(AgentState.RUNNING)),
    ("EstimateResponse", Estimate(1 << 63, 2, 3, True)),
    ("Chunk", Chunk(b"\x00\xff", eof=True)),
    ("DirtyReportResponse", DirtyReport(b"\x01", (), True, True)),
    ("DirtyReportResponse", DirtyReport(None, (Range(0, 4096), Range(1 << 60, 8192)))),
    ("Event", Event(EventKind.DEVICE_ERROR, "d", Status(AgentState.ERROR), 3)),
]


@pytest.mark.parametrize(("name", "value"), SAMPLES, ids=[f"{index}-{row[0]}" for index, row in enumerate(SAMPLES)])
def test_values_come_through(name: str, value: Any) -> None:
    """Each value of the interface is the same after it was a message; what is missing has the interface's default."""
    message = MESSAGES[name].FromString(pack(name, to_wire(value)).SerializeToString())
    assert value == from_wire(type(value), unpack(name, message))
    if name in ("Capabilities", "AgentInfo"):
        assert set(to_wire(value)) == {field.name for field in MESSAGES[name].DESCRIPTOR.fields}


@pytest.mark.parametrize("enum", [Role, Phase, Outcome, AgentState, EventKind])
def test_every_word_has_a_number(enum: Any) -> None:
    """The enums of the .proto have exactly our words."""
    fields = {Role: "BeginRequest", Phase: "SaveRequest", Outcome: "EndRequest", AgentState: "StatusResponse"}
    name = fields.get(enum, "Event")
    field = {Role: "role", Phase: "phase", Outcome: "outcome", AgentState: "state"}.get(enum, "kind")
    for member in enum:
        assert member.value == unpack(name, pack(name, {field: member.value}))[field]
    described = MESSAGES[name].DESCRIPTOR.fields_by_name[field].enum_type
    assert len(enum) == len(described.values) - 1


@given(st.integers(0, 2**64 - 1), st.binary(max_size=100))
def test_any_piece_comes_through(offset: int, data: bytes) -> None:
    """Any offset and any bytes survive."""
    message = pack("LoadRequest", {"connection": b"c", "session": 1, "offset": offset, "data": data})
    again = MESSAGES["LoadRequest"].FromString(message.SerializeToString())
    assert {"connection": b"c", "session": 1, "offset": offset, "data": data} == unpack("LoadRequest", again)


@pytest.mark.parametrize("kind", ERRORS.values())
async def test_our_errors_come_back(kind: type[AgentError], tmp_path: Path) -> None:
    """Each of our errors arrives as itself, with everything that belongs to it."""
    error: AgentError = kind("why", vendor_code="0x7")
    if kind is Incompatible:
        error = Incompatible(["a", "ü"], vendor_code="0x7")
    if kind is NoResources:
        error = NoResources("why", {"max_state": 5}, vendor_code="0x7")

    class Failing(MemoryAgent):
        async def functions(self) -> list[FunctionInfo]:
            raise error

    async with served(Failing(), "unix", tmp_path, "grpc") as server, server.client() as agent:
        with pytest.raises(kind) as caught:
            await agent.functions()
    assert kind is type(caught.value)
    assert (str(error), error.__dict__) == (str(caught.value), caught.value.__dict__)


def test_every_call_of_the_reference_protocol_is_there() -> None:
    """The service has exactly the calls of the reference protocol."""
    paths = {row.path.rpartition("/")[2] for row in METHODS.values()}
    service = MESSAGES["Done"].DESCRIPTOR.file.services_by_name["MigrationAgent"]
    assert paths == {method.name for method in service.methods}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "'address' is missing"),
        ({"address": "tcp://192.0.2.1"}, "192.0.2.1:50051"),
        ({"address": "tls://h", "tls": {"ca": "/no/such"}}, "No such file"),
        ({"address": "tcp://[::1]", "threads": 0}, "threads"),
    ],
)
def test_options(options: dict[str, Any], says: str) -> None:
    """Options that cannot be used say why."""
    with pytest.raises(OptionError, match=says):
        make_agent("grpc", options)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without grpcio the kind is known, and the error says what to install."""
    monkeypatch.setitem(sys.modules, "grpc", None)
    for name in [name for name in sys.modules if name.startswith("vfiouser_agents.adapters.grpc")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(OptionError, match=r"grpcio is not installed; install with: .*vfiouser-oob\[grpc\]"):
        make_agent("grpc", {"address": "unix:///run/a"})
