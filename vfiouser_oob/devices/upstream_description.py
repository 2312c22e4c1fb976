"""What another vfio-user server says of its function, rendered by our rules."""

from __future__ import annotations

from collections.abc import Sequence

from vfiouser_oob.client.calls import PendingCall
from vfiouser_oob.client.client import Client, ClientRegion
from vfiouser_oob.devices.base import DeviceDescription
from vfiouser_protocol.constants import PCI_NUM_REGIONS, REGION_TYPE_MIGRATION, DeviceInfoFlags, IrqIndex, RegionIndex
from vfiouser_protocol.errors import CommandError, ReplyError
from vfiouser_protocol.irq import IrqDescription
from vfiouser_protocol.limits import MAX_CONFIG_SIZE
from vfiouser_protocol.messages import DeviceInfo
from vfiouser_protocol.regions import RegionDescription, RegionSpec

#: More regions or IRQ indices than this make QEMU refuse the device; a server that claims more is broken.
_MAX_REGIONS = 100
_MAX_IRQS = 50


async def describe_server(client: Client, regions: list[ClientRegion]) -> DeviceDescription:
    """Ask for everything that a client may ask us.

    Args:
        client: the connection to the server.
        regions: receives its regions, whose descriptors are the caller's, also when this fails.

    Raises:
        VfioUserError: it cannot be used.
    """
    questions = [client.submit_info()]
    # Every PCI device has these, so they need not wait for the first answer, which would cost as much as all of them.
    questions += [client.submit_region_info(index) for index in range(PCI_NUM_REGIONS)]
    try:
        info = _checked(await client.take_info(questions[0]))
        questions += [client.submit_region_info(index) for index in range(PCI_NUM_REGIONS, info.num_regions)]
        questions += [client.submit_irq_info(index) for index in range(info.num_irqs)]
        first_irq = 1 + info.num_regions
        for index, call in enumerate(questions[1:first_irq]):
            # One by one: what was received so far is closed by the caller when a later one fails.
            regions.append(await _region(client, call, index))
        irqs = [await _irq(client, call, index) for index, call in enumerate(questions[first_irq:])]
    finally:
        for call in questions:
            call.abandon()
    return _rendered(info, regions, irqs)


def _checked(info: DeviceInfo) -> DeviceInfo:
    if not info.flags & DeviceInfoFlags.PCI:
        raise CommandError("it is not a PCI device")
    if not PCI_NUM_REGIONS <= info.num_regions <= _MAX_REGIONS or info.num_irqs > _MAX_IRQS:
        raise CommandError(f"it claims {info.num_regions} regions and {info.num_irqs} IRQ indices")
    return info


def _rendered(info: DeviceInfo, regions: Sequence[ClientRegion], irqs: list[IrqDescription]) -> DeviceDescription:
    config_size = regions[RegionIndex.CONFIG].description.size
    if config_size > MAX_CONFIG_SIZE:
        raise CommandError(f"its config space has {config_size} bytes, of at most {MAX_CONFIG_SIZE}")
    specs = [_spec(index, region.description) for index, region in enumerate(regions)]
    while len(specs) > PCI_NUM_REGIONS and not specs[-1].size:
        specs.pop()
    while len(irqs) < len(IrqIndex):
        irqs.append(IrqDescription(0))
    return DeviceDescription(specs, irqs, info.flags & (DeviceInfoFlags.PCI | DeviceInfoFlags.RESET))


async def _region(client: Client, call: PendingCall, index: int) -> ClientRegion:
    try:
        return await client.take_region_info(call, index)
    except ReplyError:  # some servers refuse an index that they do not implement
        return ClientRegion(RegionDescription(index, 0, 0, 0, 32), None)


async def _irq(client: Client, call: PendingCall, index: int) -> IrqDescription:
    try:
        info = await client.take_irq_info(call, index)
    except ReplyError:
        return IrqDescription(0)
    return IrqDescription(info.count, info.flags)


def _spec(index: int, region: RegionDescription) -> RegionSpec:
    if region.type is not None and region.type.type == REGION_TYPE_MIGRATION:
        return RegionSpec.absent(index)  # migration is ours to offer, not the upstream server's
    areas = region.mappable_areas
    return RegionSpec(
        index,
        region.size,
        region.flags,
        areas,
        offset=region.offset,
        type=region.type,
        msix_mappable=region.msix_mappable,
        mappable=bool(areas),
    )
