"""What is proven in the guest about mediated devices, and about the kernel's own migration of them, by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import trio

from kvfio import bed
from kvfio.bed import NOBODY, NVME, Daemon, background_client, client, daemon
from kvfio.inprocess import container_log, contract
from kvfio.moving import IOVA, MIB, Pair, pair, state
from kvfio.scenarios import _refused as refused
from kvfio.scenarios import refusal
from kvfio.scenarios import wait_until as until
from kvfio.serial import SCR, SerialMachine, SerialPort
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import PAGE_SIZE, ClientMemory
from vfiouser_oob.lab.vmm.attachment import Attachment
from vfiouser_oob.lab.vmm.side import Generation
from vfiouser_oob.lab.vmm.voyage import open_side
from vfiouser_oob.transport.fds import LentFd
from vfiouser_protocol.constants import DeviceState, IrqIndex, RegionIndex
from vfiouser_protocol.errors import VfioUserError

BUS = Path("/sys/bus/mdev")
TYPES = Path("/sys/class/mdev_bus")
#: Two devices of two ports each, one of one port, and two whose driver does DMA and logs no dirty pages.
HERE, THERE, SMALL, DMA_HERE, DMA_THERE = (f"83b8f4f2-509f-382f-3c1e-e6bfe0fa100{number}" for number in range(1, 6))
KINDS = {
    HERE: "mtty/{}/mtty-2",
    THERE: "mtty/{}/mtty-2",
    SMALL: "mtty/{}/mtty-1",
    DMA_HERE: "mttydma/{}/mttydma-2",
    DMA_THERE: "mttydma/{}/mttydma-2",
}
SERIAL = b"HCS2"


def make(uuid: str) -> None:
    """Make a mediated device."""
    (TYPES / KINDS[uuid].format("mdev_supported_types") / "create").write_text(uuid)


# Having it, or not


def mdev_errors() -> None:
    """Each reason why a mediated device cannot be had; making and binding it mends that."""
    assert not list((BUS / "devices").glob("*"))
    refused(
        HERE, f"there is no mediated device {HERE}: there is none at all; create it with `echo {HERE} > TYPE/create`"
    )
    make(THERE)
    refused(HERE, f"this machine has: {THERE}")
    make(HERE)
    (BUS / "drivers/mtty/unbind").write_text(HERE)
    refused(HERE, f"has no driver: remove it with `echo 1 > {BUS}/devices/{HERE}/remove`")
    (BUS / "devices" / HERE / "remove").write_text("1")
    make(HERE)
    group = os.path.basename(os.readlink(BUS / "devices" / HERE / "iommu_group"))
    refused(HERE, f"no permission to open /dev/vfio/{group}: let the daemon's user", uid=NOBODY)


def make_mdevs() -> None:
    """Make the devices that the other scenarios are about."""
    for uuid in KINDS:
        if not (BUS / "devices" / uuid).exists():
            make(uuid)


async def registers_work(path: Path) -> None:
    """Regions, registers, configuration space, interrupts and reset, of a device that has no memory to map."""
    async with Client.connect(path) as connected:
        for index, size in ((0, 8), (1, 8), (2, 0), (int(RegionIndex.CONFIG), 255)):
            region = await connected.get_region_info(index)
            assert size == region.description.size
            assert region.fd is None
        assert SERIAL == await connected.region_read(RegionIndex.CONFIG, 0, 4)
        assert 255 == len(await connected.region_read(RegionIndex.CONFIG, 0, 255))
        assert 0 == (await connected.get_irq_info(IrqIndex.MSIX)).count
        machine = SerialMachine(connected)
        await machine.fill()
        await machine.verify()
        await connected.reset()
        print(f"uid={os.getuid()}")


def mdev_registers() -> None:
    """A mediated device is used like any other function, by a client of another user."""
    with daemon(HERE) as served:
        client(registers_work, served)
        client(registers_work, served)


def mdev_unprivileged() -> None:
    """A daemon without privilege serves one whose group's node it owns."""
    node = Path("/dev/vfio") / os.path.basename(os.readlink(BUS / "devices" / HERE / "iommu_group"))
    os.chown(node, NOBODY, NOBODY)
    try:
        with daemon(HERE, uid=NOBODY, memlock=64 * 1024) as served:
            client(registers_work, served, uid=NOBODY - 1)
    finally:
        os.chown(node, 0, 0)


def views(served: Daemon, name: str) -> int:
    """Bytes of a client's file that the daemon has mapped."""
    total = 0
    for line in Path(f"/proc/{served.pid}/maps").read_text().splitlines():
        if f"memfd:{name}" in line:
            first, last = (int(number, 16) for number in line.split()[0].split("-"))
            total += last - first
    return total


def mdev_memory() -> None:
    """Memory is mapped in the daemon for as long as it is mapped for a mediated device; for a real one not at all."""

    async def work(path: Path, served: Daemon, *, kept: bool) -> None:
        fd = os.memfd_create("kept-memory")
        os.ftruncate(fd, 8 * MIB)
        async with Client.connect(path) as connected:
            await connected.dma_map(IOVA, 2 * MIB, fd=LentFd(fd), offset=MIB)
            await connected.dma_map(IOVA + 16 * MIB, MIB, fd=LentFd(fd))
            assert (3 * MIB if kept else 0) == views(served, "kept-memory")
            assert errno.EEXIST == await refusal(lambda: connected.dma_map(IOVA + MIB, 4096, fd=LentFd(fd)))
            assert (3 * MIB if kept else 0) == views(served, "kept-memory")
            await connected.dma_unmap(IOVA, 2 * MIB)
            assert (MIB if kept else 0) == views(served, "kept-memory")
            os.ftruncate(fd, 0)  # a client that takes its memory away hurts nobody
            await connected.reset()
            await connected.dma_unmap_all()
            assert 0 == views(served, "kept-memory")
            os.ftruncate(fd, 8 * MIB)
            await connected.dma_map(IOVA, 2 * MIB, fd=LentFd(fd))
        until(lambda: served.status()["client"] is None)
        assert 0 == views(served, "kept-memory")

    with daemon(HERE) as served:
        client(lambda path: work(path, served, kept=True), served, uid=0)
    with daemon(NVME, name="f1") as served:
        client(lambda path: work(path, served, kept=False), served, uid=0)


def mdev_removed() -> None:
    """A device that the administrator removes while it is used goes when its client does; then it is missing."""
    removal = BUS / "devices" / HERE / "remove"

    async def work(path: Path) -> None:
        async with Client.connect(path) as connected:
            (bed.RUN / "used").touch()
            with trio.fail_after(20):
                while (bed.RUN / "used").exists():
                    await trio.sleep(0.02)
            assert SERIAL == await connected.region_read(RegionIndex.CONFIG, 0, 4)

    with daemon(HERE) as served:
        with background_client(work, served):
            until((bed.RUN / "used").exists)
            remover = os.fork()
            if remover == 0:
                removal.write_text("1")
                os._exit(0)
            (bed.RUN / "used").unlink()
        assert 0 == os.waitpid(remover, 0)[1]
        assert not removal.exists()
        make(HERE)
        client(registers_work, served)


# Migration

#: What a client does with the source's socket, the destination's, and a generation.
Journey = Callable[[Path, Path, Generation], Awaitable[None]]


def _to(work: Journey, there: Path, generation: Generation, here: Path) -> Awaitable[None]:
    return work(here, there, generation)


def between(work: Journey, source: str = HERE, destination: str = THERE) -> None:
    """Run a client of two daemons, for each generation."""
    with daemon(source, migrates=True, name="a") as first, daemon(destination, migrates=True, name="b") as second:
        for generation in Generation:
            client(partial(_to, work, second.socket, generation), first)


async def move_work(here: Path, there: Path, generation: Generation) -> None:
    """There with pre-copy, back without; the source is stopped each time, and runs after a reset only."""
    for first, second, precopy in ((here, there, True), (there, here, False)):
        async with pair(first, second, generation) as both:
            await both.migrate(precopy=precopy)
            assert DeviceState.STOP is await state(both.place.client)
            assert DeviceState.RUNNING is await state(both.target.client)


def mdev_move() -> None:
    """A function goes from one daemon to another and back, by both generations, with and without pre-copy."""
    between(move_work)


async def cancel_work(here: Path, there: Path, generation: Generation) -> None:
    """A migration that is given up in each of its phases: the source goes on, and the next attempt succeeds."""
    async with pair(here, there, generation) as both:
        for stopped in (False, True):
            await both.destination.load_setup()
            await both.source.save_setup()
            await both.carry()
            if stopped:
                await both.source.stop()
                await both.carry()
            await both.source.cancel()
            await both.machine.verify()
            await both.abandon()
            assert (0x11, 0x11 ^ 0xFF, 0x1234) == await SerialMachine(both.target.client).glance(), (
                "something was loaded"
            )
        await both.migrate()


def mdev_cancel() -> None:
    """Cancelled in pre-copy and after the stop, at the source and at the destination."""
    between(cancel_work)


async def corruption_work(here: Path, there: Path, generation: Generation, foreign: bytes) -> None:
    """Whatever is wrong with a stream, it is refused, nothing of it is loaded, and a reset brings the function back."""
    async with pair(here, there, generation) as both:
        stream = await both.stream()
        bad = {f"bit {bit}": flipped(stream, bit) for bit in range(5, 8 * len(stream), 8 * len(stream) // 9)}
        bad |= {"cut": stream[:-20], "half": stream[: len(stream) // 2], "foreign": foreign, "noise": os.urandom(300)}
        for name, data in bad.items():
            await both.destination.load_setup()
            try:
                await both.destination.load(data)
                await both.destination.start()
            except VfioUserError as error:
                said = str(error)
            else:
                raise AssertionError(f"{name} was accepted")
            await both.target.client.reset()
            assert DeviceState.RUNNING is await state(both.target.client)
            found = await SerialMachine(both.target.client).glance()
            assert (0x11, 0x11 ^ 0xFF, 0x1234) == found, f"{name} was loaded: {found}"
            print(f"{generation.value} {name}: {said}")
        await both.migrate()


def flipped(stream: bytes, bit: int) -> bytes:
    """A stream with one bit that is wrong."""
    return stream[: bit // 8] + bytes([stream[bit // 8] ^ 1 << bit % 8]) + stream[bit // 8 + 1 :]


async def foreign_stream(path: Path) -> bytes:
    """The state of a device of another type, which only its driver can tell apart."""
    with ClientMemory(MIB, IOVA) as memory:
        async with Attachment.open(path, memory) as place:
            side = await open_side(Generation.V2, place.client)
            return await Pair(place, place, side, side).stream()


def mdev_corruption() -> None:
    """Flipped bits, streams that end early, noise, and the state of a device with fewer ports."""
    with daemon(SMALL, migrates=True, name="c") as small:
        client(lambda path: _keep(path, foreign_stream), small, uid=0)
    foreign = (bed.RUN / "stream").read_bytes()
    between(lambda here, there, generation: corruption_work(here, there, generation, foreign))


async def _keep(path: Path, work: Callable[[Path], object]) -> None:
    (bed.RUN / "stream").write_bytes(await work(path))  # type: ignore[misc]


async def reset_work(here: Path, there: Path, generation: Generation) -> None:
    """The guest resets the function during pre-copy, and after the stop: the migration is over, the function runs."""
    async with pair(here, there, generation) as both:
        for stopped in (False, True):
            await both.source.save_setup()
            await both.source.read()
            if stopped:
                await both.source.stop()
            await both.place.client.reset()
            assert DeviceState.RUNNING is await state(both.place.client)
            await both.machine.verify()
        await both.migrate()


def mdev_reset() -> None:
    """Resets during a migration."""
    between(reset_work)


# Dirty pages


async def dirty_work(here: Path, there: Path, generation: Generation) -> None:
    """The pages that a mediated device's driver took hold of are dirty, which are none here; also those unmapped."""
    async with pair(here, there, generation) as both:
        memory = both.place.memory
        await both.source.start_logging(memory)
        assert not any(await both.source.dirty(memory))
        if generation is Generation.V1:
            assert not any(await both.place.client.dma_unmap_dirty(IOVA, 2 * MIB, PAGE_SIZE))
            await memory.map(both.place.client)
        await both.source.stop_logging()
        await both.migrate()


async def dma_work(here: Path, there: Path, generation: Generation) -> None:
    """A driver writes memory through the daemon's mapping; exactly these pages are dirty, and all of them arrive."""
    async with pair(here, there, generation) as both:
        memory, port = both.place.memory, SerialPort(both.place.client, 1)

        async def write(page: int, value: int) -> None:
            await port.set_divisor(page)
            await port.write(SCR, value)
            with memory.view(IOVA + page * PAGE_SIZE, 1) as byte:
                assert value == byte[0], "the driver's write did not arrive"

        await write(7, 0x77)
        await both.source.start_logging(memory)
        for page in (3, 300):
            await write(page, page & 0xFF)
        assert {3, 300} == dirty_pages(await both.source.dirty(memory))
        assert set() == dirty_pages(await both.source.dirty(memory))
        if generation is Generation.V1:
            await write(5, 0x55)
            assert {5} == dirty_pages(await both.place.client.dma_unmap_dirty(IOVA, 2 * MIB, PAGE_SIZE))
            await port.write(SCR, 0x56)
            with memory.view(IOVA + 5 * PAGE_SIZE, 1) as byte:
                assert 0x55 == byte[0], "memory was written that had been taken back"
            await memory.map(both.place.client)
        await both.source.stop_logging()
        await both.machine.fill()

        async def last() -> None:
            await write(9, 0x99)
            await both.machine.fill()

        both.machine.last = last
        assert 0 < (await both.migrate()).dirty_by_device


def dirty_pages(bitmap: bytes) -> set[int]:
    """Numbers of the pages that a bitmap names."""
    return {bit for bit in range(8 * len(bitmap)) if bitmap[bit // 8] >> bit % 8 & 1}


def mdev_dirty() -> None:
    """Where the driver's log cannot be read, and where it has none, the IOMMU driver's takes its place."""
    between(dirty_work)
    assert "pages that the function writes cannot be used: Operation not supported; the IOMMU's" in log_of("a")
    between(dma_work, DMA_HERE, DMA_THERE)
    assert "the driver keeps no log of the pages that the function writes; the IOMMU's is used" in log_of("a")


def log_of(name: str) -> str:
    """What a daemon said."""
    return (bed.RUN / f"{name}.log").read_text()


# A daemon that dies


def mdev_killed() -> None:
    """A daemon is killed in a migration: its successor finds a function that runs, and migrates it."""
    for moment in ("pre-copy", "stop-copy", "loading"):
        with daemon(HERE, migrates=True, name="a") as first, daemon(THERE, migrates=True, name="b") as second:
            victim = second if moment == "loading" else first
            with background_client(lambda path, m=moment: _bereft(path, second.socket, m), first):  # type: ignore[misc]
                until((bed.RUN / "under-way").exists)
                victim.kill()
                (bed.RUN / "under-way").unlink()
        with daemon(HERE, migrates=True, name="a") as first, daemon(THERE, migrates=True, name="b") as second:
            client(lambda path: _find_again(path, second.socket), first)
            left = log_of("b" if moment == "loading" else "a")
            assert "still in a migration that nobody is in any more; it was reset" in left


async def _bereft(here: Path, there: Path, moment: str) -> None:
    async with pair(here, there, Generation.V2) as both:
        await both.destination.load_setup()
        await both.source.save_setup()
        await both.carry()
        if moment != "pre-copy":
            await both.source.stop()
            await both.carry()
        (bed.RUN / "under-way").touch()
        lost = both.target if moment == "loading" else both.place
        await lost.client.wait_gone()
        try:
            await lost.client.get_device_state()
        except VfioUserError:
            return
        raise AssertionError("a daemon that was killed answered")


async def _find_again(here: Path, there: Path) -> None:
    async with Client.connect(here) as connected:
        assert DeviceState.RUNNING is await state(connected)
        await SerialMachine(connected).verify()
    async with pair(here, there, Generation.V2) as both:
        await both.migrate()


SCENARIOS: Mapping[str, Callable[[], None]] = {
    scenario.__name__: scenario
    for scenario in (
        mdev_errors,
        make_mdevs,
        mdev_registers,
        mdev_unprivileged,
        mdev_memory,
        mdev_removed,
        mdev_move,
        mdev_cancel,
        mdev_corruption,
        mdev_reset,
        mdev_dirty,
        mdev_killed,
        contract,
        container_log,
    )
}
