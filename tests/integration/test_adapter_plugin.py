"""The `plugin-so` adapter, with libraries that are compiled here: one that behaves, and one for each way not to."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import vendors
from agentbed.whole_state import load_all, save_all
from migrationkit import until
from vfiouser_agents.adapters import plugin_host, plugin_so
from vfiouser_agents.adapters.plugin_so import LibraryUnusable, PluginSoAgent
from vfiouser_agents.api import AgentState, Outcome, Phase, Role
from vfiouser_agents.errors import (
    AgentError,
    ConnectError,
    DeadlineExceeded,
    InvalidState,
    NotFound,
    ProtocolError,
    TransportLost,
    Unsupported,
)
from vfiouser_agents.options import OptionError
from vfiouser_agents.registry import make_agent
from vfiouser_agents.testing import CheckOutcome, check_agent

DEVICE = "0000:3b:00.2"
CONTENT = bytes(range(256)) * 50
Compiler = Callable[..., Path]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """Compiles the plug-in with some macros defined, once for each set of them."""
    directory = tmp_path_factory.mktemp("plugins")
    found: dict[tuple[str, ...], Path] = {}

    def build(*macros: str) -> Path:
        if macros not in found:
            source = Path(vendors.__file__).with_name("plugin.c")
            library = directory / f"plugin{len(found)}.so"
            flags = ["-shared", "-fPIC", "-O1", "-Wno-format-truncation", *[f"-D{macro}" for macro in macros]]
            subprocess.run(["gcc", *flags, "-o", str(library), str(source)], check=True)
            found[macros] = library
        return found[macros]

    return build


def options(library: Path, directory: Path, **more: Any) -> dict[str, Any]:
    """Options for a library whose device is files of a directory."""
    content = directory / "d.content"
    if not content.exists():
        content.write_bytes(CONTENT)
    return {"path": str(library), "arg": str(directory / "d"), **more}


@pytest.mark.slow
async def test_contract(compiled: Compiler, tmp_path: Path) -> None:
    """A library that behaves keeps the contract as far as the capabilities go."""
    factory = partial(make_agent, "plugin-so", options(compiled(), tmp_path, chunk_size=4096))
    results = await check_agent(factory, function_id=DEVICE)
    assert [] == [(result.name, result.detail) for result in results if result.outcome is CheckOutcome.FAILED]
    assert sum(result.outcome is CheckOutcome.PASSED for result in results) >= 35


async def test_migration(compiled: Compiler, tmp_path: Path) -> None:
    """The bytes arrive; the library is initialised once at the beginning and cleaned up once at the end."""
    here, there = tmp_path / "here", tmp_path / "there"
    for directory in (here, there):
        await trio.Path(directory).mkdir()
    (there / "d.content").write_bytes(b"other")
    async with (
        make_agent("plugin-so", options(compiled(), here, devices={"nvme0": DEVICE})) as source,
        make_agent("plugin-so", options(compiled(), there, devices={"nvme7": "0000:af:00.1"})) as target,
    ):
        assert [("nvme0", DEVICE)] == [(entry.function_id, entry.bdf) for entry in await source.functions()]
        sender, receiver = await source.open("nvme0"), await target.open("nvme7")
        await load_all(receiver, await save_all(sender, 5000))
        await receiver.resume()
        for session in (sender, receiver):
            await session.end(Outcome.SUCCESS)
    assert CONTENT == (there / "d.content").read_bytes()
    assert ["init", DEVICE, "cleanup"] == (here / "d.log").read_text().split()
    assert ["0", "1"] == [(directory / "d.state").read_text() for directory in (here, there)]


async def test_a_descriptor_without_format_has_the_interfaces_own(compiled: Compiler, tmp_path: Path) -> None:
    """What is saved can be loaded, whatever else the configuration says of the function; its own word wins."""
    about = {"vendor": "acme", "model": "nic 9"}
    for told, expected in ((about, "vfio-lm-plugin"), ({**about, "format_id": "nic-9"}, "nic-9")):
        async with make_agent("plugin-so", options(compiled(), tmp_path, descriptor=told)) as agent:
            session = await agent.open(DEVICE)
            assert ((expected,), expected) == (session.caps.formats, (await session.describe()).format_id)


async def test_an_idle_process_that_dies_is_not_missed(compiled: Compiler, tmp_path: Path) -> None:
    """Between migrations the library holds nothing, so the next call has another process and succeeds."""
    async with make_agent("plugin-so", options(compiled(), tmp_path)) as agent:
        session = await agent.open(DEVICE)
        await session.status()
        function = agent.books[DEVICE].primitive  # type: ignore[attr-defined]
        process = function._process._process
        process.kill()
        await process.wait()
        assert AgentState.RUNNING is (await session.status()).state
        assert process is not function._process._process


#: Macros, the error, and what it says: libraries that cannot be used at all.
UNUSABLE: list[tuple[str, list[str], type[AgentError], str]] = [
    ("another version", ["VERSION=1"], LibraryUnusable, "version 1; only version 0"),
    ("no version", ["NO_VERSION"], LibraryUnusable, "no symbol vfio_lm_get_plugin_version"),
    ("no operations", ["NO_OPS"], LibraryUnusable, "no symbol vfio_lm_get_plugin_ops"),
    ("operations are NULL", ["NULL_OPS"], LibraryUnusable, "returned NULL"),
    ("an operation is NULL", ["NO_LOAD"], LibraryUnusable, "no operation 'load'"),
    ("crashes when loaded", ["ON_LOADING=raise(SIGSEGV)"], LibraryUnusable, "killed by SIGSEGV during loading"),
    ("exits when loaded", ["ON_LOADING=_exit(3)"], LibraryUnusable, "exit status 3 during loading"),
    ("hangs when loaded", ["ON_LOADING=spin()"], DeadlineExceeded, "loading of .* 1 s"),
]


@pytest.mark.parametrize(("what", "macros", "kind", "says"), UNUSABLE, ids=[row[0] for row in UNUSABLE])
async def test_unusable(
    what: str, macros: list[str], kind: type[AgentError], says: str, compiled: Compiler, tmp_path: Path
) -> None:
    """A library that cannot be used is refused when it is connected to, with the reason."""
    async with make_agent("plugin-so", options(compiled(*macros), tmp_path, call_timeout_s=1.0)) as agent:
        with pytest.raises(kind, match=says):
            await agent.connect()


async def test_no_library(tmp_path: Path) -> None:
    """A path where there is no library, or something else, is refused."""
    (tmp_path / "text.so").write_text("no library")
    for name, says in [("none.so", "cannot open shared object"), ("text.so", "cannot be loaded")]:
        async with make_agent("plugin-so", options(tmp_path / name, tmp_path)) as agent:
            with pytest.raises(LibraryUnusable, match=says):
                await agent.connect()
            with pytest.raises(OptionError, match=says):
                agent.verify()


#: Macros, the error, and what it says: libraries that misbehave in a call of a source.
MISBEHAVING: list[tuple[str, list[str], type[AgentError], str]] = [
    ("init gives NULL", ["ON_INIT=return NULL"], ConnectError, "init for '0000:3b:00.2' returned NULL"),
    ("init exits", ["ON_INIT=exit(1)"], TransportLost, "exit status 1 during init"),
    ("init hangs", ["ON_INIT=pause()"], DeadlineExceeded, "init of .* 1 s"),
    ("save crashes", ["ON_SAVE=*(volatile int *)0 = 1"], TransportLost, "SIGSEGV during save"),
    ("save aborts", ['ON_SAVE=fprintf(stderr, "bad queue\\n"), abort()'], TransportLost, "SIGABRT.*it said: bad queue"),
    ("save spins", ["ON_SAVE=spin()"], DeadlineExceeded, "save of .* process is killed"),
    ("save fails", ["ON_SAVE=return -5"], AgentError, r"save of .* \(vendor code -5\)"),
    ("exit is called", ["ON_SET=exit(0)"], TransportLost, "exit status 0 during set_state"),
    ("set_state does nothing", ["ON_SET=return 0"], InvalidState, "in state 1 after it was told to go to 3"),
    ("set_state fails", ["ON_SET=return -1"], AgentError, "vendor code -1"),
    ("get_state makes no sense", ["ON_GET=*value = 77; return 0"], ProtocolError, "state is 77"),
    ("closes everything", ["ON_SET=for (int i = 0; i < 64; i++) close(i)"], TransportLost, "during set_state"),
    ("pending never ends", ["ON_PENDING=*pending_bytes = 1ULL << 60; return 0"], AgentError, "-22"),
    ("there is no state", ["ON_PENDING=*pending_bytes = 0; return 0"], ProtocolError, "0 bytes of state"),
]


@pytest.mark.parametrize(("what", "macros", "kind", "says"), MISBEHAVING, ids=[row[0] for row in MISBEHAVING])
async def test_misbehaving(
    what: str, macros: list[str], kind: type[AgentError], says: str, compiled: Compiler, tmp_path: Path
) -> None:
    """What a library does to its process or its contract is one error on this side, in time, and nothing else."""
    async with make_agent("plugin-so", options(compiled(*macros), tmp_path, call_timeout_s=1.0)) as agent:
        session = await agent.open(DEVICE)
        with trio.fail_after(10), pytest.raises(kind, match=says):
            await save_all(session, 5000)


async def test_load_fails(compiled: Compiler, tmp_path: Path) -> None:
    """A library that refuses a piece fails the commit, and the function is not resumed."""
    async with make_agent("plugin-so", options(compiled("ON_LOAD=return -22"), tmp_path)) as agent:
        session = await agent.open(DEVICE)
        with pytest.raises(AgentError, match="-22"):
            await load_all(session, CONTENT)
        with pytest.raises(InvalidState, match="not committed"):
            await session.resume()


async def test_another_process_after_a_crash(compiled: Compiler, tmp_path: Path) -> None:
    """After a crash the next call starts another process, which finds the device as it was left."""
    crash_once = 'ON_PENDING=if (!file(device, "crashed", "r")) { fclose(file(device, "crashed", "w")); abort(); }'
    async with make_agent("plugin-so", options(compiled(crash_once), tmp_path)) as agent:
        session = await agent.open(DEVICE)
        with pytest.raises(TransportLost, match="SIGABRT during update_pending"):
            await save_all(session, 5000)
        assert AgentState.STOPPED is (await session.status()).state
        assert CONTENT == await save_all(session, 5000)


async def test_a_cancelled_call_comes_to_its_end(compiled: Compiler, tmp_path: Path) -> None:
    """A caller does not wait for a slow library; the call ends in its own time, and what follows comes after it."""
    wait = 'ON_SAVE=fclose(file(device, "reached", "w")); while (access(file_name(device, "go"), F_OK)) usleep(1000)'
    async with make_agent("plugin-so", options(compiled(wait), tmp_path)) as agent:
        session = await agent.open(DEVICE)
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.save, 0, 100, Phase.FINAL)
            await until((tmp_path / "d.reached").exists, 10)
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.resume)
            (tmp_path / "d.go").touch()
        await session.end(Outcome.CANCELLED)
        assert AgentState.RUNNING is (await session.status()).state
    assert ["init", DEVICE, "cleanup"] * 2 == (tmp_path / "d.log").read_text().split(), "the process was killed"


async def test_a_library_that_hangs_loses_its_process(compiled: Compiler, tmp_path: Path) -> None:
    """A call that does not come back in the time that a call may take is given up, and the next one works."""
    hang_once = 'ON_SET=if (!file(device, "hung", "r")) { fclose(file(device, "hung", "w")); pause(); }'
    async with make_agent("plugin-so", options(compiled(hang_once), tmp_path, call_timeout_s=0.5)) as agent:
        session = await agent.open(DEVICE)
        with pytest.raises(DeadlineExceeded):
            await session.stop()
        await session.stop()
        assert AgentState.STOPPED is (await session.status()).state


def test_the_library_is_cleaned_up_when_the_daemon_is_killed(compiled: Compiler, tmp_path: Path) -> None:
    """The process notices that nobody is there any more, also in the middle of a call, and lets go of the device."""
    library = compiled("ON_SAVE=usleep(200000)")
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-S", plugin_host.__file__, str(theirs.fileno()), str(library)]
    (tmp_path / "d.content").write_bytes(CONTENT)
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        both = f"{DEVICE}\0{tmp_path / 'd'}".encode()
        ours.sendall(plugin_host.REQUEST.pack(plugin_host.INIT, len(both), 0) + both)
        ours.sendall(plugin_host.REQUEST.pack(plugin_host.SAVE, 100, 0))
        assert ours.recv(2 * plugin_host.REPLY.size, socket.MSG_WAITALL)
        ours.close()
        assert 0 == process.wait(10)
    assert ["init", DEVICE, "cleanup"] == (tmp_path / "d.log").read_text().split()


async def test_what_the_series_leaves_open(compiled: Compiler, tmp_path: Path) -> None:
    """`load` may return a number of bytes, and `cleanup` may be NULL."""
    library = compiled(
        "ON_LOAD=if (f && fwrite(state, 1, len, f) == len) { fclose(f); return (int)len; }", "NO_CLEANUP"
    )
    async with make_agent("plugin-so", options(library, tmp_path)) as agent:
        agent.verify()
        session = await agent.open(DEVICE)
        await load_all(session, CONTENT[::-1])
        await session.resume()
        await session.end(Outcome.SUCCESS)
    assert CONTENT[::-1] == (tmp_path / "d.content").read_bytes()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What the adapter logs meanwhile, whoever has configured logging before."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(plugin_so.__name__)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


async def test_what_a_library_prints_is_logged(compiled: Compiler, tmp_path: Path, logged: list[str]) -> None:
    """Whole lines to both outputs are, also without an end of the process that would empty its buffers; not a flood."""
    talk = 'ON_GET=printf("to stdout\\n"); fprintf(stderr, "to stderr\\n")'
    async with make_agent("plugin-so", options(compiled(talk), tmp_path)) as agent:
        await (await agent.open(DEVICE)).status()
        said = {"to stdout", "to stderr"}
        await until(lambda: said <= {line.rpartition(": ")[2] for line in logged}, 5)
    logged.clear()
    flood = 'ON_GET=for (int i = 0; i < 5000; i++) printf("line %d\\n", i); printf("the end\\n")'
    async with make_agent("plugin-so", options(compiled(flood), tmp_path)) as agent:
        await (await agent.open(DEVICE)).status()
    assert len(logged) < 100


async def test_no_process_is_left(compiled: Compiler, tmp_path: Path) -> None:
    """When the agent is closed its processes are gone, also one whose cleanup hangs."""
    async with make_agent("plugin-so", options(compiled("ON_CLEANUP=spin()"), tmp_path, call_timeout_s=0.5)) as agent:
        session = await agent.open(DEVICE)
        await session.begin(Role.SOURCE, "m")
        assert children()
    assert not children()


def children() -> list[str]:
    """Processes of ours that run a plug-in."""
    # A process is the child of the thread that started it.
    ours = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in ours]
    return [line for line in lines if "plugin_host" in line]


async def test_what_the_series_lacks_is_refused(compiled: Compiler, tmp_path: Path) -> None:
    """There is no list of devices, no reset, no pre-copy and no dirty log; names that are no device are not found."""
    async with make_agent("plugin-so", options(compiled(), tmp_path)) as agent:
        session = await agent.open(DEVICE)
        for call in (session.reset, partial(session.dirty_start, [], 4096), agent.functions):
            with pytest.raises(Unsupported):
                await call()
        with pytest.raises(NotFound, match="PCI address"):
            await agent.open("nvme0")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "'path' is missing"),
        ({"path": "plugin.so"}, "absolute"),
        ({"path": "/p.so", "arg": "a\0b"}, "without NUL"),
        ({"path": "/p.so", "devices": {"a": "3b:00.2"}}, "devices must be"),
        ({"path": "/p.so", "chunk_size": "2M"}, "chunk_size"),
    ],
)
def test_options(wrong: dict[str, Any], says: str) -> None:
    """Options that cannot be used say why."""
    with pytest.raises(OptionError, match=says):
        PluginSoAgent.from_options(wrong)
