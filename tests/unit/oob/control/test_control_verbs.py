"""Verbs with parameters: who may use them, what is refused, and that no peer takes the daemon from its functions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from daemonkit import function, serving
from migrationkit import until
from rawclient import attached
from vfiouser_oob.config.schema import DaemonConfig
from vfiouser_oob.control import server
from vfiouser_oob.control.protocol import ErrorCode, RequestError, parse_request
from vfiouser_oob.control.server import AccessPolicy, ControlServer
from vfiouser_oob.control.verbs import VERBS, ControlRole
from vfiouser_oob.observability.status import DaemonStatus, StatusReport
from vfiouser_oob.server.administration import Administration
from vfiouser_oob.transport.peer import Peer


class ChosenPolicy(AccessPolicy):
    """Gives everybody the same role, also root; another one for each test."""

    chosen = ControlRole.READER

    def role(self, peer: Peer, groups: frozenset[int]) -> ControlRole | None:
        """The same for all."""
        return type(self).chosen


class BusyDaemon:
    """A daemon whose status takes long to make."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    @property
    def administration(self) -> Administration:
        """Nobody changes it."""
        raise AssertionError("asked for a change")

    def status(self) -> StatusReport:
        """Take ten milliseconds of everybody's time."""
        began = time.perf_counter()
        while time.perf_counter() - began < 0.01:
            pass
        self.spent_s += time.perf_counter() - began
        process: DaemonStatus = {
            "version": "1",
            "python": "",
            "kernel": "",
            "pid": 1,
            "started": "",
            "functions": 0,
        }
        return {"daemon": process, "functions": []}

    def subscribe(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Nobody watches it."""
        raise AssertionError("watched")


class Speaker:
    """A client that says what it likes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def read(self) -> Any:
        """The next line; None at the end."""
        while b"\n" not in self._buffer:
            data = await self.stream.receive_some()
            if not data:
                return None
            self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer[:] = rest
        return json.loads(line)

    async def ask(self, method: str, **params: Any) -> Any:
        """Ask, and read the answer."""
        await self.stream.send_all(json.dumps({"id": 1, "method": method, "params": params}).encode() + b"\n")
        return await self.read()


@asynccontextmanager
async def speaking(path: Path) -> AsyncIterator[Speaker]:
    """A connection whose greeting was read."""
    async with await trio.open_unix_socket(path) as stream:
        speaker = Speaker(stream)
        await speaker.read()
        yield speaker


@asynccontextmanager
async def offering(path: Path, daemon: Any, policy: AccessPolicy) -> AsyncIterator[None]:
    """A control server for a daemon, with a policy of the test's."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    async with trio.open_nursery() as nursery:
        await nursery.start(ControlServer(daemon, policy).serve, sock)
        yield
        nursery.cancel_scope.cancel()


async def test_who_may_ask_may_not_change(tmp_path: Path) -> None:
    """It is told so, and its connection goes on; nothing is changed."""
    async with (
        serving(function(tmp_path)) as daemon,
        offering(tmp_path / "c", daemon, ChosenPolicy()),
        await trio.open_unix_socket(tmp_path / "c") as stream,
    ):
        reader = Speaker(stream)
        questions = [name for name, verb in VERBS.items() if verb.role is ControlRole.READER]
        assert questions == (await reader.read())["methods"]
        for name in VERBS.keys() - set(questions):
            error = (await reader.ask(name, name="f0"))["error"]
            assert ErrorCode.NOT_ALLOWED == error["code"]
            assert "admin_uids" in error["message"]
        assert "f0" == (await reader.ask("status"))["result"]["functions"][0]["name"]


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("remove", {}, "remove: key 'name' is missing"),
        ("remove", {"name": "f0", "forse": True}, "unknown key 'forse'; did you mean 'force'?"),
        ("remove", {"name": "f0", "force": "yes"}, "force must be true or false"),
        ("drain", {"name": "../f0"}, "name must be 1 to 63 letters"),
        ("drain", {"name": 7}, "name must be"),
        ("log-level", {"level": "loud"}, "level must be one of"),
        ("status", {"name": "f0"}, "unknown key 'name'"),
        ("add", {"toml": ""}, "toml must be"),
    ],
)
async def test_parameters_that_do_not_fit(tmp_path: Path, method: str, params: dict[str, Any], words: str) -> None:
    """The rule that they break is told, and the connection goes on."""
    async with serving(function(tmp_path), control_socket=tmp_path / "c"), speaking(tmp_path / "c") as admin:
        error = (await admin.ask(method, **params))["error"]
        assert ErrorCode.BAD_PARAMETERS == error["code"]
        assert words in error["message"]
        assert "result" in await admin.ask("status")


async def test_what_cannot_be_done_is_failed(tmp_path: Path) -> None:
    """With a reason; a daemon without a file has nothing to reload."""
    async with serving(function(tmp_path), control_socket=tmp_path / "c"), speaking(tmp_path / "c") as admin:
        for method, params, words in (
            ("remove", {"name": "f9"}, "there is no function 'f9'"),
            ("drain", {"name": "f9"}, "there is no function 'f9'"),
            ("log-level", {"level": "info", "function": "f9"}, "there is no function 'f9'"),
            ("disconnect", {"name": "f0"}, "f0 has no client"),
            ("reload", {}, "without a configuration file"),
            ("add", {"toml": "x", "source": "here"}, "here: not valid TOML"),
        ):
            error = (await admin.ask(method, **params))["error"]
            assert ErrorCode.FAILED == error["code"]
            assert words in error["message"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.sampled_from(["name", "force", "undo", "toml", "source", "level", "function", "x"])


@given(st.sampled_from(list(VERBS)), st.dictionaries(_NAMES, _JSON, max_size=4))
def test_any_parameters_are_checked(method: str, params: dict[str, Any]) -> None:
    """They are a section, or a refusal; never another error."""
    request = parse_request(json.dumps({"id": 1, "method": method, "params": params}).encode())
    try:
        asked = server._parameters(VERBS[method], request)
    except RequestError as error:
        code = error.code
    else:
        assert isinstance(asked, VERBS[method].parameters)
        return
    assert ErrorCode.BAD_PARAMETERS == code


async def test_readers_cannot_keep_administrators_out(tmp_path: Path) -> None:
    """They have so many connections, and no more; the rest is for who has to act."""
    policy = ChosenPolicy()
    async with (
        serving(function(tmp_path)) as daemon,
        offering(tmp_path / "c", daemon, policy),
        trio.open_nursery() as nursery,
    ):
        streams = []
        for _ in range(server.CONNECTIONS_MAX - server.RESERVED):
            streams.append(await trio.open_unix_socket(tmp_path / "c"))
            assert "hello" in await Speaker(streams[-1]).read()
        async with await trio.open_unix_socket(tmp_path / "c") as stream:
            assert ErrorCode.BUSY == (await Speaker(stream).read())["error"]["code"]
        try:
            ChosenPolicy.chosen = ControlRole.ADMIN
            async with speaking(tmp_path / "c") as admin:
                assert {"name": "f0", "drained": True} == (await admin.ask("drain", name="f0"))["result"]
        finally:
            ChosenPolicy.chosen = ControlRole.READER
        for stream in streams:
            await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_flood_of_questions_leaves_the_event_loop_to_others(tmp_path: Path) -> None:
    """However many ask, and however much an answer costs, most of the time is the functions'."""
    daemon = BusyDaemon()

    async def flood() -> None:
        async with speaking(tmp_path / "c") as speaker:
            await speaker.stream.send_all(b'{"id":1,"method":"status"}\n' * 200)
            while await speaker.read() is not None:
                pass

    async with offering(tmp_path / "c", daemon, ChosenPolicy()), trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(flood)
        await until(lambda: daemon.spent_s > 0)
        began, before = time.perf_counter(), daemon.spent_s
        await until(lambda: daemon.spent_s - before > 0.1)
        assert daemon.spent_s - before < 0.3 * (time.perf_counter() - began)
        nursery.cancel_scope.cancel()


async def test_who_leaves_does_not_wait_for_a_drain(tmp_path: Path) -> None:
    """Its connection is free at once, and the function stays closed, as it was asked."""
    async with (
        serving(function(tmp_path), control_socket=tmp_path / "c") as daemon,
        attached(tmp_path / "f0.sock") as client,
    ):
        waiting = []
        for _ in range(server.CONNECTIONS_MAX):
            async with speaking(tmp_path / "c") as admin:
                await admin.stream.send_all(b'{"id":1,"method":"drain","params":{"name":"f0"}}\n')
                await until(lambda: daemon.functions[0].draining)
                waiting.append(admin)
        with trio.fail_after(5):
            while True:
                async with await trio.open_unix_socket(tmp_path / "c") as stream:
                    if "hello" in await Speaker(stream).read():
                        break
        assert daemon.functions[0].draining
        assert 0x75666F76 == await client.read32(0, 0)


_ASK = """
import json, os, socket, sys
uid, gid, groups = json.loads(sys.argv[2])
os.setgroups(groups)
os.setresgid(gid, gid, gid)
os.setresuid(uid, uid, uid)
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    lines = sock.makefile("rb")
    hello = json.loads(lines.readline())
    if "hello" in hello:
        for method in ("status", "reload"):
            sock.sendall(json.dumps({"id": 1, "method": method}).encode() + b"\\n")
            print(json.loads(lines.readline()).get("error", {}).get("code", "done"), end=" ")
    else:
        print(hello["error"]["code"], end=" ")
"""


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that everybody may enter."""
    with tempfile.TemporaryDirectory(prefix="vt-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(
    ("uid", "gid", "groups", "answers"),
    [
        (0, 0, [], "done done"),
        (7001, 7001, [], "not-allowed"),
        (7001, 7002, [], "done not-allowed"),
        (7001, 7001, [7002], "done not-allowed"),
        (7003, 7001, [], "done done"),
    ],
)
async def test_who_one_is_decides(open_place: Path, uid: int, gid: int, groups: list[int], answers: str) -> None:
    """Root and `admin_uids` may change things, the group of the socket's file may ask, others nothing."""
    path = open_place / "c"
    config = DaemonConfig(
        functions=(function(open_place),), control_socket=path, control_group="7002", admin_uids=(7003,)
    )
    async with serving(config=config, reread=lambda: config):
        assert 7002 == path.stat().st_gid
        path.chmod(0o666)  # so that it is the daemon that refuses
        command = [sys.executable, "-I", "-c", _ASK, str(path), json.dumps([uid, gid, groups])]
        run = partial(subprocess.run, command, capture_output=True, text=True, check=False)
        done = await trio.to_thread.run_sync(run)
        assert (answers, "") == (done.stdout.strip(), done.stderr)
