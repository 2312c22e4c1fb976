"""What a migration is made of: where one part of it is left out, just what it is for goes wrong.

The guest is played over qtest, so what goes wrong does not depend on what a kernel does then.
"""

from __future__ import annotations

from collections.abc import Set
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from vmbed.assets import Assets
from vmbed.firmware import MESSAGE, MESSAGES, set_up, turn_ecam_on
from vmbed.hosts import SLOT, Host, HostConfig, finished, host, make_disk, migrate
from vmbed.nvme import PAGE, NvmeDriver, until
from vmbed.omissions import SAVED_EARLY
from vmbed.pci import PciFunction
from vmbed.qemu import Qemu

pytestmark = [pytest.mark.vm, pytest.mark.slow]
VECTOR = 1
#: Bytes per second at which 128 MiB of zeros take half a minute, and pages of the guest that are sent by then.
SLOWLY, SENT = 10_000, 1200
WORDS = bytes(range(256)) * (PAGE // 256)


async def sent(qemu: Qemu) -> None:
    """Wait until QEMU has sent the beginning of the memory."""

    async def enough() -> bool:
        ram = (await qemu.qmp.execute("query-migrate")).get("ram", {})
        return int(ram.get("duplicate", 0)) + int(ram.get("normal", 0)) >= SENT

    await until("beginning of the guest's memory in the stream", enough)


async def saved_early(source: Host) -> bool:
    """Whether a daemon without stop has taken the state."""
    return SAVED_EARLY in await trio.Path(source.daemon.log).read_text()


async def found(driver: NvmeDriver, version: int, page: int, qemu: Qemu) -> Set[str]:
    """What of the function has come along."""
    parts = set()
    if await qemu.qtest.read(page, PAGE) == WORDS:
        parts.add("memory")
    if await driver.version() == version:
        parts.add("registers")
        if await driver.ready():
            parts.add("state")
    return parts


@pytest.mark.parametrize(
    ("omits", "missed"),
    [("", set()), ("journal", {"memory"}), ("replay", {"registers", "state"}), ("stop", {"state"})],
)
async def test_what_is_left_out_is_missed(assets: Assets, workdir: Path, omits: str, missed: Set[str]) -> None:
    """The guest sets its controller up, and reads from it, while its VM moves."""
    disk = make_disk(workdir)
    with disk.open("r+b") as file:
        file.write(WORDS)
    config = HostConfig(omits=omits, accel="qtest")
    async with AsyncExitStack() as stack:
        a, b = [await stack.enter_async_context(host(workdir, name, disk, config)) for name in "ab"]
        source = await stack.enter_async_context(a.machine(assets))
        await turn_ecam_on(source.qtest)
        function = PciFunction(source.qtest, SLOT)
        await set_up(function, VECTOR)
        driver = NvmeDriver(function)
        version = await driver.version()
        await a.phase("running")
        destination = await stack.enter_async_context(b.machine(assets, incoming=("-incoming", "defer", "-S")))
        await b.phase("incoming")
        await migrate(source, destination, workdir / "stream", bandwidth=SLOWLY)
        await a.phase("armed")
        await sent(source)
        if omits == "stop":
            await until("state that is taken too early", lambda: saved_early(a))
        await driver.enable()
        await driver.create_io_queues(VECTOR)
        page = driver.allocate() + PAGE  # the next one that it takes
        assert await driver.read_blocks(0, PAGE) == WORDS
        await source.qmp.execute("migrate-set-parameters", max_bandwidth=1 << 30)
        assert [await finished(source), await finished(destination)] == ["completed", "completed"]
        await destination.qmp.execute("cont")
        await b.phase("running")
        moved = PciFunction(destination.qtest, SLOT)
        moved.addresses = function.addresses
        driver.move_to(moved)
        assert {"memory", "registers", "state"} - await found(driver, version, page, destination) == missed
        if not omits:
            await destination.qtest.store(MESSAGES, 0)
            assert await driver.read_blocks(0, PAGE) == WORDS

            async def arrived() -> bool:
                return await destination.qtest.load(MESSAGES) == MESSAGE

            await until("the interrupt of a command", arrived)
