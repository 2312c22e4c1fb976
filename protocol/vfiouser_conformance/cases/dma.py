"""DMA of a device that can be made to do it: through mapped memory, by messages, and where it must not."""

from __future__ import annotations

import os
import struct

from vfiouser_conformance import wire
from vfiouser_conformance.case import Area, CaseEffect, CaseFailed, Level, NotApplicable, check, same
from vfiouser_conformance.cases.dma_map import BASE, MAP, unmap
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.memory import ServedMemory
from vfiouser_conformance.stimulus.base import Stimulus
from vfiouser_conformance.trial import Trial
from vfiouser_conformance.wire import Received
from vfiouser_protocol.constants import Command

AREA = Area("DMA", "DMA", CaseEffect.DEVICE)
MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
SIZE = 0x40000
_PAGE = wire.PAGE
#: Bytes of a transfer whose size does not matter.
SMALL = 4096


def pattern(count: int, seed: int = 1) -> bytes:
    """Bytes that differ from place to place."""
    block = bytes((seed + n * 7 + (n >> 8) * 13) & 0xFF for n in range(4096))
    return (block * (count // 4096 + 1))[:count]


def ready(t: Trial, link: RawLink) -> Stimulus:
    """The device, brought up on a connection."""
    t.stimulus.prepare(link)
    return t.stimulus


def into_device(link: RawLink, device: Stimulus, address: int, count: int) -> bytes:
    """Make the device read client memory; returns what it got."""
    device.start_read(link, address, count)
    same(0, device.finish(link), f"error of a DMA read of {count} bytes at {address:#x}")
    return device.taken(link, count)


def out_of_device(link: RawLink, device: Stimulus, address: int, data: bytes) -> None:
    """Make the device write to client memory."""
    device.load(link, data)
    device.start_write(link, address, len(data))
    same(0, device.finish(link), f"error of a DMA write of {len(data)} bytes at {address:#x}")


def by_messages(t: Trial, link: RawLink, size: int = SIZE, flags: int = 3, seed: int = 1) -> ServedMemory:
    """Map memory without a descriptor and serve it."""
    largest = getattr(link, "largest", wire.DEFAULT_TRANSFER)
    memory = ServedMemory(BASE, pattern(size, seed), largest, writable=bool(flags & 2))
    link.on_command = memory
    link.ok(MAP, wire.dma_map(BASE, size, 0, flags))
    return memory


@AREA.case(1, MUST, "R159")
def through_a_file(t: Trial) -> None:
    """Device and client see the same memory of a mapped file.

    Sends: DMA_MAP of a file; a DMA read and a DMA write of the device.
    Expects: the device reads what the client wrote, and the client sees what the device wrote; no messages.
    """
    link = t.attach()
    device = ready(t, link)
    fd = t.memfd(SIZE)
    view = t.map(fd, SIZE)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [fd])
    data = pattern(SMALL)
    view[0x3000 : 0x3000 + SMALL] = data
    same(data, into_device(link, device, BASE + 0x3000, SMALL), "what the device read")
    out_of_device(link, device, BASE + 0x5000, pattern(SMALL, 5))
    same(pattern(SMALL, 5), view[0x5000 : 0x5000 + SMALL], "what the device wrote")
    t.saw("DMA to memory with a descriptor", "by messages" if link.commands else "in the file",
          recommended=not link.commands)  # fmt: skip


@AREA.case(2, MUST, "R160")
def offset_of_a_file(t: Trial) -> None:
    """DMA goes to the place in the file that the map says.

    Sends: DMA_MAP of a file from offset 0x100000 on; DMA both ways.
    Expects: the bytes at that offset of the file.
    """
    link = t.attach()
    device = ready(t, link)
    fd = t.memfd(0x200000)
    os.pwrite(fd, pattern(SMALL, 9), 0x101000)
    link.ok(MAP, wire.dma_map(BASE, SIZE, 0x100000), [fd])
    same(pattern(SMALL, 9), into_device(link, device, BASE + 0x1000, SMALL), "what the device read")
    out_of_device(link, device, BASE + 0x2000, pattern(SMALL, 3))
    same(pattern(SMALL, 3), os.pread(fd, SMALL, 0x102000), "the file after the device's write")


@AREA.case(3, MUST, "R370 R371")
def read_by_messages(t: Trial) -> None:
    """Memory without a descriptor is read by DMA_READ.

    Sends: DMA_MAP without a descriptor; the device reads.
    Expects: DMA_READ commands with 16 bytes, address and count as u64; the data of the replies reach the device.
    """
    link = t.attach()
    device = ready(t, link)
    memory = by_messages(t, link)
    same(pattern(SIZE)[0x1000 : 0x1000 + SMALL], into_device(link, device, BASE + 0x1000, SMALL), "what it read")
    check(memory.served, "the device read, but no DMA_READ came")
    same(SMALL, sum(count for _, _, count in memory.served), "bytes that were asked for")


@AREA.case(4, MUST, "R372")
def write_by_messages(t: Trial) -> None:
    """Memory without a descriptor is written by DMA_WRITE.

    Sends: DMA_MAP without a descriptor; the device writes.
    Expects: DMA_WRITE commands with the data at byte 16; a reply of 16 bytes is taken.
    """
    link = t.attach()
    device = ready(t, link)
    memory = by_messages(t, link)
    out_of_device(link, device, BASE + 0x2000, pattern(SMALL, 4))
    same(pattern(SMALL, 4), bytes(memory.data[0x2000 : 0x2000 + SMALL]), "what the device wrote")


@AREA.case(5, MUST, "R373")
def error_reply(t: Trial) -> None:
    """An error reply is a DMA that failed, and nothing worse.

    Sends: error ENODEV to the DMA_READ, and to the DMA_WRITE, of the device.
    Expects: the device reports an error; afterwards DMA works.
    """
    link = t.attach()
    device = ready(t, link)
    memory = by_messages(t, link)
    memory.spoil = lambda message, reply: wire.pack(
        message.command, msg_id=message.msg_id, flags=wire.REPLY | wire.ERROR, error=19
    )
    for start in (device.start_read, device.start_write):
        start(link, BASE, SMALL)
        check(device.finish(link), "the device reports success although the client sent an error")
    memory.spoil = lambda message, reply: reply
    into_device(link, device, BASE, SMALL)


@AREA.case(6, SHOULD, "R374")
def replies_that_do_not_fit(t: Trial) -> None:
    """A reply that does not fit its command is no success.

    Sends: to DMA_READ: a reply with another address, with fewer data, with a larger count.
    Expects: the device reports an error, or the connection ends; the next client is served.
    """
    spoilers = (
        lambda message, reply: ServedMemory.success(message, struct.pack("<QQ", BASE + 0x77000, SMALL) + reply[32:]),
        lambda message, reply: ServedMemory.success(message, reply[16:48]),
        lambda message, reply: ServedMemory.success(message, struct.pack("<QQ", BASE, 1 << 40) + reply[32:]),
    )
    for spoil in spoilers:
        link = t.attach()
        device = ready(t, link)
        by_messages(t, link).spoil = spoil
        device.start_read(link, BASE, SMALL)
        try:
            check(device.finish(link), "the device reports success although the reply did not fit")
        except CaseFailed as failure:
            if "closed the connection" not in str(failure) and "reset the connection" not in str(failure):
                raise
        t.drop(link)
    t.attach().alive()


@AREA.case(7, MUST, "R071 R375")
def client_limit(t: Trial) -> None:
    """DMA messages are not larger than the client's max_data_xfer_size.

    Sends: VERSION with max_data_xfer_size 4096; the device moves 64 KiB both ways.
    Expects: messages of at most 4096 bytes, in ascending order, that add up.
    """
    link = t.attach_with({"max_msg_fds": 8, "max_data_xfer_size": 4096})
    device = ready(t, link)
    count = min(0x10000, device.largest)
    memory = ServedMemory(BASE, pattern(SIZE), 4096)
    link.on_command = memory
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    same(pattern(SIZE)[:count], into_device(link, device, BASE, count), "what the device read")
    _ascending(memory, count)
    memory.served.clear()
    out_of_device(link, device, BASE, pattern(count, 8))
    same(pattern(count, 8), bytes(memory.data[:count]), "what the device wrote")
    _ascending(memory, count)


def _ascending(memory: ServedMemory, count: int) -> None:
    addresses = [address for _, address, _ in memory.served]
    same(sorted(addresses), addresses, "addresses of the DMA messages")
    same(count, sum(size for _, _, size in memory.served), "bytes of the DMA messages")


@AREA.case(8, COMPAT, "R375", compat="libvfio-user's sample client")
def tiny_limit(t: Trial) -> None:
    """A client that takes 1024 bytes at a time gets 1024 at a time.

    Sends: VERSION 0.2 as libvfio-user's sample client sends it; the device reads 4096 bytes.
    Expects: messages of at most 1024 bytes.
    """
    link = t.attach_with({"max_msg_fds": 32, "max_data_xfer_size": 1024}, minor=2)
    device = ready(t, link)
    memory = ServedMemory(BASE, pattern(SIZE), 1024)
    link.on_command = memory
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    same(pattern(SIZE)[:SMALL], into_device(link, device, BASE, SMALL), "what the device read")


@AREA.case(10, MUST, "R377")
def twin_socket(t: Trial) -> None:
    """With a twin socket the server's commands go there, and only there.

    Sends: VERSION that asks for a twin socket; the device moves data both ways.
    Expects: DMA commands on the twin; on the main socket replies only.
    """
    link = t.attach_with({"max_msg_fds": 8, "twin_socket": {"supported": True}}, twin=True)
    device = ready(t, link)
    memory = by_messages(t, link)
    same(pattern(SIZE)[:SMALL], into_device(link, device, BASE, SMALL), "what the device read")
    out_of_device(link, device, BASE, pattern(SMALL, 6))
    same(pattern(SMALL, 6), bytes(memory.data[:SMALL]), "what the device wrote")
    check(not link.commands, "a DMA command came on the main socket")


@AREA.case(11, MUST, "R378")
def unmapped(t: Trial) -> None:
    """DMA to what is not mapped fails without a message.

    Sends: the device reads and writes outside all maps, and across the end of one.
    Expects: the device reports errors; no DMA message comes for what is not mapped.
    """
    link = t.attach()
    device = ready(t, link)
    memory = by_messages(t, link)
    for address in (BASE + 4 * SIZE, BASE + SIZE - SMALL // 2 // device.granule * device.granule):
        for start in (device.start_read, device.start_write):
            start(link, address, SMALL)
            check(device.finish(link), f"a DMA of {SMALL} bytes at {address:#x} succeeded, which is not mapped")
    beyond = [address for _, address, count in memory.served if address + count > BASE + SIZE]
    check(not beyond, f"DMA messages for what is not mapped: {[hex(address) for address in beyond]}")


@AREA.case(12, MUST, "R157 R378")
def read_only_map(t: Trial) -> None:
    """What is mapped for reading is not written.

    Sends: DMA_MAP with READ only, of a file and without one; the device writes, then reads.
    Expects: the writes fail, without a message and without a change; the reads work.
    """
    link = t.attach()
    device = ready(t, link)
    fd = t.memfd(SIZE, content=pattern(SIZE, 2))
    link.ok(MAP, wire.dma_map(BASE + 2 * SIZE, SIZE, 0, 1), [fd])
    memory = by_messages(t, link, flags=1)
    for address in (BASE, BASE + 2 * SIZE):
        device.start_write(link, address, SMALL)
        check(device.finish(link), f"a DMA write at {address:#x} succeeded, which is mapped for reading")
    same(pattern(SIZE, 2), os.pread(fd, SIZE, 0), "the read-only file")
    check(not memory.served, "a DMA_WRITE came for what is mapped for reading")
    same(pattern(SMALL, 2), into_device(link, device, BASE + 2 * SIZE, SMALL), "what the device read")


@AREA.case(13, MUST, "R168")
def after_unmap(t: Trial) -> None:
    """After DMA_UNMAP the device cannot reach the memory.

    Sends: DMA_MAP of a file, DMA_UNMAP; the device reads and writes there.
    Expects: errors; the file is as before.
    """
    link = t.attach()
    device = ready(t, link)
    fd = t.memfd(SIZE, content=pattern(SIZE, 3))
    link.ok(MAP, wire.dma_map(BASE, SIZE), [fd])
    into_device(link, device, BASE, SMALL)
    unmap(link, BASE, SIZE)
    for start in (device.start_read, device.start_write):
        start(link, BASE, SMALL)
        check(device.finish(link), "a DMA succeeded after DMA_UNMAP")
    same(pattern(SIZE, 3), os.pread(fd, SIZE, 0), "the file after DMA_UNMAP")


@AREA.case(16, COMPAT, "R380", compat="QEMU's v1 forks")
def bare_write_reply(t: Trial) -> None:
    """A DMA_WRITE may be answered by a header alone.

    Sends: 16 bytes in reply to DMA_WRITE.
    Expects: the device reports success.
    """
    link = t.attach()
    device = ready(t, link)
    by_messages(t, link).spoil = lambda message, reply: (
        ServedMemory.success(message, b"") if message.command == Command.DMA_WRITE else reply
    )
    device.start_write(link, BASE, SMALL)
    same(0, device.finish(link), "error of the DMA write")


@AREA.case(17, MUST, "R159")
def across_maps(t: Trial) -> None:
    """One DMA may reach over maps that lie side by side, with and without a file.

    Sends: DMA_MAP of a file, and without one right behind it; the device moves data across the border.
    Expects: success, each part in its place.
    """
    link = t.attach()
    device = ready(t, link)
    fd = t.memfd(SIZE, content=pattern(SIZE, 7))
    memory = ServedMemory(BASE + SIZE, pattern(SIZE, 8))
    link.on_command = memory
    link.ok(MAP, wire.dma_map(BASE, SIZE), [fd])
    link.ok(MAP, wire.dma_map(BASE + SIZE, SIZE))
    count = 2 * SMALL
    got = into_device(link, device, BASE + SIZE - SMALL, count)
    same(pattern(SIZE, 7)[-SMALL:] + pattern(SIZE, 8)[:SMALL], got, "what the device read")
    out_of_device(link, device, BASE + SIZE - SMALL, pattern(count, 9))
    same(pattern(count, 9)[:SMALL], os.pread(fd, SMALL, SIZE - SMALL), "the end of the file")
    same(pattern(count, 9)[SMALL:], bytes(memory.data[:SMALL]), "the begin of the memory behind it")


@AREA.case(18, SHOULD, "R154")
def file_cut_short(t: Trial) -> None:
    """A file that the client cuts short does not kill the server.

    Sends: DMA_MAP of a file that is cut to nothing afterwards; the device reads and writes there.
    Expects: any outcome of the DMA, and a server that lives.
    """
    link = t.attach()
    device = ready(t, link)
    fd = t.memfd(SIZE)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [fd])
    os.ftruncate(fd, 0)
    for start in (device.start_read, device.start_write):
        start(link, BASE, SMALL)
        device.finish(link)
    link.alive()


@AREA.case(19, COMPAT, "R376", compat="QEMU 11")
def quiet_client(t: Trial) -> None:
    """No answer to a region access waits for DMA: some clients serve DMA only while no access of theirs is outstanding.

    Sends: DMA_MAP without a descriptor; accesses that start DMA and look for its end; a DMA command that comes while an
    access is outstanding is answered only after the access was.
    Expects: every access is answered in time; the DMA ends well.
    """
    link = t.attach()
    device = ready(t, link)
    memory = ServedMemory(BASE, pattern(SIZE))
    waiting: list[tuple[RawLink, Received]] = []
    link.on_command = lambda at, message: waiting.append((at, message))
    link.ok(MAP, wire.dma_map(BASE, SIZE))
    call = link.call

    def serving(*args: object, **kwargs: object) -> Received:
        reply = call(*args, **kwargs)  # type: ignore[arg-type]
        while waiting:
            memory(*waiting.pop(0))
        return reply

    link.call = serving  # type: ignore[method-assign]
    same(pattern(SIZE)[:SMALL], into_device(link, device, BASE, SMALL), "what the device read")
    out_of_device(link, device, BASE, pattern(SMALL, 2))
    same(pattern(SMALL, 2), bytes(memory.data[:SMALL]), "what the device wrote")


@AREA.case(20, MUST, "R394 R371")
def sizes(t: Trial) -> None:
    """DMA of any size arrives whole.

    Sends: memory without a descriptor; the device reads and writes 1, 3, 4095, 4097 and 65536 bytes at odd addresses.
    Expects: the right bytes, and nothing beside them is touched.
    """
    link = t.attach()
    device = ready(t, link)
    if device.granule > 1:
        raise NotApplicable(f"the device moves multiples of {device.granule} bytes only")
    memory = by_messages(t, link)
    for count in (1, 3, 4095, 4097, 65536):
        begin = 0x1001
        before = bytes(memory.data)
        same(before[begin : begin + count], into_device(link, device, BASE + begin, count), "what the device read")
        out_of_device(link, device, BASE + begin, pattern(count, count & 0xFF))
        expected = before[:begin] + pattern(count, count & 0xFF) + before[begin + count :]
        same(expected, bytes(memory.data), f"memory after a write of {count} bytes")


@AREA.case(21, MUST, "R233")
def dma_after_reset(t: Trial) -> None:
    """After DEVICE_RESET the device can use the maps from before.

    Sends: DMA_MAP, DEVICE_RESET; the device is brought up again and reads.
    Expects: the client's data.
    """
    t.facts.resets()
    link = t.attach()
    device = ready(t, link)
    link.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE, content=pattern(SIZE, 4))])
    link.ok(Command.DEVICE_RESET)
    device.prepare(link)
    same(pattern(SMALL, 4), into_device(link, device, BASE, SMALL), "what the device read")
