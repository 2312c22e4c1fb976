"""The `jsonrpc` adapter: the reference protocol in JSON, and a vendor's own methods by a map."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from xxhash import xxh3_128, xxh3_128_digest

from agentbed import TRANSPORTS, served
from vendors.snap3 import Snap3
from vendors.spdk import RpcFault, SpdkServer
from vfiouser_agents.api import AgentState, Outcome, Phase, Role, Session
from vfiouser_agents.errors import (
    AgentError,
    Busy,
    ConnectError,
    CorruptState,
    DeadlineExceeded,
    DeviceFailed,
    InvalidArgument,
    InvalidState,
    NoResources,
    NotFound,
    ProtocolError,
    TransportLost,
    Unsupported,
)
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_agents.registry import make_agent
from vfiouser_agents.testing import CheckOutcome, CheckResult, check_agent

FUNCTION = "VblkEmu0pf0"


def assert_kept(results: list[CheckResult], passed_at_least: int) -> None:
    """No check failed, and enough of them applied for that to mean something."""
    assert [] == [(result.name, result.detail) for result in results if result.outcome is CheckOutcome.FAILED]
    assert passed_at_least <= sum(result.outcome is CheckOutcome.PASSED for result in results)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_contract_of_the_reference_protocol(transport: str, tmp_path: Path) -> None:
    """An agent served in JSON keeps the whole contract, over every transport."""
    agent = MemoryAgent([MemoryFunction(state_size=300_000, churn=5000)])
    async with served(agent, transport, tmp_path, "jsonrpc") as server:
        assert_kept(await check_agent(server.client), 45)


async def test_chunks_stay_below_the_limit_of_requests(tmp_path: Path) -> None:
    """A chunk is at most 128 KiB, so that base64 of it fits into the 256 KiB that SPDK takes."""
    async with served(MemoryAgent(), "unix", tmp_path, "jsonrpc") as server, server.client() as agent:
        session = await agent.open("f0")
        assert 128 << 10 == session.caps.max_chunk
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        assert 128 << 10 == len((await session.save(0, 1 << 20, Phase.FINAL)).data)


@asynccontextmanager
async def vendor(server: SpdkServer, directory: Path, name: str = "spdk") -> AsyncIterator[str]:
    """A vendor's server for the length of the block; gives its address."""
    path = str(directory / f"{name}.sock")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path)
        yield f"unix://{path}"
        nursery.cancel_scope.cancel()


def snap_options(address: str, directory: Path) -> dict[str, Any]:
    """The preset with what a user has to add."""
    return {
        "address": address,
        "preset": "snap3-virtio-blk",
        "info_method": "spdk_get_version",
        "state": {
            "path": f"{directory}/$function.state",
            "fetch": ["cat", "$path"],
            "store": ["dd", "status=none", "of=$path"],
            "remove": ["rm", "-f", "$path"],
        },
    }


def states(directory: Path) -> list[Path]:
    """The files that carry a state and were left behind."""
    return list(directory.glob("*.state"))


async def test_contract_of_snap3(tmp_path: Path) -> None:
    """The preset for SNAP 3 keeps the contract as far as its capabilities go."""
    async with vendor(SpdkServer(Snap3(FUNCTION).methods()), tmp_path) as address:
        options = snap_options(address, tmp_path)
        assert_kept(await check_agent(partial(make_agent, "jsonrpc", options), function_id=FUNCTION), 30)
    assert [] == states(tmp_path)


async def move(source: Session, target: Session) -> None:
    """Move a stopped function's state."""
    await source.begin(Role.SOURCE, "m")
    await target.begin(Role.DESTINATION, "m")
    await target.check(await source.describe())
    await source.stop()
    await target.stop()
    await target.load_begin(None)
    digest, offset, eof = xxh3_128(), 0, False
    while not eof:
        chunk = await source.save(offset, 1000, Phase.FINAL)
        await target.load(offset, chunk.data)
        digest.update(chunk.data)
        offset, eof = offset + len(chunk.data), chunk.eof
    await target.load_commit(offset, digest.digest())
    await target.resume()
    await source.end(Outcome.SUCCESS)
    await target.end(Outcome.SUCCESS)


async def test_snap3_migration(tmp_path: Path) -> None:
    """What the source's controller holds runs on the destination's afterwards, and only there."""
    here, there = Snap3(FUNCTION), Snap3(FUNCTION)
    here.controllers[FUNCTION].content = "the guest's queues " * 500
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with (
        vendor(SpdkServer(here.methods()), tmp_path, "here") as first,
        vendor(SpdkServer(there.methods()), tmp_path, "there") as second,
        make_agent("jsonrpc", snap_options(first, tmp_path / "a")) as source,
        make_agent("jsonrpc", snap_options(second, tmp_path / "b")) as target,
    ):
        assert "SPDK v21.01" == (await source.connect()).firmware
        await move(await source.open(FUNCTION), await target.open(FUNCTION))
    assert [here.controllers[FUNCTION].content] == there.controllers[FUNCTION].resumed
    assert here.controllers[FUNCTION].suspended
    assert [] == here.controllers[FUNCTION].resumed


@pytest.mark.parametrize("suspended", [False, True])
async def test_a_vendor_without_status_is_not_believed_to_run(suspended: bool, tmp_path: Path) -> None:
    """A new daemon takes its function for stopped, since its copy may run elsewhere, until it was told to run."""
    snap = Snap3(FUNCTION)
    snap.controllers[FUNCTION].suspended = suspended
    async with (
        vendor(SpdkServer(snap.methods()), tmp_path) as address,
        make_agent("jsonrpc", snap_options(address, tmp_path)) as agent,
    ):
        session = await agent.open(FUNCTION)
        assert AgentState.STOPPED is (await session.status()).state
        assert suspended is snap.controllers[FUNCTION].suspended
        await session.was_reset()
        await session.resume()
        assert AgentState.RUNNING is (await session.status()).state
        assert not snap.controllers[FUNCTION].suspended


async def test_what_snap3_lacks_is_refused(tmp_path: Path) -> None:
    """There is no quiesce of its own, no pre-copy, no dirty log and no reset, and nothing is made up for them."""
    async with (
        vendor(SpdkServer(Snap3(FUNCTION).methods()), tmp_path) as address,
        make_agent("jsonrpc", snap_options(address, tmp_path)) as agent,
    ):
        session = await agent.open(FUNCTION)
        caps = session.caps
        claims = (caps.p2p, caps.precopy, caps.dirty, caps.reset, caps.status_query, caps.takeover, caps.verifies)
        assert (False,) * 7 == claims
        with pytest.raises(Unsupported):
            await session.reset()
        with pytest.raises(Unsupported):
            await session.dirty_start([], 4096)
        with pytest.raises(NotFound):
            await agent.open("VblkEmu0pf7")


async def test_snap3_refuses_the_file(tmp_path: Path) -> None:
    """A file that the vendor refuses is a corrupt state, with the vendor's own number."""
    async with (
        vendor(SpdkServer(Snap3(FUNCTION).methods()), tmp_path) as address,
        make_agent("jsonrpc", snap_options(address, tmp_path)) as agent,
    ):
        session = await agent.open(FUNCTION)
        await session.begin(Role.DESTINATION, "m")
        await session.stop()
        await session.load_begin(None)
        await session.load(0, b"no JSON")
        with pytest.raises(CorruptState, match="EINVAL"):
            await session.load_commit(7, xxh3_128_digest(b"no JSON"))
        for _ in range(2):
            with pytest.raises(InvalidState, match="load another one"):
                await session.resume()
            await session.end(Outcome.FAILED)
    assert [] == states(tmp_path)


@pytest.mark.parametrize(
    ("key", "command", "pattern"),
    [
        ("fetch", ["false", "$path"], "ended with 1"),
        ("fetch", ["/no/such/command", "$path"], "No such file"),
        ("fetch", ["head", "-c", "6M", "/dev/zero", "$path"], "more than 4194304 bytes"),
    ],
)
async def test_commands_that_fail(key: str, command: list[str], pattern: str, tmp_path: Path) -> None:
    """A command that fails, is missing or gives too much is an error that says so; the function stays as it was."""
    options = snap_options("", tmp_path)
    options["state"][key] = command
    async with (
        vendor(SpdkServer(Snap3(FUNCTION).methods()), tmp_path) as address,
        make_agent("jsonrpc", {**options, "address": address}) as agent,
    ):
        session = await agent.open(FUNCTION)
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        with pytest.raises(AgentError, match=pattern):
            await session.save(0, 4096, Phase.FINAL)
        assert AgentState.STOPPED is (await session.status()).state
        await session.resume()


class Ours:
    """A vendor who has our operations under other names, in pieces, with a status and a dirty log."""

    def __init__(self) -> None:
        self.state = "ACTIVE"
        self.content = b"state of a function " * 1000
        self.incoming = bytearray()
        self.failure: RpcFault | None = None
        self.logging = False

    def methods(self) -> dict[str, Any]:
        """The table for an `SpdkServer`."""
        moves = {"dev_hold": "HELD", "dev_halt": "HALTED", "dev_go": "ACTIVE", "dev_flr": "ACTIVE"}
        return {
            "dev_info": self._info,
            "dev_size": self._size,
            "dev_read": self._read,
            "dev_open_write": self._open_write,
            "dev_write": self._write,
            "dev_done": self._done,
            "log_on": self._log_on,
            "log_get": self._log_get,
            "log_off": self._log_off,
            **{name: partial(self._move, state) for name, state in moves.items()},
        }

    async def _move(self, state: str, params: dict[str, Any]) -> Any:
        if self.failure is not None:
            raise self.failure
        assert 3 == params["dev"]["index"], "the constant is not there"
        self.state = state

    async def _info(self, params: dict[str, Any]) -> Any:
        if params["name"] != "fn":
            raise RpcFault(-19, "No such device")
        return {"device": {"mode": self.state}}

    async def _size(self, params: dict[str, Any]) -> Any:
        return len(self.content)

    async def _read(self, params: dict[str, Any]) -> Any:
        piece = self.content[params["pos"] : params["pos"] + params["len"]]
        end = params["pos"] + len(piece) == len(self.content)
        return {"blob": base64.b64encode(piece).decode(), "last": end}

    async def _open_write(self, params: dict[str, Any]) -> Any:
        self.incoming = bytearray()

    async def _write(self, params: dict[str, Any]) -> Any:
        assert params["pos"] == len(self.incoming)
        self.incoming += base64.b64decode(params["blob"])

    async def _done(self, params: dict[str, Any]) -> Any:
        if not self.incoming.startswith(b"state of a function") or params["len"] != len(self.content):
            raise RpcFault(-22, "this is no state")
        self.content = bytes(self.incoming)

    async def _log_on(self, params: dict[str, Any]) -> Any:
        self.logging = True

    async def _log_get(self, params: dict[str, Any]) -> Any:
        return base64.b64encode(bytes(params["bytes"] // 4096 // 8)).decode()

    async def _log_off(self, params: dict[str, Any]) -> Any:
        self.logging = False


def ours_options(address: str) -> dict[str, Any]:
    """A map for `Ours`, which uses everything that a map can say."""
    device = {"dev": {"name": "$function", "index": 3}}
    piece = {"pos": "$offset", "blob": "$data"}
    return {
        "address": address,
        "methods": {
            "status": {
                "method": "dev_info",
                "params": {"name": "$function"},
                "result": {"state": "device.mode"},
                "states": {"ACTIVE": "running", "HELD": "quiesced", "HALTED": "stopped"},
            },
            "quiesce": {"method": "dev_hold", "params": device},
            "stop": {"method": "dev_halt", "params": device},
            "resume": {"method": "dev_go", "params": device},
            "reset": {"method": "dev_flr", "params": device},
            "estimate": {"method": "dev_size", "result": {"bytes": ""}},
            "save": {
                "method": "dev_read",
                "params": {"pos": "$offset", "len": "$limit"},
                "result": {"data": "blob", "eof": "last"},
            },
            "load_begin": "dev_open_write",
            "load": {"method": "dev_write", "params": piece},
            "load_commit": {"method": "dev_done", "params": {"len": "$total"}},
            "dirty_start": {"method": "log_on", "params": {"ranges": "$ranges", "page": "$page_size"}},
            "dirty_report": {
                "method": "log_get",
                "params": {"at": "$iova", "bytes": "$length"},
                "result": {"bitmap": ""},
            },
            "dirty_stop": "log_off",
        },
        "functions": ["fn"],
        "caps": {"verifies": True, "max_ranges": 8, "max_state": "1M"},
        "descriptor": {"vendor": "V", "model": "M", "kind": "test", "format_id": "v-1"},
    }


async def test_contract_of_a_full_map(tmp_path: Path) -> None:
    """A vendor with all of our operations under other names keeps the contract, but for takeovers and pre-copy."""
    async with vendor(SpdkServer(Ours().methods()), tmp_path) as address:
        results = await check_agent(partial(make_agent, "jsonrpc", ours_options(address)))
    assert_kept(results, 42)


@pytest.mark.parametrize("size", [1, 7, 64])
async def test_replies_in_pieces(size: int, tmp_path: Path) -> None:
    """A reply may be split anywhere."""
    server = SpdkServer(Ours().methods())
    server.cut = lambda data: [data[begin : begin + size] for begin in range(0, len(data), size)]
    async with vendor(server, tmp_path) as address, make_agent("jsonrpc", ours_options(address)) as agent:
        session = await agent.open("fn")
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        assert b"state of a function " * 5 == (await session.save(0, 100, Phase.FINAL)).data


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (-16, Busy),
        (-11, Busy),
        (-22, InvalidArgument),
        (-32602, InvalidArgument),
        (-32601, Unsupported),
        (-1, InvalidState),
        (-19, NotFound),
        (-110, DeadlineExceeded),
        (-28, NoResources),
        (-32603, AgentError),
        (-5, AgentError),
        (77, AgentError),
    ],
)
async def test_errors_by_number(code: int, kind: type[AgentError], tmp_path: Path) -> None:
    """Each number of the vendor's becomes the error that says what to do about it, and keeps the number."""
    device = Ours()
    device.failure = RpcFault(code, "because")
    async with (
        vendor(SpdkServer(device.methods()), tmp_path) as address,
        make_agent("jsonrpc", ours_options(address)) as agent,
    ):
        session = await agent.open("fn")
        with pytest.raises(kind, match="because") as caught:
            await session.stop()
        assert kind is type(caught.value)
        assert str(code) in str(caught.value)
        assert AgentState.RUNNING is (await session.status()).state


async def test_methods_that_the_vendor_does_not_have(tmp_path: Path) -> None:
    """A map that names a method which is not there is found out by the first call of it, as Unsupported."""
    options = ours_options("")
    options["methods"]["stop"] = {"method": "dev_pause"}
    async with (
        vendor(SpdkServer(Ours().methods()), tmp_path) as address,
        make_agent("jsonrpc", {**options, "address": address}) as agent,
    ):
        session = await agent.open("fn")
        with pytest.raises(Unsupported, match="Method not found"):
            await session.stop()


async def test_results_that_do_not_fit_the_map(tmp_path: Path) -> None:
    """A result without the key that the map names, or with a word that it does not know, says which."""

    async def nothing(params: dict[str, Any]) -> Any:
        return {}

    async def text(params: dict[str, Any]) -> Any:
        return {"blob": "!", "last": True}

    device = Ours()
    server = SpdkServer(device.methods())
    async with vendor(server, tmp_path) as address, make_agent("jsonrpc", ours_options(address)) as agent:
        session = await agent.open("fn")
        device.state = "HALF"
        with pytest.raises(ProtocolError, match=r"'HALF'.*ACTIVE, HELD, HALTED"):
            await session.status()
        device.state = "HALTED"
        await session.begin(Role.SOURCE, "m")
        server.methods["dev_read"] = nothing
        with pytest.raises(ProtocolError, match="dev_read has no 'blob'"):
            await session.save(0, 10, Phase.FINAL)
        server.methods["dev_read"] = text
        with pytest.raises(ProtocolError, match="not base64"):
            await session.save(0, 10, Phase.FINAL)


async def test_a_call_that_nobody_waits_for_ends_all_the_same(tmp_path: Path) -> None:
    """A cancelled stop goes on, since nothing could tell how far it came; what follows waits for it."""
    device, begun, go_on = Ours(), trio.Event(), trio.Event()
    methods = device.methods()
    halt = methods["dev_halt"]

    async def slow(params: dict[str, Any]) -> Any:
        begun.set()
        await go_on.wait()
        return await halt(params)

    methods["dev_halt"] = slow
    async with (
        vendor(SpdkServer(methods), tmp_path) as address,
        make_agent("jsonrpc", ours_options(address)) as agent,
        trio.open_nursery() as nursery,
    ):
        session = await agent.open("fn")
        with trio.CancelScope() as scope:
            nursery.start_soon(session.stop)
            await begun.wait()
            scope.cancel()
        status = await session.status()
        assert (AgentState.RUNNING, "stop") == (status.state, status.pending)
        go_on.set()
        await session.stop()
        assert AgentState.STOPPED is (await session.status()).state


async def test_vendor_is_silent(tmp_path: Path) -> None:
    """A method that never answers ends with DeadlineExceeded after `call_timeout_s`, and the status says so."""
    methods = Snap3(FUNCTION).methods()

    async def silent(params: dict[str, Any]) -> Any:
        await trio.sleep_forever()

    methods["controller_virtio_blk_suspend"] = silent
    async with vendor(SpdkServer(methods), tmp_path) as address:
        options = {**snap_options(address, tmp_path), "call_timeout_s": 0.05}
        async with make_agent("jsonrpc", options) as agent:
            session = await agent.open(FUNCTION)
            with pytest.raises(DeadlineExceeded, match="controller_virtio_blk_suspend"):
                await session.stop()
            assert "another state" in (await session.status()).detail


async def test_vendor_goes_away(tmp_path: Path) -> None:
    """A lost connection is TransportLost once, and the next call makes a new one."""
    server = SpdkServer(Ours().methods())
    async with vendor(server, tmp_path) as address, make_agent("jsonrpc", ours_options(address)) as agent:
        session = await agent.open("fn")
        await session.stop()

        async def drop(params: dict[str, Any]) -> Any:
            await server.streams[-1].aclose()

        there, server.methods["dev_go"] = server.methods["dev_go"], drop
        with pytest.raises(TransportLost):
            await session.resume()
        server.methods["dev_go"] = there
        assert AgentState.STOPPED is (await session.status()).state
        await session.resume()
        assert 2 == server.connections


async def test_nobody_is_there(tmp_path: Path) -> None:
    """An address where nobody listens is a ConnectError."""
    async with make_agent("jsonrpc", ours_options(f"unix://{tmp_path}/none.sock")) as agent:
        with pytest.raises(ConnectError):
            await agent.connect()


async def test_a_failed_device_needs_a_reset(tmp_path: Path) -> None:
    """A status that the map calls `error` is DeviceFailed until it is reset."""
    device, options = Ours(), ours_options("")
    options["methods"]["status"]["states"]["BROKEN"] = "error"
    async with (
        vendor(SpdkServer(device.methods()), tmp_path) as address,
        make_agent("jsonrpc", {**options, "address": address}) as agent,
    ):
        session = await agent.open("fn")
        device.state = "BROKEN"
        with pytest.raises(DeviceFailed):
            await session.stop()
        await session.reset()
        assert AgentState.RUNNING is (await session.status()).state
