"""`migrate-check` against a running daemon with an agent: what it says at rest, exports, and finds in an export."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import STDOUT

import trio

from vmbed.hosts import Host, HostConfig, host, make_disk
from vmbed.stack import PROGRAM, environment


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Host]:
    """A host, whose VM `guest` has the function `f0` and no QEMU."""
    async with host(folder, "a", make_disk(folder), HostConfig()) as running:
        yield running


async def outcome(at: Host, *arguments: str, vm: str = "guest") -> tuple[int, str]:
    """The command's exit code, and all that it prints."""
    argv = [*PROGRAM, "migrate-check", vm, "--control-socket", str(at.folder / "control"), *arguments]
    done = await trio.run_process(argv, env=environment(), capture_stdout=True, stderr=STDOUT, check=False)
    return done.returncode, done.stdout.decode()


async def test_what_it_says(tmp_path: Path) -> None:
    """Without QEMU the VM would not migrate; its functions are known to the other host all the same."""
    async with serving(tmp_path) as at:
        code, text = await outcome(at)
        assert code == 1
        assert "VM guest would not migrate\n  no: QEMU has not connected its monitor" in text
        assert "no: Function f0 has no QEMU as its client." in text
        code, text = await outcome(at, "--json")
        assert (code, {reason["code"] for reason in json.loads(text)["reasons"]}) == (
            1,
            {"no-monitor", "function-detached"},
        )

        export = tmp_path / "export.json"
        assert await outcome(at, "--export", str(export)) == (0, "")
        offer = json.loads(export.read_text())
        assert offer["functions"]["f0"]["descriptor"]["kind"] == "nvme"
        assert offer["carriers"] == ["dbus-vmstate", "vhost-user-fs"]
        assert "mismatch" not in (await outcome(at, "--json", "--destination", str(export)))[1]

        offer["functions"]["f0"]["descriptor"]["vendor"] = "somebody else"
        export.write_text(json.dumps(offer))
        code, text = await outcome(at, "--destination", str(export))
        assert code == 1
        assert "no: The destination's function f0 cannot take the state: vendor: the source has" in text

        # An idle function costs its agent nothing, also after it was asked.
        assert all(not function["migration"]["owner"] for function in (await at.status())["functions"])


async def test_what_cannot_be_asked(tmp_path: Path) -> None:
    """Bad usage is told from a VM that would not migrate."""
    async with serving(tmp_path) as at:
        assert "there is no VM 'x' (VMs: guest)" in (await outcome(at, vm="x"))[1]
        other = tmp_path / "other.json"
        other.write_text("{}")
        code, text = await outcome(at, "--destination", str(other))
        assert (code, "migrate-check --export" in text) == (2, True)
        assert (await outcome(at, "--destination", str(tmp_path / "none")))[0] == 2
        assert (await outcome(at, "--destination=-x"))[0] == 2
