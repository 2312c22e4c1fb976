"""What `snippet` prints for a VM, and what a QEMU that was started with it is to meet."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from carrierbed.sides import KINDS, Side
from libvirtbed.domain import NAME
from vfiouser_oob.cli.main import main
from vfiouser_oob.vm.carriers.interface import QemuAttached
from vmbed.lines import LineListener
from vmbed.processes import LoggedProcess, deadline

__all__ = ["awaited", "met", "printed"]

START_S = 60.0


def printed(capsys: pytest.CaptureFixture[str], workdir: Path, sockets: Path, carrier: str, *arguments: str) -> str:
    """What `snippet` prints for a VM whose sockets are in a folder."""
    config = workdir / "config.toml"
    config.write_text(
        f'[[vm]]\nname = "{NAME}"\nfunctions = ["f0"]\ncarrier = "{carrier}"\nmonitor = "{sockets}/monitor"\n'
        f'{carrier.replace("-", "_")} = "{sockets}/carrier"\n'
        f'[[function]]\nname = "f0"\nsocket = "{sockets}/vmm.sock"\ndevice = {{ kind = "model", model = "nvme" }}\n'
    )
    capsys.readouterr()
    assert main(["snippet", *arguments, NAME, "--config", str(config), "--memory", "64M"]) == 0
    return capsys.readouterr().out


@asynccontextmanager
async def awaited(sockets: Path, carrier: str) -> AsyncIterator[tuple[LineListener, Side]]:
    """What such a QEMU connects to, beside the function: a monitor's listener and a carrier."""
    async with trio.open_nursery() as nursery, LineListener(sockets / "monitor") as monitor:
        side = Side(KINDS[carrier], nursery, sockets / "carrier")
        await side.start()
        yield monitor, side
        nursery.cancel_scope.cancel()


async def met(monitor: LineListener, side: Side, process: LoggedProcess) -> None:
    """Wait until a QEMU has greeted by the monitor and opened the carrier."""
    with deadline(START_S, "greeting of QEMU's monitor", process.log):
        greeting = json.loads(await (await monitor.accept(process)).receive())
    assert greeting["QMP"]["version"]["qemu"]["major"] >= 11
    await side.hand.until(QemuAttached)
