"""Opening a real function: each reason why it cannot be had, by name, and what happens when it can again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from daemonkit import function
from fakevfio import FakeKernel
from fakevfio.bed import NoMessages, answer, copies, map_request, running, session, unmap_request, until
from fakevfio.kernel import BDF, GROUP
from rawclient import GET_INFO, attached, connect
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio.backend import KernelVfioBackend
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.server.function import Function
from vfiouser_oob.server.status import function_status
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.listener import listen_on_path

MIB = 1 << 20


def not_bound(kernel: FakeKernel) -> None:
    """Another driver has the function."""
    kernel.set_driver(BDF, "nvme")


def no_driver(kernel: FakeKernel) -> None:
    """No driver has the function."""
    kernel.set_driver(BDF, None)


def not_there(kernel: FakeKernel) -> None:
    """The function was taken out."""
    path = kernel.function(BDF)
    path.rename(path.with_name("0000:3b:00.7"))


def no_iommu(kernel: FakeKernel) -> None:
    """The kernel made no IOMMU groups."""
    (kernel.function(BDF) / "iommu_group").unlink()


def noiommu_mode(kernel: FakeKernel) -> None:
    """VFIO was told to do without an IOMMU, and made a group up."""
    (kernel.function(BDF) / "iommu_group/name").write_text("vfio-noiommu\n")


def no_iommu_and_not_bound(kernel: FakeKernel) -> None:
    """What is missing first: binding would fail for the same reason."""
    no_iommu(kernel)
    not_bound(kernel)


def no_node(kernel: FakeKernel) -> None:
    """The module that makes the nodes is not loaded."""
    (kernel.dev / "vfio" / "vfio").unlink()


def no_permission(kernel: FakeKernel) -> None:
    """The group's node belongs to root."""
    kernel.open_errors[GROUP] = errno.EACCES


def held(kernel: FakeKernel) -> None:
    """Another process has the device."""
    kernel.held = True


def not_viable(kernel: FakeKernel) -> None:
    """Siblings in the group: one that the host uses, and two that are no obstacle."""
    kernel.viable = False
    kernel.add_function("0000:3b:00.0", GROUP, "ixgbe")
    kernel.add_function("0000:3a:00.0", GROUP, "pcieport", "0x060400")
    kernel.add_function("0000:3b:00.1", GROUP, None)


def no_remapping(kernel: FakeKernel) -> None:
    """The IOMMU cannot remap interrupts."""
    kernel.set_iommu_errno = errno.EPERM


def vf_token(kernel: FakeKernel) -> None:
    """The physical function is with vfio-pci, too."""
    kernel.get_device_errno = errno.EACCES


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (not_there, "there is no PCI function 0000:3b:00.2"),
        (not_bound, "bound to the driver nvme, not to vfio-pci: bind it with `vfiouser-oob bind 0000:3b:00.2`"),
        (no_driver, "bound to no driver, not to vfio-pci"),
        (no_iommu, "has no IOMMU group: switch the IOMMU on"),
        (noiommu_mode, "bound without an IOMMU .*enable_unsafe_noiommu_mode"),
        (no_iommu_and_not_bound, "has no IOMMU group: switch the IOMMU on"),
        (no_node, "is not there .*modprobe vfio-pci"),
        (no_permission, "no permission to open .*--owner USER"),
        (held, "is in use: another process holds 0000:3b:00.2"),
        (not_viable, "group 7 of 0000:3b:00.2 is not viable.* other drivers: 0000:3b:00.0 .ixgbe.;"),
        (no_remapping, "cannot remap interrupts"),
        (vf_token, "needs that one's token"),
    ],
)
async def test_each_obstacle_has_its_words(tmp_path: Path, spoil: Callable[[FakeKernel], None], words: str) -> None:
    """What is missing and what helps, in one line, for the log, the status and the client's refusal; no fd is left."""
    kernel = FakeKernel(tmp_path)
    spoil(kernel)
    async with running(kernel, retry_s=60) as backend:  # no look at the end
        with pytest.raises(BackendUnavailable, match=words) as refused:
            await backend.open(NoMessages())
        assert "\n" not in str(refused.value)
        assert str(refused.value) == backend.unavailable
    assert {} == kernel.nodes


async def test_a_device_that_comes_back_is_noticed(tmp_path: Path) -> None:
    """It is looked at again on a timer, so the status is right before the next client asks."""
    kernel = FakeKernel(tmp_path)
    kernel.held = True
    async with running(kernel) as backend:
        with pytest.raises(BackendUnavailable):
            await backend.open(NoMessages())
        assert backend.unavailable is not None
        kernel.held = False
        await until(lambda: backend.unavailable is None)
        client = await backend.open(NoMessages())
        await client.close()


async def test_trouble_is_known_from_the_start(tmp_path: Path) -> None:
    """A function that is not bound is reported when the daemon starts, not when the first VM fails."""
    kernel = FakeKernel(tmp_path)
    kernel.set_driver(BDF, "nvme")
    async with running(kernel) as backend:
        await until(lambda: backend.unavailable is not None)
        assert "bind 0000:3b:00.2" in (backend.unavailable or "")


async def test_a_successor_waits_for_a_vmm_that_is_just_ending(tmp_path: Path) -> None:
    """A device that is let go within the handover time is no refusal."""
    kernel = FakeKernel(tmp_path)
    kernel.held = True
    async with running(kernel, handover_s=10) as backend, trio.open_nursery() as nursery:

        async def end_soon() -> None:
            await trio.sleep(0.02)
            kernel.held = False

        nursery.start_soon(end_soon)
        client = await backend.open(NoMessages())
        await client.close()


async def test_an_attach_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    """A device that was opened for a client that did not wait is closed again."""
    kernel = FakeKernel(tmp_path)
    async with running(kernel) as backend:
        with trio.CancelScope() as scope:
            scope.cancel()
            await backend.open(NoMessages())
        client = await backend.open(NoMessages())
        await client.close()
    assert {} == kernel.nodes


# Over the socket


async def test_a_kept_device_refuses_the_next_client(tmp_path: Path) -> None:
    """While the first VMM has the device, the second is told ENODEV and the status says why; then it is served."""
    kernel = FakeKernel(tmp_path)
    activity = Activity()
    backend = KernelVfioBackend(kernel, BDF, handover_s=0.02, retry_s=0.01)
    served = Function("f0", backend, reply_budget_s=4.0, activity=activity, events=EventHub(), log=log.get("function"))
    config = function(tmp_path)
    assert config.socket is not None
    listener = listen_on_path(config.socket, 0o600)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.run_device)
            nursery.start_soon(served.serve, listener)
            async with attached(config.socket) as client:
                await client.succeed(GET_INFO, b"\x10" + bytes(15))
                assert function_status(served)["unavailable"] is None
            kernel.held = True
            refused = await connect(config.socket)
            answer_ = await refused.negotiate()
            assert (0x21, errno.ENODEV) == (answer_.flags, answer_.error)
            refused.close()
            assert "in use" in (function_status(served)["unavailable"] or "")
            kernel.held = False
            async with attached(config.socket) as client:
                assert 16 == len((await client.succeed(GET_INFO, b"\x10" + bytes(15))).payload)
                assert function_status(served)["unavailable"] is None
            nursery.cancel_scope.cancel()
    listener.close()
    activity.close()


# iommufd


@pytest.mark.parametrize("map_file", [True, False])
async def test_memory_through_an_iommufd(tmp_path: Path, map_file: bool) -> None:
    """Where the kernel has them, the function's own node and an iommufd do the same, by file or by address."""
    kernel = FakeKernel(tmp_path, iommufd=True)
    kernel.map_file = map_file
    memory = os.memfd_create("client")
    os.ftruncate(memory, 4 * MIB)
    async with session(kernel) as client:
        assert {"cdev", "iommufd"} == {node.kind for node in kernel.nodes.values()}
        await answer(client.dma_map(map_request(0, MIB, offset=MIB), copies(memory)))
        await answer(client.dma_map(map_request(2 * MIB, MIB, flags=1), copies(memory)))
        assert [(0, MIB, 3), (2 * MIB, MIB, 1)] == kernel.iommu.ranges
        kernel.iommu.dma(0, b"dma")
        assert b"dma" == os.pread(memory, 3, MIB)
        await answer(client.dma_unmap(unmap_request(0, MIB)))
        assert [(2 * MIB, MIB, 1)] == kernel.iommu.ranges
    assert {} == kernel.nodes
    assert [] == kernel.iommu.ranges
    os.close(memory)
