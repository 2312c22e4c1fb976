"""A vendor's plug-in behind a whole daemon: the library speaks to the simulated SoC as its authors' example does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

import vendors
from migrationkit import until
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.control.client import ControlClient
from vfiouser_oob.lab.demo.children import Child, running
from vfiouser_oob.lab.demo.hosts import HOSTS, HostOptions, HostPair, two_hosts
from vfiouser_oob.lab.demo.workload import Workload
from vfiouser_oob.lab.vmm.live import LiveOptions
from vfiouser_oob.lab.vmm.side import Generation
from vfiouser_oob.lab.vmm.voyage import Voyage
from vfiouser_protocol.constants import RegionIndex

pytestmark = pytest.mark.slow

#: Seconds between commands of a writer: most of the processor is left for the migration.
PAUSE_S = 0.02
DEVICE = "0000:3b:00.2"
LEGACY = ("legacy-tcp", "legacy-tcp")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="vt-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled plug-in."""
    made = tmp_path_factory.mktemp("plugin") / "remote_plugin.so"
    source = Path(vendors.__file__).with_name("remote_plugin.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(made), str(source)], check=True)
    return made


def plugin_socket(pair: HostPair, host: str) -> Path:
    """Where the daemon with the plug-in serves the function of a host."""
    return pair.directory / host / "p0.sock"


def configuration(pair: HostPair, host: str, library: Path) -> str:
    """A daemon that serves the function of a host's SoC and migrates it by the plug-in."""
    directory = pair.directory / host
    return f"""\
[daemon]
control_socket = "{directory}/plugin.control"

[[function]]
name = "p0"
socket = "{plugin_socket(pair, host)}"
device = {{ kind = "vfio-user", socket = "{directory}/soc/f0.sock" }}

[function.agent]
kind = "plugin-so"
path = "{library}"
arg = "{pair.agent_port(host)}"
devices = {{ nvme0 = "{DEVICE}" }}
function = "nvme0"
descriptor = {{ vendor = "acme", model = "nic 9", kind = "nvme", firmware = "7.2" }}
"""


@asynccontextmanager
async def plugin_hosts(
    place: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[HostPair, dict[str, Child]]]:
    """Both hosts, and on each a daemon that uses the plug-in."""
    options = HostOptions(size=1 << 20, tls=False, agents=LEGACY)
    async with two_hosts(place, options, lambda line: None) as pair, AsyncExitStack() as stack:
        daemons = {}
        for host in HOSTS:
            config = place / host / "plugin.toml"
            config.write_text(configuration(pair, host, library))
            monkeypatch.setenv("PLUGIN_LOG", str(place / host / "plugin.log"))
            command = ["serve", "--config", str(config)]
            daemons[host] = await stack.enter_async_context(running(f"plugin-{host}", command, place))
        yield pair, daemons


def noted(place: Path, host: str) -> list[list[str]]:
    """What a host's plug-in noted: operation, device, process."""
    return [line.split() for line in (place / host / "plugin.log").read_text().splitlines()]


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that are there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it has just ended
            state, parent = stat.rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(entry.name))
    return found


async def migrate(voyage: Voyage, target: Path, generation: Generation) -> None:
    """Migrate, and compare the memory of both sides."""
    with trio.fail_after(60):
        progress = await voyage.migrate(target, generation, options=LiveOptions(compare=True))
    assert progress.memory_equal


async def test_a_vm_migrates_by_plugins(place: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM under I/O goes A → B → A in both generations; on each side the library was in it from init to cleanup."""
    async with (
        plugin_hosts(place, library, monkeypatch) as (pair, _),
        Voyage.open(plugin_socket(pair, "A"), memory_size=2 << 20, pool_pages=128) as voyage,
    ):
        counted = await voyage.driver.counted_commands()
        workload = Workload(voyage.driver, "plug-in", pause_s=PAUSE_S)
        async with background_nursery() as nursery:
            await nursery.start(workload.run)
            for host, generation in (("B", Generation.V1), ("A", Generation.V2)):
                await migrate(voyage, plugin_socket(pair, host), generation)
                await workload.next_write()
            await workload.finish()
        await workload.verify()
        assert 0 == workload.counts.mismatches
        done = (counted[0] + workload.counts.reads, counted[1] + workload.counts.writes)
        assert done == await voyage.driver.counted_commands()
    for host in HOSTS:
        notes = noted(place, host)
        begun = [row for row in notes if row[0] == "init"]
        assert len(begun) >= 2, "one migration as a source and one as a destination"
        assert {DEVICE} == {row[1] for row in begun}
        ended = [row[2] for row in notes if row[0] == "cleanup"]
        assert sorted(ended) == sorted(row[2] for row in begun), "a library was not cleaned up"


def kill_plugin(daemon: Child) -> None:
    """Kill the process that a daemon's library runs in."""
    (pid,) = children_of(daemon.pid)
    os.kill(pid, signal.SIGKILL)


async def test_a_plugin_that_dies_is_started_again(place: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was idle is not missed, and neither is one whose function is stopped and has given everything."""
    async with (
        plugin_hosts(place, library, monkeypatch) as (pair, daemons),
        Voyage.open(plugin_socket(pair, "A"), memory_size=2 << 20, pool_pages=128) as voyage,
    ):
        workload = Workload(voyage.driver, "killed", pause_s=PAUSE_S)
        async with background_nursery() as nursery:
            await nursery.start(workload.run)
            await migrate(voyage, plugin_socket(pair, "B"), Generation.V2)
            kill_plugin(daemons["B"])
            await workload.next_write()
            await migrate(voyage, plugin_socket(pair, "A"), Generation.V2)
            kill_plugin(daemons["B"])
            await workload.next_write()
            await migrate(voyage, plugin_socket(pair, "B"), Generation.V2)
            assert "was killed by SIGKILL" in daemons["B"].log.read_text()
            await workload.next_write()
            await workload.finish()
        await workload.verify()
        assert 0 == workload.counts.mismatches


async def killed(daemon: Child, how: signal.Signals) -> None:
    """End a daemon."""
    stat = Path(f"/proc/{daemon.pid}/stat")
    os.kill(daemon.pid, how)

    def over() -> bool:
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):  # it may go while it is being read
            return True

    await until(over, 15)


async def fenced(control: Path) -> None:
    """Wait until a daemon has asked the agent of its function, and knows that it must not run."""
    with trio.fail_after(10):
        while True:
            with ControlClient(control) as client:
                migration = (await trio.to_thread.run_sync(client.status))["functions"][0]["migration"]
            if migration is not None and migration["fenced"]:
                return
            await trio.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
@pytest.mark.parametrize("kind", ["plugin-so", "legacy-tcp"])
async def test_a_source_whose_daemon_begins_anew_stays_stopped(
    kind: str, how: signal.Signals, place: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What went to B is not run by A, whatever A's daemon has forgotten: its next client finds it reset."""
    monkeypatch.setenv("PLUGIN_LOG", str(place / "plugin.log"))
    options = HostOptions(size=1 << 20, tls=False, agents=LEGACY)
    async with two_hosts(place, options, lambda line: None) as pair, AsyncExitStack() as stack:
        config, control = place / "A" / "daemon.toml", place / "A" / "control.sock"
        daemon, socket = pair.daemon("A"), pair.socket("A", "f0")
        target = pair.socket("B", "f0")
        if kind == "plugin-so":
            daemons = {}
            for host in HOSTS:
                config = place / host / "plugin.toml"
                config.write_text(configuration(pair, host, library))
                serve = ["serve", "--config", str(config)]
                daemons[host] = await stack.enter_async_context(running(f"plugin-{host}", serve, place))
            config, control = place / "A" / "plugin.toml", place / "A" / "plugin.control"
            daemon, socket, target = daemons["A"], plugin_socket(pair, "A"), plugin_socket(pair, "B")
        async with Voyage.open(socket, memory_size=2 << 20, pool_pages=128) as voyage:
            workload = Workload(voyage.driver, "two copies", pause_s=PAUSE_S)
            async with background_nursery() as nursery:
                await nursery.start(workload.run)
                await migrate(voyage, target, Generation.V2)
                await killed(daemon, how)
                await stack.enter_async_context(running("again-A", ["serve", "--config", str(config)], place))
                await fenced(control)
                async with Client.connect(socket) as client:
                    enabled = int.from_bytes(await client.region_read(RegionIndex.BAR0, 0x14, 4), "little")
                assert 0 == enabled, "the controller of A went on with the state that B has"
                await workload.next_write()
                await workload.finish()
            await workload.verify()
            assert 0 == workload.counts.mismatches


async def test_a_library_that_cannot_be_loaded_blocks_migration_with_its_reason(place: Path) -> None:
    """`check-config` finds it; a daemon serves the function all the same, and says once why it cannot be migrated."""
    broken = place / "lm-plugin.so"
    broken.write_text("no library")
    text = f"""\
[daemon]
control_socket = "{place}/control"

[[function]]
name = "p0"
socket = "{place}/p0.sock"
device = {{ kind = "model", model = "test" }}
agent = {{ kind = "plugin-so", path = "{broken}", function = "{DEVICE}" }}
"""
    config = place / "daemon.toml"
    config.write_text(text)
    command = [sys.executable, "-m", "vfiouser_oob", "check-config", str(config)]
    checked = await trio.run_process(command, check=False, capture_stderr=True)
    assert 2 == checked.returncode
    assert b"p0" in checked.stderr
    assert b"cannot be loaded" in checked.stderr
    async with running("p0", ["serve", "--config", str(config)], place) as daemon:
        migration = None
        with trio.fail_after(10):
            while migration is None or not migration["blocked"]:
                with ControlClient(place / "control") as client:
                    migration = (await trio.to_thread.run_sync(client.status))["functions"][0]["migration"]
                await trio.sleep(0.02)
        assert "cannot be loaded" in migration["blocked"]
        assert not migration["migratable"]
        for _ in range(2):
            async with Client.connect(place / "p0.sock") as client:
                assert 0x75666F76 == int.from_bytes(await client.region_read(RegionIndex.BAR0, 0, 4), "little")
        assert 1 == daemon.log.read_text().count("the function cannot be migrated")
