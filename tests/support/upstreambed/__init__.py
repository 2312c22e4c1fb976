"""An upstream vfio-user server that a test writes, for functions with the `vfio-user` backend.

It is a correct, dull device of nine regions of one page, unless a test's handlers answer otherwise.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from fakeserver import OFFER, Answer, FakeServer, Handler
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command, DeviceInfoFlags, RegionFlags
from vfiouser_protocol.messages import DeviceInfo, IrqInfo, RegionInfo
from vfiouser_protocol.session import CommandReceived

REGION_SIZE = 4096


def region(event: CommandReceived) -> Answer:
    """Every region is plain memory of one page."""
    index = decode(RegionInfo, event.payload).index
    return Answer(encode(RegionInfo(32, RegionFlags.READ | RegionFlags.WRITE, index, 0, REGION_SIZE, 0)))


def irq(event: CommandReceived) -> Answer:
    """There are no interrupts."""
    return Answer(encode(IrqInfo(16, 0, decode(IrqInfo, event.payload).index, 0)))


def info(event: CommandReceived) -> Answer:
    """A PCI function with nine regions and five kinds of interrupt."""
    return Answer(encode(DeviceInfo(16, DeviceInfoFlags.PCI | DeviceInfoFlags.RESET, 9, 5)))


DULL: Mapping[int, Handler] = {
    Command.DEVICE_GET_INFO: info,
    Command.DEVICE_GET_REGION_INFO: region,
    Command.DEVICE_GET_IRQ_INFO: irq,
}


@asynccontextmanager
async def upstream(
    path: Path, handlers: Mapping[int, Handler] | None = None, *, offer: VersionCapabilities = OFFER
) -> AsyncIterator[list[FakeServer]]:
    """Listen until the block ends; one server per connection is in the list that it gives."""
    servers: list[FakeServer] = []
    listener = listen_on_path(path, 0o600)

    async def accept(nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.sock)
            sock, _ = listener.sock.accept()
            sock.setblocking(False)
            servers.append(FakeServer(sock, offer=offer, handlers={**DULL, **(handlers or {})}))
            await nursery.start(servers[-1].run)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, nursery)
            yield servers
            nursery.cancel_scope.cancel()
    finally:
        listener.close()
