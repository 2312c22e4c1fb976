"""Every payload of the protocol, with the layout of each: the one table that the codec and the manual go by.

The classes are defined by subject in `messages_device`, `messages_dma` and `messages_migration`; import
them from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vfiouser_protocol import messages_device as _device
from vfiouser_protocol import messages_dma as _dma
from vfiouser_protocol import messages_migration as _migration
from vfiouser_protocol.constants import Command
from vfiouser_protocol.messages_device import (
    DeviceInfo,
    Empty,
    IoFdEntry,
    IrqInfo,
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteMulti,
    RegionWriteMultiReply,
    RegionWriteReply,
    SetIrqs,
    Version,
)
from vfiouser_protocol.messages_dma import (
    DirtyPages,
    DmaMap,
    DmaRead,
    DmaReadReply,
    DmaUnmap,
    DmaWrite,
    DmaWriteReply,
)
from vfiouser_protocol.messages_migration import (
    DeviceFeature,
    FeatureDeviceState,
    FeatureLoggingReport,
    FeatureLoggingStart,
    FeatureMigration,
    LoggingRange,
    MigDataRead,
    MigDataReadReply,
    MigDataWrite,
)

__all__ = [
    "LAYOUTS",
    "NESTED",
    "PAYLOADS",
    "DeviceFeature",
    "DeviceInfo",
    "DirtyPages",
    "DmaMap",
    "DmaRead",
    "DmaReadReply",
    "DmaUnmap",
    "DmaWrite",
    "DmaWriteReply",
    "Empty",
    "FeatureDeviceState",
    "FeatureLoggingReport",
    "FeatureLoggingStart",
    "FeatureMigration",
    "IoFdEntry",
    "IrqInfo",
    "LoggingRange",
    "MigDataRead",
    "MigDataReadReply",
    "MigDataWrite",
    "Payload",
    "RegionInfo",
    "RegionIoFds",
    "RegionRead",
    "RegionReadReply",
    "RegionWrite",
    "RegionWriteMulti",
    "RegionWriteMultiReply",
    "RegionWriteReply",
    "SetIrqs",
    "Version",
]

#: Any payload.
Payload = (
    DeviceFeature
    | DeviceInfo
    | DirtyPages
    | DmaMap
    | DmaRead
    | DmaReadReply
    | DmaUnmap
    | DmaWrite
    | DmaWriteReply
    | Empty
    | FeatureDeviceState
    | FeatureLoggingReport
    | FeatureLoggingStart
    | FeatureMigration
    | IrqInfo
    | MigDataRead
    | MigDataReadReply
    | MigDataWrite
    | RegionInfo
    | RegionIoFds
    | RegionRead
    | RegionReadReply
    | RegionWrite
    | RegionWriteMulti
    | RegionWriteMultiReply
    | RegionWriteReply
    | SetIrqs
    | Version
)

#: The construct declaration of each payload.
LAYOUTS: Mapping[type[Any], Any] = MappingProxyType(
    {
        Version: _device.VERSION_LAYOUT,
        Empty: _device.EMPTY_LAYOUT,
        DeviceInfo: _device.DEVICE_INFO_LAYOUT,
        RegionInfo: _device.REGION_INFO_LAYOUT,
        RegionIoFds: _device.REGION_IO_FDS_LAYOUT,
        IrqInfo: _device.IRQ_INFO_LAYOUT,
        SetIrqs: _device.SET_IRQS_LAYOUT,
        RegionRead: _device.REGION_ACCESS_LAYOUT,
        RegionReadReply: _device.REGION_DATA_LAYOUT,
        RegionWrite: _device.REGION_DATA_LAYOUT,
        RegionWriteReply: _device.REGION_ACCESS_LAYOUT,
        RegionWriteMulti: _device.REGION_WRITE_MULTI_LAYOUT,
        RegionWriteMultiReply: _device.REGION_WRITE_MULTI_REPLY_LAYOUT,
        DmaMap: _dma.DMA_MAP_LAYOUT,
        DmaUnmap: _dma.DMA_UNMAP_LAYOUT,
        DmaRead: _dma.DMA_ACCESS_LAYOUT,
        DmaReadReply: _dma.DMA_DATA_LAYOUT,
        DmaWrite: _dma.DMA_DATA_LAYOUT,
        DmaWriteReply: _dma.DMA_ACCESS_LAYOUT,
        DirtyPages: _dma.DIRTY_PAGES_LAYOUT,
        DeviceFeature: _migration.DEVICE_FEATURE_LAYOUT,
        FeatureMigration: _migration.FEATURE_MIGRATION_LAYOUT,
        FeatureDeviceState: _migration.FEATURE_DEVICE_STATE_LAYOUT,
        FeatureLoggingStart: _migration.FEATURE_LOGGING_START_LAYOUT,
        FeatureLoggingReport: _migration.FEATURE_LOGGING_REPORT_LAYOUT,
        MigDataRead: _migration.MIG_DATA_READ_LAYOUT,
        MigDataReadReply: _migration.MIG_DATA_LAYOUT,
        MigDataWrite: _migration.MIG_DATA_LAYOUT,
    }
)

#: Request and reply payload of each command. The reply to DIRTY_PAGES is `Empty` unless a bitmap was asked
#: for.
PAYLOADS: Mapping[int, tuple[type[Payload], type[Payload]]] = MappingProxyType(
    {
        Command.VERSION: (Version, Version),
        Command.DMA_MAP: (DmaMap, Empty),
        Command.DMA_UNMAP: (DmaUnmap, DmaUnmap),
        Command.DEVICE_GET_INFO: (DeviceInfo, DeviceInfo),
        Command.DEVICE_GET_REGION_INFO: (RegionInfo, RegionInfo),
        Command.DEVICE_GET_REGION_IO_FDS: (RegionIoFds, RegionIoFds),
        Command.DEVICE_GET_IRQ_INFO: (IrqInfo, IrqInfo),
        Command.DEVICE_SET_IRQS: (SetIrqs, Empty),
        Command.REGION_READ: (RegionRead, RegionReadReply),
        Command.REGION_WRITE: (RegionWrite, RegionWriteReply),
        Command.DMA_READ: (DmaRead, DmaReadReply),
        Command.DMA_WRITE: (DmaWrite, DmaWriteReply),
        Command.DEVICE_RESET: (Empty, Empty),
        Command.DIRTY_PAGES: (DirtyPages, DirtyPages),
        Command.REGION_WRITE_MULTI: (RegionWriteMulti, RegionWriteMultiReply),
        Command.DEVICE_FEATURE: (DeviceFeature, DeviceFeature),
        Command.MIG_DATA_READ: (MigDataRead, MigDataReadReply),
        Command.MIG_DATA_WRITE: (MigDataWrite, Empty),
    }
)

#: The fields that hold several items, and what the items are.
NESTED: Mapping[type[Any], tuple[str, type[IoFdEntry | LoggingRange | RegionWrite]]] = MappingProxyType(
    {
        RegionIoFds: ("entries", IoFdEntry),
        FeatureLoggingStart: ("ranges", LoggingRange),
        RegionWriteMulti: ("writes", RegionWrite),
    }
)
