"""`make guest`: what the README tells a newcomer to type in the guest does what it says."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from vmbed import shell
from vmbed.assets import Assets
from vmbed.processes import deadline
from vmbed.stack import SocConfig, soc_and_daemon

pytestmark = pytest.mark.vm

PROMPT = b"guest# "


class Terminal:
    """What a person sees and types.

    Args:
        fd: the terminal's other end.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.seen = b""

    async def until(self, text: bytes) -> bytes:
        """Read until a text has come; returns what came before it."""
        while text not in self.seen:
            await trio.lowlevel.wait_readable(self._fd)
            self.seen += os.read(self._fd, 4096)
        before, _, self.seen = self.seen.partition(text)
        return before

    async def enter(self, command: str) -> bytes:
        """Type a command at the prompt; returns what it printed, and the echo."""
        os.write(self._fd, command.encode() + b"\n")
        return await self.until(PROMPT)


@asynccontextmanager
async def at_a_terminal(socket: Path) -> AsyncIterator[tuple[Terminal, trio.Process]]:
    """`make guest` as it runs on a terminal."""
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-m", shell.__name__, str(socket)]
        places = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = await trio.lowlevel.open_process(command, stdin=theirs, stdout=theirs, stderr=theirs, env=places)
        os.close(theirs)
        try:
            yield Terminal(ours), process
        finally:
            process.kill()
            await process.wait()
    finally:
        os.close(ours)


async def test_a_disk_is_written_by_hand(assets: Assets, workdir: Path) -> None:
    """The guest boots to a prompt, its disk holds what is written to it, and `exit` ends QEMU."""
    with deadline(240, "a guest at a terminal"):
        async with soc_and_daemon(workdir, SocConfig()) as stack, at_a_terminal(stack.socket) as (terminal, process):
            assert b"The function is /dev/nvme0n1" in await terminal.until(PROMPT)
            assert b"nvme0n1" in await terminal.enter("cat /proc/partitions")
            await terminal.enter("echo hello > /dev/nvme0n1")
            assert b"hello" in await terminal.enter("head -c 5 /dev/nvme0n1 | tr -d '\\n'")
            with pytest.raises(OSError, match="Input/output error"):  # the terminal has nobody at its other end
                await terminal.enter("exit")
            assert 0 == await process.wait()


def test_a_socket_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody who has not started the daemon is told so."""
    assert 1 == shell.main([str(tmp_path / "nobody.sock")])
    assert "is `vfiouser-oob serve` running?" in capsys.readouterr().err
