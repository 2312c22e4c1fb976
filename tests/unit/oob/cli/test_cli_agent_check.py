"""`agent-check` from the outside: table and JSON, exit codes, what is said when there is nothing to check."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from agentbed import served
from vfiouser_agents.api import Descriptor
from vfiouser_agents.memory import MemoryAgent, MemoryFunction, MemorySession
from vfiouser_agents.testing import CHECKS
from vfiouser_oob.cli import main as cli


class CarelessAgent(MemoryAgent):
    """An agent that takes the state of anything."""

    async def open(self, function_id: str) -> MemorySession:
        """A session whose check is missing."""
        session = await super().open(function_id)
        session.__class__ = CarelessSession
        return session


class CarelessSession(MemorySession):
    """A session that takes the state of anything."""

    async def check(self, descriptor: Descriptor) -> None:
        """Take it."""
        await trio.lowlevel.checkpoint()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    try:
        code = cli.main(["agent-check", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(params=[MemoryAgent, CarelessAgent], ids=["sound", "careless"])
def agent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, bool]]:
    """A live agent in a thread: its short form, and whether it is sound."""
    started = threading.Event()
    ended: list[trio.CancelScope] = []
    token: list[trio.lowlevel.TrioToken] = []

    async def serve() -> None:
        token.append(trio.lowlevel.current_trio_token())
        with trio.CancelScope() as scope:
            ended.append(scope)
            async with served(request.param([MemoryFunction("nvme0")]), "unix", tmp_path):
                started.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert started.wait(30)
    yield f"msgpack-rpc:unix://{tmp_path}/agent.sock", request.param is MemoryAgent
    token[0].run_sync_soon(ended[0].cancel)
    thread.join(30)


def test_live_agent(agent: tuple[str, bool], capsys: pytest.CaptureFixture[str]) -> None:
    """The table has a row per check, the fault is named in it, and the exit code tells."""
    text, sound = agent
    code, out, err = run(capsys, "--agent", f"{text},function=nvme0")
    assert (0 if sound else 1, "") == (code, err)
    rows = [line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")]
    assert [check.name for check in CHECKS] == rows[1:-1]
    assert ("check was accepted, expected Incompatible" in out) is not sound
    assert f"{len(CHECKS) - (not sound)} passed, {int(not sound)} failed, 0 n/a" in out


def test_json(agent: tuple[str, bool], capsys: pytest.CaptureFixture[str]) -> None:
    """With --json there is one document, with the checks that were chosen."""
    text, sound = agent
    code, out, _ = run(capsys, "--agent", text, "--function", "nvme0", "--json", "-k", "check-")
    document = json.loads(out)
    assert {"check-itself": "passed", "check-foreign": "passed" if sound else "failed"} == {
        check["name"]: check["outcome"] for check in document["checks"]
    }
    assert (0 if sound else 1) == code


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """The list needs no agent."""
    code, out, _ = run(capsys, "--list")
    assert (0, len(CHECKS)) == (code, len(out.splitlines()))
    code, out, _ = run(capsys, "--list", "--json", "-k", "round")
    assert ["round-trip"] == [check["name"] for check in json.loads(out)]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "--agent is missing"),
        (("--agent", "grcp:x"), 2, "unknown kind of agent 'grcp'"),
        (("--agent", "msgpack-rpc:tcp://192.0.2.1:1"), 2, "TCP without TLS is for this host only"),
        (("--agent", "msgpack-rpc:unix:///x,chunk=1"), 2, "unknown option 'chunk'; did you mean 'chunk_size'"),
        (("--agent", "nonsense"), 2, "must be KIND:ADDRESS"),
        (("--list", "-k", "zzz"), 2, "no check has 'zzz'"),
        (("--agent", "msgpack-rpc:unix:///nonexistent.sock"), 1, "cannot reach"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong is said in one line, with the right exit code."""
    found, out, err = run(capsys, *arguments)
    assert (code, "") == (found, out)
    assert says in err
    assert 1 == len(err.splitlines())
