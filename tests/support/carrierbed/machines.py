"""Two QEMUs without a guest, and what moves one into the other: `migrate`, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from vmbed.assets import Assets
from vmbed.qemu import Qemu, QemuConfig, start_qemu

__all__ = ["begin", "machine", "outcome", "pause_before_switchover", "status"]

MEMORY_MIB = 32
FINAL = frozenset({"completed", "failed", "cancelled"})


@asynccontextmanager
async def machine(
    assets: Assets, workdir: Path, name: str, arguments: Sequence[str], *, incoming: bool = False
) -> AsyncIterator[Qemu]:
    """Start a QEMU whose CPU stands still.

    Args:
        assets: where QEMU is.
        workdir: for sockets and logs.
        name: prefix of its files.
        arguments: its carrier's.
        incoming: whether it waits to be migrated to.
    """
    extra = [*arguments, *(("-incoming", "defer") if incoming else ())]
    config = QemuConfig([], accel="qtest", memory_mib=MEMORY_MIB, cpus=1, trace=(), extra=extra)
    async with start_qemu(assets, config, workdir, name=name) as qemu:
        switches = [{"capability": "events", "state": True}, {"capability": "return-path", "state": True}]
        await qemu.qmp.execute("migrate-set-capabilities", capabilities=switches)
        yield qemu


async def begin(source: Qemu, destination: Qemu, workdir: Path) -> None:
    """Begin to migrate one machine into the other."""
    await destination.qmp.execute("migrate-incoming", uri=f"unix:{workdir / 'stream'}")
    await source.qmp.execute("migrate-set-parameters", max_bandwidth=10 << 30)
    await source.qmp.execute("migrate", uri=f"unix:{workdir / 'stream'}")


async def pause_before_switchover(qemu: Qemu, wanted: bool) -> None:
    """Let a source stop in `pre-switchover`, or not."""
    switch = {"capability": "pause-before-switchover", "state": wanted}
    await qemu.qmp.execute("migrate-set-capabilities", capabilities=[switch])


async def status(qemu: Qemu, *wanted: str, seconds: float = 60.0) -> str:
    """Wait until a machine's migration is in one of some states; returns which."""
    while (now := (await qemu.qmp.event("MIGRATION", seconds))["data"]["status"]) not in wanted:
        pass
    return str(now)


async def outcome(qemu: Qemu) -> str:
    """Wait until a machine's migration is over; returns how it ended."""
    return await status(qemu, *FINAL)
