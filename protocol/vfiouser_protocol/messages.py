"""Every payload of the protocol.

`messages_device`, `messages_dma` and `messages_migration` declare the classes; import them from here.
`commands` says which command carries which. Codecs, sizes, debug lines and the reference page follow from both.
"""

from __future__ import annotations

from vfiouser_protocol.fields import Payload
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
    NarrowDmaReadReply,
    NarrowDmaWrite,
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
    "NarrowDmaReadReply",
    "NarrowDmaWrite",
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
