"""Drives the device of `examples/device-model` as a VMM and its guest would: registers, DMA and an interrupt."""

import os
import struct
import sys
import zlib
from contextlib import closing

import trio

from vfiouser_oob.client import CONFIG, Client, ClientMemory, DmaMapFlags, IrqIndex, OwnedFd, ReplyError

BASE = 0x10_0000  # where the guest's memory is, in the device's eyes


async def checksum(path: str, data: bytes) -> int:
    """Let the device behind the socket compute the CRC-32 of some bytes."""
    with ClientMemory(64 << 10, base=BASE) as memory, trio.fail_after(10):
        async with Client.connect(path, dma_server=memory) as client:
            info = await client.get_info()
            print(f"{info.num_regions} regions, {info.num_irqs} kinds of interrupts")
            region = await client.get_region_info(0)
            print(f"BAR0 has {region.description.size} bytes, {'mapped' if region.fd else 'by messages'}")
            region.close()

            await memory.map(client, flags=DmaMapFlags.READ | DmaMapFlags.WRITE)
            await client.region_write(CONFIG, 4, b"\x06\x00")  # memory decoding and bus mastering on
            memory.store(BASE, data)

            with closing(OwnedFd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))) as interrupt:
                await client.set_eventfds(IrqIndex.MSIX, [interrupt])
                await client.region_write(0, 0x00, struct.pack("<Q", BASE))
                await client.region_write(0, 0x08, struct.pack("<I", len(data)))
                await client.region_write(0, 0x0C, struct.pack("<I", 1))
                await trio.lowlevel.wait_readable(interrupt.fileno())
            status, result = struct.unpack("<II", await client.region_read(0, 0x10, 8))
            assert status == 2, f"the device reports status {status}"
            return int(result)


async def main(path: str) -> None:
    """Compare the device's answer with zlib's."""
    data = bytes(range(256)) * 16
    print(f"checksum {await checksum(path, data):#010x}, expected {zlib.crc32(data):#010x}")
    async with Client.connect(path) as client:
        try:
            await client.region_read(0, 0x1000, 4)
        except ReplyError as error:
            print(f"beyond the BAR: {os.strerror(error.errno)}")


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
