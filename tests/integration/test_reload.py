"""A running daemon is changed by its control socket and its configuration, function by function."""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from daemonkit import serving
from migrationkit import until
from rawclient import REGION_READ, attached, connect
from vfiouser_oob.cli.main import main
from vfiouser_oob.config.load import load_config
from vfiouser_oob.observability import levels, log
from vfiouser_oob.observability.status import FunctionStatus
from vfiouser_oob.server.daemon import Daemon
from vfiouser_oob.server.dispatcher import Queued
from vfiouser_oob.server.pulse import Pulse
from vfiouser_protocol.session import CommandReceived

MAGIC = 0x75666F76


class Site:
    """A directory with a configuration file and the sockets of its daemon."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "config.toml"
        self.daemon: Daemon | None = None

    def table(self, name: str, more: str = "", device: str = 'kind = "model", model = "test"') -> str:
        """A function's table."""
        return f'[[function]]\nname = "{name}"\nsocket = "{self.socket(name)}"\ndevice = {{ {device} }}\n{more}\n'

    def socket(self, name: str) -> Path:
        """Where a function listens."""
        return self.directory / f"{name}.sock"

    def write(self, *tables: str, daemon: str = "") -> None:
        """Write the configuration."""
        head = f'[daemon]\ncontrol_socket = "{self.directory}/control.sock"\nstate_directory = "none"\n{daemon}\n'
        self.file.write_text(head + "".join(tables))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Daemon]:
        """Run a daemon of the file."""
        read = partial(load_config, self.file, lenient=True)
        async with serving(config=read(), reread=read) as daemon:
            self.daemon = daemon
            yield daemon

    def status(self) -> dict[str, FunctionStatus]:
        """What the daemon says of its functions, by name."""
        assert self.daemon is not None
        return {function["name"]: function for function in self.daemon.status()["functions"]}

    def phases(self) -> dict[str, str]:
        """The phase of each."""
        return {name: function["phase"] for name, function in self.status().items()}

    async def run(self, *words: str) -> int:
        """Run a command against the daemon."""
        command = partial(main, [*words, "--control-socket", str(self.directory / "control.sock")])
        with trio.fail_after(20):
            return await trio.to_thread.run_sync(command, abandon_on_cancel=True)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """An empty one; commands run in threads, which may install no signal handlers."""
    monkeypatch.setattr("vfiouser_oob.cli.main._end_on_sigterm", lambda: None)
    return Site(tmp_path)


Told = Callable[[], str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """What the commands printed since it was last asked."""

    def read() -> str:
        out, err = capsys.readouterr()
        return out + err

    return read


async def answers(path: Path) -> bool:
    """Whether a function serves."""
    async with attached(path) as client:
        return await client.read32(0, 0) == MAGIC


async def test_reload_shows_and_makes_the_difference(site: Site, told: Told) -> None:
    """One stays with its client, one goes, one changes, one comes; a second reload finds nothing to do."""
    site.write(site.table("stays"), site.table("goes"), site.table("changes"))
    async with site.serving(), attached(site.socket("stays")) as client:
        site.write(
            "# a line more, so that every table stands elsewhere\n",
            site.table("stays"),
            site.table("changes", 'dma = "messages"'),
            site.table("comes"),
            daemon='log_level = "warning"\nreply_budget_s = 3.0',
        )
        assert 0 == await site.run("reload")
        assert [
            "goes: removed",
            "changes: changed (dma)",
            "comes: added",
            "[daemon]: changed (log_level)",
            "[daemon]: needs a restart (reply_budget_s)",
        ] == told().splitlines()
        assert {"stays": "attached", "changes": "listening", "comes": "listening"} == site.phases()
        assert not site.socket("goes").exists()
        assert MAGIC == await client.read32(0, 0)
        assert await answers(site.socket("comes"))
        assert await answers(site.socket("changes"))
        assert 0 == await site.run("reload")
        assert ["[daemon]: needs a restart (reply_budget_s)"] == told().splitlines()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[function]\n", "not valid TOML"),
        ("[daemon]\nlog_level = 'loud'\n", "must be one of"),
        ("[daemons]\n", "unknown key 'daemons'"),
        ("", "at least one [[function]]"),
        ("[[function]]\nname = 7\n", "name must be"),
        ('[[function]]\nname = "other"\ncolour = "red"\n', "unknown key 'colour'"),
    ],
)
async def test_a_file_that_cannot_be_used_changes_nothing(site: Site, told: Told, text: str, words: str) -> None:
    """The reason is told with its line, and everything goes on."""
    site.write(site.table("f0"))
    async with site.serving(), attached(site.socket("f0")) as client:
        site.file.write_text(text)
        assert 1 == await site.run("reload")
        said = told()
        assert "nothing is changed" in said
        assert words in said
        assert str(site.file) in said
        assert {"f0": "attached"} == site.phases()
        assert MAGIC == await client.read32(0, 0)


async def test_one_bad_function_stops_no_other(site: Site, told: Told) -> None:
    """At the start and on reload it is a failed one with its reason, and a reload tries it again."""
    site.write(
        site.table("good"),
        site.table("typo", 'colour = "red"'),
        site.table("where").replace(str(site.socket("where")), "/nowhere/where.sock"),
    )
    async with site.serving() as daemon:
        status = site.status()
        assert {"good": "listening", "where": "failed", "typo": "failed"} == site.phases()
        assert "unknown key 'colour'" in str(status["typo"]["failed"])
        assert "the directory /nowhere does not exist" in str(status["where"]["failed"])
        assert ["good"] == [function.name for function in daemon.functions]
        assert await answers(site.socket("good"))
        async with attached(site.socket("good")) as client:
            site.write(
                site.table("good", "shape = 3"), site.table("typo"), site.table("where"), site.table("bad", "x=1")
            )
            assert 1 == await site.run("reload")
            said = told()
            assert "typo: tried again, works" in said
            assert "where: tried again, works" in said
            assert "good: cannot use: stays as it is: " in said
            assert "bad: cannot use: " in said
            assert {"good": "attached", "where": "listening", "typo": "listening", "bad": "failed"} == site.phases()
            assert MAGIC == await client.read32(0, 0)
        site.write(site.table("good"), site.table("typo"))
        assert 0 == await site.run("reload")
        assert {"good": "listening", "typo": "listening"} == site.phases()


async def test_the_line_that_a_unit_lacks_is_named(site: Site, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the service may not make a socket: to let it, or to have systemd make it."""
    monkeypatch.setenv("INVOCATION_ID", "1")
    site.write(site.table("f0"))
    (site.directory / "new.toml").write_text(site.table("new").replace(str(site.directory), "/nowhere"))
    async with site.serving():
        assert 1 == await site.run("add", str(site.directory / "new.toml"))
        said = told()
        assert "`ReadWritePaths=/nowhere` by `systemctl edit vfiouser-oob.service`" in said
        assert "`ListenStream=/nowhere/new.sock` by `systemctl edit vfiouser-oob.socket`" in said
        assert {"f0": "listening"} == site.phases()


async def test_a_device_that_hangs_costs_its_function_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is overdue beyond all budgets: its client gets EIO, and a reload brings the function back."""
    site.write(site.table("f0"), site.table("f1"))
    async with site.serving() as daemon, attached(site.socket("f0")) as client:
        units = daemon.registry.units
        pulse = Pulse(lambda: units, 12.0, lambda: None, log.get("test"))
        await pulse.round()
        assert {"f0": "attached", "f1": "listening"} == site.phases()
        dispatcher = daemon.functions[0].attached.dispatcher  # type: ignore[union-attr]
        event = CommandReceived(None, None, b"", [], [])  # type: ignore[arg-type]
        dispatcher._queue.append(Queued(event, trio.current_time() - 100))
        await pulse.round()
        assert {"f0": "failed", "f1": "listening"} == site.phases()
        assert "should have been answered 100 s ago" in str(site.status()["f0"]["failed"])
        dispatcher._queue.clear()
        assert errno.EIO == await client.errno(REGION_READ, struct.pack("<QII", 0, 0, 4))
        assert 0 == await site.run("reload")
        assert await answers(site.socket("f0"))


async def test_a_function_that_broke_is_tried_again(site: Site, told: Told) -> None:
    """What fails while it serves is brought back by a reload, although nothing changed in the file."""
    site.write(site.table("f0"), site.table("f1"))
    async with site.serving() as daemon:
        daemon.functions[0].out_of_service("smoke", RuntimeError("smoke"))
        assert ("failed", "smoke") == (site.phases()["f0"], site.status()["f0"]["failed"])
        assert 0 == await site.run("reload")
        assert "f0: tried again, works\n" == told()
        assert await answers(site.socket("f0"))


async def test_what_is_in_use_waits_for_its_client(site: Site, told: Told) -> None:
    """It accepts no new client until it is what the file says, and another reload may think better of it."""
    site.write(site.table("f0"), site.table("f1"), site.table("f2"))
    async with site.serving(), attached(site.socket("f2")) as kept:
        async with attached(site.socket("f0")) as client, attached(site.socket("f1")):
            site.write(site.table("f0", "retain_state = true"))
            assert 0 == await site.run("reload")
            said = told().splitlines()
            assert len(said) == 3
            assert said[2].startswith("f0: waits to change (retain_state) until ")
            assert said[0].startswith("f1: waits to remove until ")
            second = await connect(site.socket("f0"))
            assert errno.EBUSY == (await second.negotiate()).error
            second.close()
            assert MAGIC == await client.read32(0, 0)
            site.write(site.table("f0", "retain_state = true"), site.table("f2"))
            assert 0 == await site.run("reload")
        await until(lambda: site.phases() == {"f0": "listening", "f2": "attached"})
        assert not site.socket("f1").exists()
        assert await answers(site.socket("f0"))
        assert MAGIC == await kept.read32(0, 0)
        told()
        site.write(site.table("f0", "retain_state = true"), site.table("f2", "retain_state = true"))
        assert 0 == await site.run("reload", "--force")
        assert "f2: changed (retain_state)\n" == told()
        assert b"" == await kept.sock.recv(1)


async def test_who_may_connect_changes_under_a_client(site: Site, told: Told) -> None:
    """`allow_uids` counts for the next client; the one that is there stays."""
    site.write(site.table("f0"))
    async with site.serving():
        async with attached(site.socket("f0")) as client:
            site.write(site.table("f0", f'allow_uids = [{os.getuid() + 1}]\nlog_level = "debug"'))
            assert 0 == await site.run("reload")
            assert "f0: changed (allow_uids, log_level)\n" in told()
            assert MAGIC == await client.read32(0, 0)
            assert "debug" == levels.chosen("f0")
        await until(lambda: site.phases() == {"f0": "listening"})
        stranger = await connect(site.socket("f0"))
        assert errno.EACCES == (await stranger.negotiate()).error
        stranger.close()
    assert levels.chosen("f0") is None


async def test_vms_come_and_go_with_the_file(site: Site, told: Told) -> None:
    """A VM is a unit of life like a function: it comes, changes, fails and goes by itself."""

    def vm(name: str, function: str, more: str = "") -> str:
        sockets = "".join(
            f'{what} = "{site.directory}/{name}.{what}"\n' for what in ("monitor", "dbus_vmstate", "vhost_user_fs")
        )
        return f'[[vm]]\nname = "{name}"\nfunctions = ["{function}"]\n{sockets}{more}\n'

    def phases() -> dict[str, str]:
        assert site.daemon is not None
        return {each["name"]: each["phase"] for each in site.daemon.status()["vms"]}

    functions = [site.table("f0"), site.table("f1")]
    site.write(*functions, vm("one", "f0"), vm("lost", "f9"))
    async with site.serving(), attached(site.socket("f0")) as client:
        assert {"one": "absent", "lost": "failed"} == phases()
        assert (site.directory / "one.monitor").is_socket()
        site.write(*functions, vm("one", "f0", "state_max = '1M'"), vm("lost", "f1"))
        assert 0 == await site.run("reload")
        assert "one: changed (state_max)\nlost: tried again, works\n" == told()
        assert {"one": "absent", "lost": "absent"} == phases()
        site.write(*functions, vm("lost", "f1"))
        assert 0 == await site.run("reload")
        assert "one: removed\n" == told()
        assert not (site.directory / "one.monitor").exists()
        assert {"lost": "absent"} == phases()
        assert MAGIC == await client.read32(0, 0)


async def test_what_nothing_has_helped_is_tried_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A function that failed is tried again on reload, and a second time only if another change may have helped it."""
    site.write(site.table("good"), site.table("where").replace(str(site.socket("where")), "/nowhere/where.sock"))
    async with site.serving():
        caplog.clear()
        assert 1 == await site.run("reload")
        assert 1 == sum("cannot provide a" in record.getMessage() for record in caplog.records)


async def test_functions_that_exchange_their_sockets(site: Site, told: Told) -> None:
    """The one that comes first cannot have what the second one still has; both have it in the end."""
    site.write(site.table("a"), site.table("b"))
    async with site.serving():
        one, two = site.table("a"), site.table("b")
        site.write(
            one.replace(str(site.socket("a")), str(site.socket("b"))),
            two.replace(str(site.socket("b")), str(site.socket("a"))),
        )
        assert 0 == await site.run("reload")
        assert "a: changed (socket)\nb: changed (socket)\n" == told()
        assert str(site.socket("b")) == site.status()["a"]["socket"]
        assert await answers(site.socket("a"))


async def test_add_and_remove(site: Site, told: Told) -> None:
    """What was added is served, survives a reload, and goes; one that has a client goes only by force."""
    site.write(site.table("f0"))
    more = site.directory / "more.toml"
    async with site.serving(), attached(site.socket("f0")) as client:
        more.write_text(site.table("new0") + site.table("new1"))
        assert 0 == await site.run("add", str(more))
        assert told().startswith("new0: added\nnew1: added\nnot in the daemon's configuration file")
        assert 0 == await site.run("reload")
        assert "nothing changed\n" == told()
        async with attached(site.socket("new0")) as guest:
            assert 1 == await site.run("remove", "new0")
            assert "new0 is in use by " in told()
            assert MAGIC == await guest.read32(0, 0)
            assert 0 == await site.run("remove", "new0", "--force")
            assert "is disconnected" in told()
            assert b"" == await guest.sock.recv(1)
        assert not site.socket("new0").exists()
        # The file names it now: it is the file's from here on.
        site.write(site.table("f0"), site.table("new1"))
        assert 0 == await site.run("reload")
        site.write(site.table("f0"))
        told()
        assert 0 == await site.run("reload")
        assert "new1: removed\n" == told()
        assert MAGIC == await client.read32(0, 0)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[daemon]\n", 2, "unknown key 'daemon'"),
        ("", 2, "key 'function' is missing"),
        ("{table f0}", 1, "function 'f0' exists already"),
        (
            '{table f1}[[function]]\nname = "f2"\nsocket = "{f0}"\ndevice = {kind="model", model="test"}',
            1,
            "is that of",
        ),
    ],
)
async def test_what_cannot_be_added_adds_nothing(site: Site, told: Told, text: str, code: int, words: str) -> None:
    """All of it, or nothing."""
    for name in ("f0", "f1"):
        text = text.replace(f"{{table {name}}}", site.table(name)).replace(f"{{{name}}}", str(site.socket(name)))
    site.write(site.table("f0"))
    (site.directory / "more.toml").write_text(text)
    async with site.serving():
        assert code == await site.run("add", str(site.directory / "more.toml"))
        assert words in told()
        assert {"f0": "listening"} == site.phases()


async def test_drain_waits_and_says_so(site: Site, told: Told) -> None:
    """No new client, the old one stays as long as it likes, and then the command ends."""
    site.write(site.table("f0"))
    async with site.serving() as daemon:
        function = daemon.functions[0]
        async with trio.open_nursery() as nursery, attached(site.socket("f0")) as client:
            nursery.start_soon(site.run, "drain", "f0")
            await until(lambda: function.draining)
            second = await connect(site.socket("f0"))
            assert errno.EBUSY == (await second.negotiate()).error
            second.close()
            assert MAGIC == await client.read32(0, 0)
            assert "" == told()
        assert "f0: drained: it has no client and accepts none\n" == told()
        assert {"f0": "drained"} == site.phases()
        assert 0 == await site.run("drain", "f0")
        assert 0 == await site.run("drain", "f0", "--undo")
        assert told().endswith("clients may connect again\n")
        assert await answers(site.socket("f0"))


async def test_disconnect(site: Site, told: Told) -> None:
    """The client is turned out and the next one may come; without a client that is said."""
    site.write(site.table("f0"))
    async with site.serving():
        async with attached(site.socket("f0")) as client:
            assert 0 == await site.run("disconnect", "f0")
            assert "is disconnected; the next client may connect" in told()
            assert b"" == await client.sock.recv(1)
        assert 1 == await site.run("disconnect", "f0")
        assert "f0 has no client" in told()
        assert 1 == await site.run("disconnect", "f9")
        assert "there is no function 'f9'" in told()
        assert await answers(site.socket("f0"))


async def test_log_level_counts_for_clients_that_are_there(site: Site, told: Told) -> None:
    """Of one function, and of all that have none of their own."""
    site.write(site.table("f0"), site.table("f1"))
    async with site.serving() as daemon, attached(site.socket("f0")), attached(site.socket("f1")):
        one, two = daemon.functions
        assert 0 == await site.run("log-level", "debug", "--function", "f1")
        assert [False, True] == [function.log.debug_enabled for function in (one, two)]
        assert [False, True] == [each.connection._main.tracing for each in (one, two) if each.connection]
        assert 0 == await site.run("log-level", "error")
        assert 0 == await site.run("log-level", "info", "--function", "f1")
        assert [False, False] == [each.connection._main.tracing for each in (one, two) if each.connection]
        assert 0 == await site.run("log-level", "info")


async def test_sighup_reloads(site: Site) -> None:
    """It never ends the daemon, also if the file is of no use."""
    site.write(site.table("f0"))
    async with site.serving():
        site.file.write_text("nonsense")
        os.kill(os.getpid(), signal.SIGHUP)
        site.write(site.table("f0"), site.table("f1"))
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: site.phases() == {"f0": "listening", "f1": "listening"})
