"""Who comes in: clients that say nothing, or come while another is served; and how those that err are let go."""

from __future__ import annotations

import errno
import struct
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
import trio.testing

import slowupstream
from daemonkit import function, serving
from fakeserver import Answer
from rawclient import REGION_READ, RESET, attached, connect
from slowupstream import slow_upstream
from vfiouser_oob.devices.models.test_device import MAGIC
from vfiouser_protocol.constants import Command

BUDGET_S = 2.0
#: How long the client before stays; less than a newcomer waits for it.
STAY_S = 0.8


async def test_who_says_nothing_keeps_nobody_out(tmp_path: Path) -> None:
    """Clients that connect and send no VERSION do not use the function; the next one that sends it is served."""
    path = tmp_path / "f0.sock"
    async with serving(function(tmp_path)), AsyncExitStack() as stack:
        silent = [await connect(path) for _ in range(16)]
        for client in silent:
            stack.callback(client.close)
        async with attached(path) as client:
            assert MAGIC == await client.read32(0, 0)
            # One of them says it at last, and learns that it came too late.
            assert errno.EBUSY == (await silent[-1].negotiate()).error
        assert 1 == (await silent[3].negotiate()).flags


async def test_the_one_that_was_silent_longest_goes(tmp_path: Path) -> None:
    """Not more than some may say nothing, so that a crowd of them does not use up what the daemon has."""
    path = tmp_path / "f0.sock"
    async with serving(function(tmp_path)), AsyncExitStack() as stack:
        silent = [await connect(path) for _ in range(20)]
        for client in silent:
            stack.callback(client.close)
        with pytest.raises(EOFError):
            await silent[0].receive()
        async with attached(path) as client:
            assert MAGIC == await client.read32(0, 0)


async def test_one_deadline_for_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for the client before and the one for the device share the time that VERSION is answered in."""
    path = tmp_path / "f0.sock"
    async with slow_upstream(tmp_path, BUDGET_S):
        async with trio.open_nursery() as nursery, attached(path):
            monkeypatch.setitem(slowupstream.HANDLERS, Command.DEVICE_GET_INFO, lambda _: Answer(raw=b""))
            client = await connect(path)
            started = trio.current_time()
            answer: list[int] = []

            async def negotiate() -> None:
                answer.append((await client.negotiate()).error)

            nursery.start_soon(negotiate)
            await trio.sleep(STAY_S)
        # In a row they had been STAY_S + BUDGET_S.
        assert trio.current_time() - started < BUDGET_S + STAY_S / 2
        assert [errno.ENODEV] == answer
        client.close()


#: Headers that end the connection.
FATAL = {
    "shorter than a header": struct.pack("<HHIII", 7, REGION_READ, 8, 0, 0),
    "too large": struct.pack("<HHIII", 7, REGION_READ, 1 << 31, 0, 0),
}


@pytest.mark.parametrize("name", FATAL)
async def test_the_last_reply_comes_last(tmp_path: Path, name: str) -> None:
    """The reply to a message that ends the connection stands behind that to a slow command before it."""
    async with slow_upstream(tmp_path, BUDGET_S), attached(tmp_path / "f0.sock") as client:
        await client.send(client.pack(RESET, msg_id=5) + FATAL[name])
        first, last = await client.receive(), await client.receive()
        assert [(5, errno.ETIMEDOUT), (7, errno.EINVAL)] == [(each.msg_id, each.error) for each in (first, last)]
        with pytest.raises(EOFError):
            await client.receive()


async def storm(path: Path, times: int) -> None:
    """Reconnect and send nonsense each time."""
    for _ in range(times):
        async with attached(path) as client:
            await client.send(client.pack(99))
            await client.receive()


async def test_reconnecting_does_not_fill_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What clients can provoke is limited per function, however many of them do it."""
    async with serving(function(tmp_path)):
        caplog.clear()
        with caplog.at_level("INFO", logger="vfiouser_oob"):
            await storm(tmp_path / "f0.sock", 200)
        assert len(caplog.records) < 60


async def test_a_lost_upstream_is_no_bug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A command under way when the other server goes fails with EIO, and nobody calls that a bug of ours."""
    async with slow_upstream(tmp_path, BUDGET_S) as servers, attached(tmp_path / "f0.sock") as client:
        await client.send(client.pack(RESET))
        await trio.testing.wait_all_tasks_blocked()
        servers[-1].close()
        assert errno.EIO == (await client.receive()).error
    assert not [record for record in caplog.records if "bug" in record.getMessage()]
