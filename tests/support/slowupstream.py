"""A daemon whose one function is another vfio-user server, which answers everything but a reset."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from daemonkit import function, serving
from fakeserver import Answer, FakeServer, Handler
from vfiouser_oob.config.schema import UpstreamDevice
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command, DeviceInfoFlags, RegionFlags
from vfiouser_protocol.messages import DeviceInfo, IrqInfo, RegionInfo
from vfiouser_protocol.session import CommandReceived


def region(event: CommandReceived) -> Answer:
    """Every region is plain memory of one page."""
    index = decode(RegionInfo, event.payload).index
    return Answer(encode(RegionInfo(32, RegionFlags.READ | RegionFlags.WRITE, index, 0, 4096, 0)))


def irq(event: CommandReceived) -> Answer:
    """There are no interrupts."""
    return Answer(encode(IrqInfo(16, 0, decode(IrqInfo, event.payload).index, 0)))


HANDLERS: dict[int, Handler] = {
    Command.DEVICE_GET_INFO: lambda _: Answer(
        encode(DeviceInfo(16, DeviceInfoFlags.PCI | DeviceInfoFlags.RESET, 9, 5))
    ),
    Command.DEVICE_GET_REGION_INFO: region,
    Command.DEVICE_GET_IRQ_INFO: irq,
    # Never answered, while everything else is.
    Command.DEVICE_RESET: lambda _: Answer(raw=b""),
}


@asynccontextmanager
async def slow_upstream(directory: Path, reply_budget_s: float) -> AsyncIterator[list[FakeServer]]:
    """Run both; the function is `f0.sock` in a directory.

    Yields:
        The upstream server's connections, the latest last. Their `handlers` may be changed, and those of
        connections to come are in `HANDLERS`.
    """
    path = directory / "up.sock"
    servers: list[FakeServer] = []
    listener = listen_on_path(path, 0o600)

    async def accept(nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.sock)
            sock, _ = listener.sock.accept()
            sock.setblocking(False)
            servers.append(FakeServer(sock, handlers=dict(HANDLERS)))
            await nursery.start(servers[-1].run)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept, nursery)
        # Else it would be reset for its client, before anything else.
        config = replace(function(directory, "f0", UpstreamDevice(socket=path)), retain_state=True)
        async with serving(config, reply_budget_s=reply_budget_s):
            yield servers
        nursery.cancel_scope.cancel()
    listener.close()
