"""What can end a migration before its time: each is done to a VM whose guest works, and leaves it where it was."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import trio

from vmbed.hosts import Host, capability, finished, migrate, shown, status
from vmbed.qemu import Qemu
from vmbed.sever import may_sever, sever

__all__ = ["TROUBLES", "UNSTARTED", "Scene", "Trouble", "is_refused", "possible", "restored"]

SLOWLY = 1 << 16


@dataclass(frozen=True, slots=True)
class Scene:
    """A VM that is to move.

    Args:
        here: the host that it is on.
        there: the host that it should be on.
        qemu: its QEMU here.
        other: the QEMU that waits there.
        stream: the socket that the migration goes through.
    """

    here: Host
    there: Host
    qemu: Qemu
    other: Qemu
    stream: Path

    async def begin(self, *, slowly: bool = False) -> None:
        """Begin the migration."""
        self.stream.unlink(missing_ok=True)
        await migrate(self.qemu, self.other, self.stream, bandwidth=SLOWLY if slowly else 1 << 30)

    async def ended(self, *how: str) -> None:
        """Wait for its end, which has to be one of these."""
        assert await finished(self.qemu) in how


Trouble: TypeAlias = "Callable[[Scene], Awaitable[None]]"


async def cancelled_at_once(scene: Scene) -> None:
    """It is given up before it has begun to send.

    QEMU may then stand still until the destination has gone: it waits for a thread that waits for the destination.
    """
    await scene.begin(slowly=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.qemu.qmp.execute, "migrate_cancel")
        await scene.other.kill()
    await scene.ended("cancelled", "failed")  # whichever QEMU hears of first


async def cancelled_in_precopy(scene: Scene) -> None:
    """It is given up while the guest runs."""
    await scene.begin(slowly=True)
    await status(scene.qemu, "active")
    await scene.qemu.qmp.execute("migrate_cancel")
    await scene.ended("cancelled")


async def cancelled_before_the_switchover(scene: Scene) -> None:
    """It is given up while the vCPUs stand, and the functions with them."""
    await capability(scene.qemu, "pause-before-switchover", True)
    await scene.begin()
    await status(scene.qemu, "pre-switchover")
    await scene.qemu.qmp.execute("migrate_cancel")
    await scene.ended("cancelled")


async def killed_in_precopy(scene: Scene) -> None:
    """The destination's QEMU ends."""
    await scene.begin(slowly=True)
    await status(scene.qemu, "active")
    await scene.other.kill()
    await scene.ended("failed")


async def killed_before_the_switchover(scene: Scene) -> None:
    """The destination's QEMU ends while the vCPUs stand."""
    await capability(scene.qemu, "pause-before-switchover", True)
    await scene.begin()
    await status(scene.qemu, "pre-switchover")
    await scene.other.kill()
    await scene.qemu.qmp.execute("migrate-continue", state="pre-switchover")
    await scene.ended("failed")


async def killed_while_it_loads(scene: Scene) -> None:
    """The destination's QEMU ends while its functions take their state."""
    scene.there.agent.send_signal(signal.SIGSTOP)
    await scene.begin()
    await scene.there.phase("loading")
    await scene.other.kill()
    scene.there.agent.send_signal(signal.SIGCONT)
    await scene.ended("failed")


async def killed_after_the_load(scene: Scene) -> None:
    """The destination's QEMU ends before the VM was started there, so it is started here again."""
    await scene.begin()
    await scene.ended("completed")
    assert await finished(scene.other) == "completed"
    assert await shown(scene.other) == "paused"
    await scene.there.phase("ready")
    assert await scene.here.phase("away") == "away"
    await scene.other.kill()
    await scene.qemu.qmp.execute("cont")


async def carrier_lost_while_it_loads(scene: Scene) -> None:
    """The destination's daemon and its QEMU lose each other while its functions take their state."""
    scene.there.agent.send_signal(signal.SIGSTOP)
    await scene.begin()
    await scene.there.phase("loading")
    sever(scene.other.process.pid, scene.there.carrier_socket)
    scene.there.agent.send_signal(signal.SIGCONT)
    await scene.ended("failed")


async def carrier_lost_while_it_saves(scene: Scene) -> None:
    """The source's daemon and its QEMU lose each other while the functions are to give their state."""
    await capability(scene.qemu, "pause-before-switchover", True)
    await scene.begin()
    await status(scene.qemu, "pre-switchover")
    await scene.here.phase("stopped")
    scene.here.agent.send_signal(signal.SIGSTOP)
    await scene.qemu.qmp.execute("migrate-continue", state="pre-switchover")
    await scene.here.phase("saving")
    sever(scene.qemu.process.pid, scene.here.carrier_socket)
    scene.here.agent.send_signal(signal.SIGCONT)
    await scene.ended("failed")


async def monitor_lost_in_precopy(scene: Scene) -> None:
    """Each daemon and its QEMU lose each other's monitor, and the migration is given up meanwhile."""
    await scene.begin(slowly=True)
    await scene.here.phase("armed")
    sever(scene.other.process.pid, scene.there.folder / "monitor")
    sever(scene.qemu.process.pid, scene.here.folder / "monitor")
    await scene.qemu.qmp.execute("migrate_cancel")
    await scene.ended("cancelled")


async def monitor_lost_before_the_switchover(scene: Scene) -> None:
    """The source's is lost while the vCPUs stand, and the migration is given up meanwhile."""
    await capability(scene.qemu, "pause-before-switchover", True)
    await scene.begin()
    await status(scene.qemu, "pre-switchover")
    await scene.here.phase("stopped")
    sever(scene.qemu.process.pid, scene.here.folder / "monitor")
    await scene.qemu.qmp.execute("migrate_cancel")
    await scene.ended("cancelled")


async def without_return_path(scene: Scene) -> None:
    """It is refused: the VM might be lost."""
    await capability(scene.qemu, "return-path", False)
    await scene.begin(slowly=True)
    await scene.ended("cancelled")


async def is_refused(scene: Scene) -> None:
    """The destination is the wrong one."""
    await scene.begin()
    await scene.ended("failed")


#: All of them that need two QEMUs that could migrate.
TROUBLES: Sequence[Trouble] = (
    cancelled_at_once,
    cancelled_in_precopy,
    cancelled_before_the_switchover,
    killed_in_precopy,
    killed_before_the_switchover,
    killed_while_it_loads,
    killed_after_the_load,
    carrier_lost_while_it_loads,
    carrier_lost_while_it_saves,
    monitor_lost_in_precopy,
    monitor_lost_before_the_switchover,
    without_return_path,
)
#: Those that leave a destination which would have started the VM by itself, without -S, no time to do so.
UNSTARTED: Sequence[Trouble] = tuple(each for each in TROUBLES if each is not killed_after_the_load)


_SEVERING = frozenset(
    {
        carrier_lost_while_it_loads,
        carrier_lost_while_it_saves,
        monitor_lost_in_precopy,
        monitor_lost_before_the_switchover,
    }
)


def possible(troubles: Sequence[Trouble]) -> Sequence[Trouble]:
    """Those that can be made on this machine."""
    able = may_sever()
    return [each for each in troubles if able or each not in _SEVERING]


async def restored(qemu: Qemu) -> None:
    """Switch back what troubles have switched."""
    await capability(qemu, "pause-before-switchover", False)
    await capability(qemu, "return-path", True)
