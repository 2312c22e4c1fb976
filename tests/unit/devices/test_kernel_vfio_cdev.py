"""A function's own node and an iommufd: who may have it, how it is refused, and where the kernel checks less."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakevfio import FakeKernel
from fakevfio.bed import NoMessages, answer, copies, given, map_request, running, session, unmap_request
from fakevfio.kernel import BDF, GROUP
from vfiouser_oob.config.schema import VfioInterface
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio.kernel import LinuxKernel
from vfiouser_oob.devices.kernel_vfio.openers import CdevOpener, DeviceBusy, GroupOpener, choose_opener
from vfiouser_oob.observability import log
from vfiouser_protocol.errors import CommandError

MIB = 1 << 20
F_SEAL_FUTURE_WRITE = 0x10
NODE = "vfio0"


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """A machine with device nodes and iommufd."""
    return FakeKernel(tmp_path, iommufd=True)


@pytest.fixture
def memory() -> Iterator[int]:
    """A client's memory: 4 MiB, which can be sealed."""
    fd = os.memfd_create("client", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * MIB)
    yield fd
    os.close(fd)


# Who may have it


def bound_by_another(kernel: FakeKernel) -> None:
    """Another process has the device, or has mapped it."""
    kernel.held = True


def group_node_open(kernel: FakeKernel) -> None:
    """Another process uses the group's node."""
    kernel.bind_errno = errno.EBUSY


def sibling_of_the_host(kernel: FakeKernel) -> None:
    """The host uses another function of the group; the kernel's answer is that of a taken IOMMU."""
    kernel.add_function("0000:3b:00.0", GROUP, "ixgbe")
    kernel.bind_errno = errno.EPERM


def sibling_in_use(kernel: FakeKernel) -> None:
    """Another process uses another function of the group."""
    kernel.add_function("0000:3b:00.1", GROUP, "vfio-pci")
    kernel.bind_errno = errno.EPERM


def no_remapping(kernel: FakeKernel) -> None:
    """The function is alone in its group, and its interrupts are not isolated."""
    kernel.bind_errno = errno.EPERM


def vf_token(kernel: FakeKernel) -> None:
    """The physical function is with vfio-pci, too."""
    kernel.bind_errno = errno.EACCES


def no_iommu_permission(kernel: FakeKernel) -> None:
    """/dev/iommu is root's."""
    kernel.open_errors["iommu"] = errno.EACCES


def no_node_permission(kernel: FakeKernel) -> None:
    """The function's node is root's."""
    kernel.open_errors[NODE] = errno.EACCES


def no_iommufd(kernel: FakeKernel) -> None:
    """The module is not loaded."""
    (kernel.dev / "iommu").unlink()


def no_nodes(kernel: FakeKernel) -> None:
    """A kernel without device nodes."""
    (kernel.function(BDF) / "vfio-dev" / NODE).rmdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (bound_by_another, r"is in use: another process has bound it.*fuser -v .*vfio/devices/vfio0"),
        (group_node_open, "IOMMU group 7 of 0000:3b:00.2 is in use"),
        (sibling_of_the_host, r"group 7 of 0000:3b:00.2 is not viable.* other drivers: 0000:3b:00.0 .ixgbe.;"),
        (sibling_in_use, "IOMMU group 7 of 0000:3b:00.2 is in use.* another function of its IOMMU group"),
        (no_remapping, "cannot remap interrupts"),
        (vf_token, "needs that one's token"),
        (no_iommu_permission, r"no permission to open .*/iommu: .*udev rule"),
        (no_node_permission, r"no permission to open .*/vfio0: .*--owner USER"),
        (no_iommufd, "iommu is not there .*modprobe iommufd"),
        (no_nodes, "no device node: .*CONFIG_VFIO_DEVICE_CDEV"),
    ],
)
async def test_each_obstacle_has_its_words(kernel: FakeKernel, spoil: Callable[[FakeKernel], None], words: str) -> None:
    """The same obstacles as with groups have the same words, though the kernel's errno are others; no fd is left."""
    spoil(kernel)
    async with running(kernel, interface=VfioInterface.CDEV, retry_s=60) as backend:  # no look at the end
        with pytest.raises(BackendUnavailable, match=words) as refused:
            await backend.open(NoMessages())
        assert "\n" not in str(refused.value)
        assert str(refused.value) == backend.unavailable
    assert {} == kernel.nodes


@pytest.mark.parametrize("spoil", [bound_by_another, group_node_open, sibling_in_use])
def test_what_passes_is_waited_for(kernel: FakeKernel, spoil: Callable[[FakeKernel], None]) -> None:
    """Another user of the device or of its group may end in a moment: that is told apart from what only people mend."""
    spoil(kernel)
    with pytest.raises(DeviceBusy):
        choose_opener(kernel, BDF).open()


def test_the_interface_is_the_one_that_may_be_used(kernel: FakeKernel) -> None:
    """Nodes that are there and may be opened are preferred, a group that works is not lost to a node that does not."""
    assert isinstance(choose_opener(kernel, BDF), CdevOpener)
    assert isinstance(choose_opener(kernel, BDF, VfioInterface.GROUP), GroupOpener)
    for name in ("iommu", NODE):
        kernel.open_errors = {name: errno.EACCES}
        assert isinstance(choose_opener(kernel, BDF), GroupOpener)
        assert isinstance(choose_opener(kernel, BDF, VfioInterface.CDEV), CdevOpener)


def test_what_can_be_opened_is_tried(tmp_path: Path) -> None:
    """Whatever keeps a node away counts, and no descriptor is left of the trial."""
    kernel = LinuxKernel(tmp_path, tmp_path)
    (tmp_path / "node").touch()
    before = sorted(os.listdir("/proc/self/fd"))
    assert kernel.may_open(tmp_path / "node")
    assert not kernel.may_open(tmp_path / "absent")
    assert not kernel.may_open(tmp_path)  # a directory cannot be opened for writing, whatever its permissions are
    assert before == sorted(os.listdir("/proc/self/fd"))


# Memory


@pytest.mark.parametrize("map_file", [True, False])
async def test_a_device_writes_only_what_its_client_may_write(kernel: FakeKernel, memory: int, map_file: bool) -> None:
    """The kernel pins a file whatever its descriptor or a seal allows; so we look, by the rules of mmap."""
    kernel.map_file = map_file
    readable = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    writable = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY)
    async with session(kernel) as client:
        for fd, flags in ((readable, 3), (readable, 2), (writable, 1), (writable, 2)):
            with pytest.raises(CommandError, match="does not allow") as refused:
                await answer(client.dma_map(map_request(0, MIB, flags=flags), copies(fd)))
            assert errno.EACCES == refused.value.errno
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        with pytest.raises(CommandError, match="sealed") as refused:
            await answer(client.dma_map(map_request(0, MIB), copies(memory)))
        assert errno.EPERM == refused.value.errno
        await answer(client.dma_map(map_request(0, MIB, flags=1), copies(memory)))
        await answer(client.dma_map(map_request(MIB, MIB, flags=1), copies(readable)))
        assert [(0, MIB, 1), (MIB, MIB, 1)] == kernel.iommu.ranges
    os.close(readable)
    os.close(writable)


async def test_an_address_stays_the_clients_while_it_is_mapped(kernel: FakeKernel, memory: int) -> None:
    """The kernel may look it up again when the device is attached anew, which any holder of the device can do."""
    kernel.map_file = False
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))
        await answer(client.dma_map(map_request(MIB, MIB), copies(memory)))
        assert 2 == len(kernel.views)
        with pytest.raises(CommandError):
            await answer(client.dma_map(map_request(4 * MIB, 8 * MIB), copies(memory)))
        assert 2 == len(kernel.views)
        await answer(client.dma_unmap(unmap_request(0, MIB)))
        assert 1 == len(kernel.views)
        await answer(client.dma_unmap_all())
        assert {} == kernel.views
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))
    assert {} == kernel.views


async def test_an_address_is_given_up_for_good_where_unmapping_fails(kernel: FakeKernel, memory: int) -> None:
    """What the kernel may still look up must never become something else of the daemon's."""
    kernel.map_file = False
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))
        kernel.unmap_errno = errno.EBUSY
    assert 1 == len(kernel.views)
    assert {} == kernel.nodes


async def test_a_file_that_is_mapped_by_itself_needs_no_address(kernel: FakeKernel, memory: int) -> None:
    """Nothing of the client's memory is mapped here, as with containers."""
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(0, MIB), copies(memory)))
        assert {} == kernel.views


async def test_a_file_that_cannot_be_mapped_by_itself(kernel: FakeKernel, tmp_path: Path) -> None:
    """One kind of file that needs an address does not spoil the next one that does not."""
    kernel.iommu.max_maps = 2
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    plain, memory = os.open(path, os.O_RDWR), os.memfd_create("client")
    os.ftruncate(memory, MIB)
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(0, MIB), given(plain)))
        assert 1 == len(kernel.views)
        await answer(client.dma_map(map_request(MIB, MIB), given(memory)))
        assert 1 == len(kernel.views)


async def test_locked_memory_is_counted_for_the_user(
    kernel: FakeKernel, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the limit is shared by all processes of a user, which explains a refusal that sums do not."""
    kernel.iommu.memlock = MIB
    monkeypatch.setattr(resource, "getrlimit", lambda which: (MIB, MIB))
    async with session(kernel) as client:
        with pytest.raises(CommandError, match=r"is 1048576 bytes .all processes of the daemon's user") as refused:
            await answer(client.dma_map(map_request(0, 2 * MIB), copies(memory)))
        assert errno.ENOMEM == refused.value.errno


# Regions


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What is logged, of every level."""
    text = io.StringIO()
    logger, handler = logging.getLogger(log.ROOT), logging.StreamHandler(text)
    handler.setFormatter(log.HumanFormatter())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield text
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("kernel_can", "words"), [(None, "makes no dma-buf of a region"), ("export", "maps no dma-buf of a region")]
)
async def test_why_there_is_no_dma_buf_is_in_the_debug_log(
    kernel: FakeKernel, kernel_can: str | None, words: str, logged: io.StringIO
) -> None:
    """The fallback of `auto` is silent otherwise, and people will ask why the client has the whole device."""
    kernel.dma_buf = kernel_can
    async with session(kernel) as client:
        assert client.description.regions[0].mappable
    assert words in logged.getvalue()


@pytest.mark.parametrize("interface", [VfioInterface.GROUP, VfioInterface.CDEV])
async def test_by_which_way_a_device_was_opened_is_in_the_debug_log(
    kernel: FakeKernel, interface: VfioInterface, logged: io.StringIO
) -> None:
    """`auto` chooses by itself, so that it must be possible to see what it chose."""
    async with running(kernel, interface=interface) as backend:
        client = await backend.open(NoMessages())
        await client.close()
    assert f"device opened device={BDF} interface={interface.value}" in logged.getvalue()
