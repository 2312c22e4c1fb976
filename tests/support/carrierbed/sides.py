"""The carriers of a migration's two sides, each with its hand, as two daemons would have them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from carrierbed.hand import Hand
from carrierbed.machines import machine
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_oob.vm.carriers.dbus_vmstate import DbusVmstate, vmstate_object
from vfiouser_oob.vm.carriers.interface import VmCarrier
from vfiouser_oob.vm.carriers.vhost_user_fs import VhostUserFs, companion_arguments
from vmbed.assets import Assets
from vmbed.qemu import Qemu

__all__ = ["KINDS", "Kind", "Side", "two_machines", "two_sides"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A carrier, and what QEMU is told about it.

    Attributes:
        make: a carrier that listens at a path.
        arguments: QEMU's.
        says_why: whether QEMU prints a refusal's reason.
    """

    make: Callable[[Path], VmCarrier]
    arguments: Callable[[Path], Sequence[str]]
    says_why: bool


KINDS = {
    "dbus-vmstate": Kind(
        lambda path: DbusVmstate(listen_on_path(path), path),
        lambda path: ("-object", json.dumps(vmstate_object(path, "oobvmstate"))),
        True,
    ),
    "vhost-user-fs": Kind(
        lambda path: VhostUserFs(listen_on_path(path), path), lambda path: companion_arguments(path, addr="0x10"), False
    ),
}


class Side:
    """A carrier with its hand, which can be stopped and started as a daemon can."""

    def __init__(self, kind: Kind, nursery: trio.Nursery, path: Path) -> None:
        self.kind = kind
        self.path = path
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self.hand: Hand

    @property
    def arguments(self) -> Sequence[str]:
        """What its QEMU is told."""
        return self.kind.arguments(self.path)

    async def start(self, state: bytes = b"") -> None:
        """Begin to listen."""
        carrier = self.kind.make(self.path)
        self.hand = Hand(carrier, state)
        self._scope = trio.CancelScope()

        async def life(task_status: trio.TaskStatus[None]) -> None:
            with self._scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(self.hand.run)
                    await carrier.run(task_status=task_status)

        await self._nursery.start(life)

    def stop(self) -> None:
        """End."""
        self._scope.cancel()


@asynccontextmanager
async def two_sides(
    kind: Kind, workdir: Path, state: bytes = b"", most_bytes: int = 16 << 20
) -> AsyncIterator[tuple[Side, Side]]:
    """A source, and a destination that expects a state."""
    async with trio.open_nursery() as nursery:
        source, destination = Side(kind, nursery, workdir / "a.oob"), Side(kind, nursery, workdir / "b.oob")
        await source.start(state)
        await destination.start()
        destination.hand.carrier.expect(most_bytes)
        yield source, destination
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def two_machines(
    assets: Assets, workdir: Path, source: Side, destination: Side
) -> AsyncIterator[tuple[Qemu, Qemu]]:
    """Their QEMUs."""
    async with (
        machine(assets, workdir, "a", source.arguments) as a,
        machine(assets, workdir, "b", destination.arguments, incoming=True) as b,
    ):
        yield a, b
